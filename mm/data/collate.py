"""Samples to one padded `Batch`: inputs, the rows of text to learn, and the finding head's targets."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mm import ontology
from mm.batch import (
    SPECIAL_IDS,
    Audio,
    Batch,
    Images,
    Language,
    Padded,
    Records,
    Sample,
    Slots,
    Targets,
    Truth,
    Volumes,
    Writing,
    slot,
)
from mm.data.tokenizer import Tokenizer

Rows: TypeAlias = Literal["report", "questions", "caption"]
"""What becomes rows of text to learn: the report's sentences, question and answer, or the whole text at once."""
DESCRIBE: Final[dict[Language, str]] = {"en": "Describe the image.", "zh": "描述图像。"}
"""What a caption answers."""

NUM_FINDINGS = len(ontology.FINDINGS)


def collate(
    samples: Sequence[Sample],
    tokenizer: Tokenizer | None,
    *,
    rows: tuple[Rows, ...] = ("report", "questions"),
    max_words: int = 64,
    max_text: int = 256,
) -> Batch:
    """Pads studies into one batch; what no study has is None.

    Args:
        samples: At least one study. Volumes, and images, must share one size.
        tokenizer: Without it there are no words of records and no text.
        rows: Which texts become `writing`.
        max_words: Longest run of tokens of a record's words; the rest is cut.
        max_text: Longest run of tokens of a whole report, for contrastive alignment or as a caption; the rest is cut.

    Raises:
        ValueError: No sample, or volumes or images of different sizes.
    """
    if not samples:
        raise ValueError("samples must hold at least one study, got none")
    return Batch(
        size=len(samples),
        volumes=_volumes(samples),
        image=_images(samples),
        audio=_audio(samples),
        record=_records(samples, tokenizer, max_words),
        text=_texts(samples, tokenizer, rows, max_text),
        writing=None if tokenizer is None else _writing(samples, tokenizer, rows, max_text),
        targets=_targets([sample.truth for sample in samples]),
    )


# ------------------------------------------------------------------------------------------------ inputs


def _same_shape(arrays: list[np.ndarray], name: str) -> tuple[int, ...]:
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"{name} of one batch must share a size, got {sorted(shapes)}; resample them first")
    return next(iter(shapes))


def _volumes(samples: Sequence[Sample]) -> Volumes | None:
    arrays = [volume for sample in samples for volume in sample.volumes]
    if not arrays:
        return None
    shape = _same_shape(arrays, "volumes")
    visits = max(len(sample.volumes) for sample in samples)
    values = torch.zeros(len(samples), visits, 1, *shape)
    days = torch.zeros(len(samples), visits)
    for b, sample in enumerate(samples):
        for v, volume in enumerate(sample.volumes):
            values[b, v, 0] = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))
            days[b, v] = sample.days[v]
    return Volumes(values, torch.tensor([len(sample.volumes) for sample in samples]), days)


def _images(samples: Sequence[Sample]) -> Images | None:
    arrays = [sample.image for sample in samples if sample.image is not None]
    if not arrays:
        return None
    shape = _same_shape(arrays, "images")
    values = torch.zeros(len(samples), *(shape if len(shape) == 3 else (1, *shape)))
    for b, sample in enumerate(samples):
        if sample.image is not None:
            values[b] = torch.from_numpy(np.ascontiguousarray(sample.image, dtype=np.float32))
    return Images(values, torch.tensor([sample.image is not None for sample in samples]))


def _audio(samples: Sequence[Sample]) -> Audio | None:
    longest = max((len(sound) for sample in samples for sound in sample.audio if sound is not None), default=0)
    if longest == 0:
        return None
    sites = len(ontology.SOUND_SITES)
    values = torch.zeros(len(samples), sites, longest)
    lengths = torch.zeros(len(samples), sites, dtype=torch.long)
    for b, sample in enumerate(samples):
        if len(sample.audio) not in (0, sites):
            raise ValueError(
                f"audio must have {sites} sites ({', '.join(ontology.SOUND_SITES)}), got {len(sample.audio)}"
            )
        for s, sound in enumerate(sample.audio):
            if sound is not None:
                values[b, s, : len(sound)] = torch.from_numpy(np.ascontiguousarray(sound, dtype=np.float32))
                lengths[b, s] = len(sound)
    return Audio(values, lengths)


