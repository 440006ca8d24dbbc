"""The widths that two parts of a model must agree on, asked before anything is computed."""

from typing import Literal

from mm.answers import AnswerHead
from mm.canonical import CanonicalHead
from mm.decoder.sentences import SentenceDecoder
from mm.encoders.base import ImageEncoder, TextTower
from mm.encoders.record import RecordEncoder
from mm.encoders.resnet3d import ResNet3DEncoder
from mm.encoders.wav2vec import Wav2VecEncoder
from mm.findings import FindingHead
from mm.fusion.alignment import CrossModalAlignment


def check_widths(
    *,
    fusion: CrossModalAlignment,
    volume: ResNet3DEncoder | None,
    image: ImageEncoder | None,
    audio: Wav2VecEncoder | None,
    record: RecordEncoder | None,
    text: TextTower | None,
    findings: FindingHead | None,
    decoder: SentenceDecoder | None,
    answers: AnswerHead | None,
    canonical: CanonicalHead | None,
    compared: Literal["projected", "as_is"],
) -> None:
    """Compares the parts of a `MultimodalModel`, given as to its constructor.

    Raises:
        ValueError: Two of them don't fit, or one that another reads through is missing.
    """
    pairs: list[tuple[str, object, object]] = []
    if compared == "as_is" and (image is None or text is None or image.width != text.width):
        raise ValueError('compared="as_is" needs an image and a text encoder that share a width')
    if answers is not None:
        if text is None:
            raise ValueError("answers reads questions through the text tower; give it `text`")
        if record is not None:
            raise ValueError("answers puts the question in the record's seat of the fusion; leave out `record`")
        pairs.append(("answers.text_width", answers.text_width, text.width))
        if answers.image_width:
            pairs.append(("answers.image_width", answers.image_width, None if image is None else image.width))
    if canonical is not None:
        if image is None or text is None or compared == "as_is":
            raise ValueError('canonical compares images with texts: give `image`, `text` and compared="projected"')
        pairs.append(("canonical.image_width", canonical.image_width, image.width))
        pairs.append(("canonical.text_width", canonical.text_width, text.width))
    if decoder is not None and decoder.memory_width != fusion.width:
        raise ValueError(f"decoder.memory_width must be the fusion's width {fusion.width}, got {decoder.memory_width}")
    if findings is not None:
        if volume is not None:
            pairs.append(("findings.volume_widths", findings.volume_widths, tuple(volume.widths)))
        if image is not None:
            pairs.append(("findings.image_widths", findings.image_widths, image.widths))
            if findings.image_widths is not None:
                pairs.append(("findings.image_stride", findings.image_stride[0], image.stride))
        if audio is not None:
            pairs.append(("findings.audio_width", findings.audio_width, audio.width))
        if record is not None:
            pairs.append(("findings.record_width", findings.record_width, record.width))
    for name, got, allowed in pairs:
        if got is not None and got != allowed:
            raise ValueError(f"{name} must be the encoder's {allowed}, got {got}")
