"""The mirrored sample: left and right exchanged in every input, text and label, or no mirrored sample at all."""

from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch.utils.data import Dataset

from mm.batch import FindingTruth, Sample, Truth, VisitTruth
from mm.data.sides import mirrored
from mm.ontology import SOUND_SITES

_OTHER_SIDE: Final = {"left": "right", "right": "left", "none": "none"}
_OTHER_SITE: Final = tuple(
    SOUND_SITES.index(site.replace("left", "right") if "left" in site else site.replace("right", "left"))
    for site in SOUND_SITES
)


def mirror(sample: Sample) -> Sample | None:
    """The sample of a patient who is this one's mirror image; twice gives the sample again.

    Volumes (along X, patient's left), the image (along its columns), the sites of sounds, places, sides and masks
    of findings, and every text are exchanged. Voxel and pixel indices are exact; places in millimetres, which no
    target is made from, are mirrored at the patient coordinate 0.

    Returns:
        None where a text can't be mirrored truly (see `mm.data.sides.mirrored`).
    """
    texts = [sample.text, *(item.text for item in sample.report)]
    texts += [text for item in sample.questions for text in (item.question, item.answer)]
    words = "" if sample.record is None else sample.record.words
    changed = [mirrored(text) for text in (*texts, words)]
    if any(text is None for text in changed):
        return None
    said = iter(text for text in changed if text is not None)
    text = next(said)
    report = tuple(replace(item, text=next(said)) for item in sample.report)
    questions = tuple(replace(item, question=next(said), answer=next(said)) for item in sample.questions)
    return replace(
        sample,
        volumes=tuple(_turned(volume) for volume in sample.volumes),
        image=None if sample.image is None else _turned(sample.image),
        audio=tuple(sample.audio[site] for site in _OTHER_SITE) if sample.audio else (),
        record=None if sample.record is None else replace(sample.record, words=next(said)),
        report=report,
        text=text,
        questions=questions,
        truth=None if sample.truth is None else _truth(sample.truth, sample),
    )


class Mirrored(Dataset[Sample]):
    """Samples of which a share is mirrored, drawn afresh each time from torch's random state."""

    def __init__(self, samples: Dataset[Sample], *, share: float) -> None:
        self.samples, self.share = samples, share

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)  # type: ignore[arg-type]  # every dataset of ours is sized

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, or its mirror image where that can be told truly."""
        sample = self.samples[index]
        if float(torch.rand(())) >= self.share:
            return sample
        return mirror(sample) or sample


def _turned(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values[..., ::-1])


def _truth(truth: Truth, sample: Sample) -> Truth:
    width = 0 if sample.image is None else sample.image.shape[-1]
    if truth.image_bits is not None:
        width = truth.image_bits.shape[-1]
    assert width or not any(truth.image_centers)
    return Truth(
        findings=tuple(map(_finding, truth.findings)),
        visits=tuple(_visit(visit) for visit in truth.visits),
        image_bits=None if truth.image_bits is None else _turned(truth.image_bits),
        image_centers=tuple(None if at is None else (at[0], width - 1.0 - at[1]) for at in truth.image_centers),
    )


def _visit(visit: VisitTruth) -> VisitTruth:
    last = visit.bits.shape[-1] - 1.0
    return VisitTruth(
        bits=_turned(visit.bits),
        findings=tuple(map(_finding, visit.findings)),
        centers=tuple(None if at is None else (at[0], at[1], last - at[2]) for at in visit.centers),
    )


def _finding(finding: FindingTruth) -> FindingTruth:
    at, shown = finding.center_mm, finding.image_center_mm
    return replace(
        finding,
        side=_OTHER_SIDE[finding.side],
        center_mm=None if at is None else (-at[0], at[1], at[2]),
        image_center_mm=None if shown is None else (-shown[0], shown[1]),
    )