def _records(samples: Sequence[Sample], tokenizer: Tokenizer | None, max_words: int) -> Records | None:
    if all(sample.record is None for sample in samples):
        return None
    values = torch.zeros(len(samples), len(ontology.MEASUREMENTS))
    known = torch.zeros(len(samples), len(ontology.MEASUREMENTS), dtype=torch.bool)
    words: list[list[int]] = []
    for b, sample in enumerate(samples):
        measured = {} if sample.record is None else sample.record.values
        for name, value in measured.items():
            values[b, ontology.MEASUREMENT_INDEX[name]] = value
            known[b, ontology.MEASUREMENT_INDEX[name]] = True
        text = "" if sample.record is None else sample.record.words
        words.append([] if tokenizer is None else tokenizer.encode(text)[:max_words])
    present = torch.tensor([sample.record is not None for sample in samples])
    return Records(values, known, Padded.of(words), present)


# -------------------------------------------------------------------------------------------------- text


def _texts(
    samples: Sequence[Sample], tokenizer: Tokenizer | None, rows: tuple[Rows, ...], max_text: int
) -> Padded | None:
    if tokenizer is None:
        return None
    # A text tower with words of its own reads a question and its answer in them; the decoder's ids mean nothing to it.
    asked = tokenizer.texts is not None and "questions" in rows
    whole = [sample.text or (_first_answer(sample) if asked else "") for sample in samples]
    if not any(whole):
        return None
    return Padded.of([tokenizer.encode_whole(text, max_text) if text else [] for text in whole])


def _first_answer(sample: Sample) -> str:
    return next((f"{item.question} {item.answer}" for item in sample.questions), "")


def _writing(samples: Sequence[Sample], tokenizer: Tokenizer, rows: tuple[Rows, ...], max_text: int) -> Writing | None:
    study: list[int] = []
    slots: list[tuple[int, int, int, int, int]] = []
    prompts: list[list[int]] = []
    targets: list[list[int]] = []
    asked: list[list[int]] = []
    for b, sample in enumerate(samples):
        if "report" in rows:
            findings = () if sample.truth is None else sample.truth.findings
            for sentence in sample.report:
                study.append(b)
                about = None if sentence.finding is None else findings[sentence.finding]
                if about is not None and not sentence.measured:
                    about = replace(about, size=None)
                slots.append(slot(sentence.kind, about))
                prompts.append(tokenizer.prompt(sample.language))
                targets.append(tokenizer.target(sentence.text))
                asked.append([])
        if "questions" in rows:
            for question in sample.questions:
                study.append(b)
                slots.append(slot("answer", None))
                prompts.append(tokenizer.prompt(sample.language, question.question))
                # An answer is a user's text: what looks like a placeholder in it is none.
                targets.append([*tokenizer.encode(question.answer), SPECIAL_IDS.end])
                asked.append([] if tokenizer.texts is None else tokenizer.encode_whole(question.question, max_text))
        if "caption" in rows:
            study.append(b)
            slots.append(slot("impression", None))
            instruction = DESCRIBE[sample.language]
            prompts.append(tokenizer.prompt(sample.language, instruction))
            # One that is cut has no end. Without a text the row asks for one.
            targets.append([*tokenizer.encode(sample.text), SPECIAL_IDS.end][:max_text])
            asked.append([] if tokenizer.texts is None else tokenizer.encode_whole(instruction, max_text))
    if not study:
        return None
    columns = torch.tensor(slots, dtype=torch.long).unbind(1)
    return Writing(
        torch.tensor(study),
        Slots(*columns),
        Padded.of(prompts),
        Padded.of(targets),
        None if tokenizer.texts is None else Padded.of(asked),
    )


# ------------------------------------------------------------------------------------------------- truth


def _targets(truths: Sequence[Truth | None]) -> Targets | None:
    known = [truth for truth in truths if truth is not None]
    if len(known) < len(truths):
        return None
    present = torch.zeros(len(known), NUM_FINDINGS, dtype=torch.bool)
    change = torch.zeros(len(known), NUM_FINDINGS, dtype=torch.long)
    for b, truth in enumerate(known):
        for finding in truth.findings:
            k = ontology.INDEX[finding.code]
            present[b, k] |= finding.present
            change[b, k] = ontology.CHANGES.index(finding.change)
    bits, count, centers, sizes, sides = _volume_targets(known)
    image_bits, image_count, image_centers, image_sides = _image_targets(known)
    return Targets(
        present=present,
        change=change,
        volume_bits=bits,
        count=count,
        centers=centers,
        sizes=sizes,
        sides=sides,
        image_bits=image_bits,
        image_count=image_count,
        image_centers=image_centers,
        image_sides=image_sides,
    )


def _volume_targets(
    truths: Sequence[Truth],
) -> tuple[Tensor, Tensor, Float[Tensor, "B V K I 3"], Float[Tensor, "B V K I"], Tensor] | tuple[None, ...]:
    arrays = [visit.bits for truth in truths for visit in truth.visits]
    if not arrays:
        return None, None, None, None, None
    shape = _same_shape(arrays, "masks")
    visits = max(len(truth.visits) for truth in truths)
    B, K, instances = len(truths), NUM_FINDINGS, ontology.MAX_INSTANCES
    bits = torch.zeros(B, visits, *shape, dtype=torch.int16)
    count = torch.zeros(B, visits, K, dtype=torch.long)
    centers = torch.zeros(B, visits, K, instances, 3)
    sizes = torch.zeros(B, visits, K, instances)
    sides = torch.zeros(B, visits, K, instances, dtype=torch.long)
    for b, truth in enumerate(truths):
        for v, visit in enumerate(truth.visits):
            bits[b, v] = torch.from_numpy(visit.bits.astype(np.int16))
            for finding, center in zip(visit.findings, visit.centers, strict=True):
                k = ontology.INDEX[finding.code]
                i = int(count[b, v, k])
                if center is None or not finding.present or i == instances:
                    continue
                centers[b, v, k, i] = torch.tensor(center)
                # 0 stands for no size: no measure's range begins there but emphysema's, which is never positive at 0.
                sizes[b, v, k, i] = 0.0 if finding.size is None else finding.size
                sides[b, v, k, i] = ontology.SIDES.index(finding.side)
                count[b, v, k] += 1
    return bits, count, centers, sizes, sides


def _image_targets(truths: Sequence[Truth]) -> tuple[Tensor, Tensor, Tensor, Tensor] | tuple[None, ...]:
    arrays = [truth.image_bits for truth in truths if truth.image_bits is not None]
    if not arrays:
        return None, None, None, None
    B, K, instances = len(truths), NUM_FINDINGS, ontology.MAX_INSTANCES
    bits = torch.zeros(B, *_same_shape(arrays, "image masks"), dtype=torch.int16)
    count = torch.zeros(B, K, dtype=torch.long)
    centers = torch.zeros(B, K, instances, 2)
    sides = torch.zeros(B, K, instances, dtype=torch.long)
    for b, truth in enumerate(truths):
        if truth.image_bits is None:
            continue
        bits[b] = torch.from_numpy(truth.image_bits.astype(np.int16))
        for finding, center in zip(truth.findings, truth.image_centers, strict=True):
            k = ontology.INDEX[finding.code]
            i = int(count[b, k])
            if center is None or not finding.present or i == instances:
                continue
            centers[b, k, i] = torch.tensor(center)
            sides[b, k, i] = ontology.SIDES.index(finding.side)
            count[b, k] += 1
    return bits, count, centers, sides
