"""The stage that lets the model write, and what it says put back into the patient's millimetres."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

import torch

import mm
from mm import ontology
from mm.batch import DetectedFinding, GeneratedReport, Language, Sample
from mm.decoder.generate import Sampling
from mm.dicom.resample import unfit_point
from mm.pipeline.case import Case, Sealed
from mm.pipeline.stage import Stage
from mm.report.evidence import key_radiograph, key_slice, ring_mm
from mm.report.schema import Domain, KeyImage, ModelIdentity, Report, ReportedFinding, ReportedSentence, Size
from mm.report.text import fill

if TYPE_CHECKING:
    from mm.training.checkpoint import Loaded

LANGUAGES: Final[tuple[Language, ...]] = ("en", "zh")
SIZE_DECIMALS: Final = 3


class GenerateReport(Stage):
    """Detects findings and writes the sentences.

    Args:
        checkpoint: A checkpoint folder, or the name of a shipped one.
        batch_size: Studies that go through the model together. Batches are cut from the whole input in a
            fixed order, whether some are finished already or not: a rerun repeats the same arithmetic.
        languages: Of the sentences; the first is the one the page opens in.
        samples: Drawn for each sentence, of which the one that agrees most with the others is kept. 1: the sentence
            is written greedily. What is drawn depends on what is found alone, so that reports can be repeated.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"volume", "image"})
    provides: ClassVar[frozenset[str]] = frozenset({"report"})

    def __init__(
        self,
        *,
        checkpoint: str | Path = "default",
        batch_size: int = 4,
        languages: tuple[Language, ...] = LANGUAGES,
        samples: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if samples < 1:
            raise ValueError(f"samples must be 1 or more, got {samples}")
        if not languages or len(set(languages)) < len(languages):
            raise ValueError(f"languages must name each of {', '.join(LANGUAGES)} at most once, got {languages}")
        self.checkpoint = checkpoint
        self.batch_size = batch_size
        self.languages = languages
        self.samples = samples

    @cached_property
    def loaded(self) -> "Loaded":
        """The checkpoint, opened at first use.

        Raises:
            ValueError: It is missing, or of another version.
        """
        return mm.load(self.checkpoint)

    @property
    def sealed(self) -> Sealed:
        """The preprocessing that earlier stages must follow."""
        kept = self.loaded.preprocessing
        return Sealed(kept.volume_grid, kept.image_size, kept.sound_rate)

    def process(self, cases: Sequence[Case]) -> list[Case]:
        """Writes the report of every case, all in one batch."""
        from mm.data.collate import collate

        kept = self.loaded.preprocessing
        samples = [to_sample(case) for case in cases]
        batch = collate(samples, self.loaded.tokenizer, rows=(), max_words=kept.max_words, max_text=kept.max_text)
        sampling = Sampling.consensus_of(self.samples)
        with torch.inference_mode():
            reading = self.loaded.model.read(batch)
            written = [
                self.loaded.model.write(reading, tokenizer=self.loaded.tokenizer, language=language, sampling=sampling)
                for language in self.languages
            ]
        return [
            replace(case, result=self._report(case, [reports[index] for reports in written]))
            for index, case in enumerate(cases)
        ]

    def _report(self, case: Case, generated: list[GeneratedReport]) -> Report:
        unlearnt = self._unlearnt
        detected = [
            _rounded(replace(item, change="unknown") if item.code in unlearnt else _told_side(item, case))
            for item in generated[0].findings
        ]
        findings = tuple(locate(item, case, learnt=item.code not in unlearnt) for item in detected)
        days = min((float(item.days) for item in case.inputs.volumes[1:]), default=None)
        sentences = tuple(
            ReportedSentence(
                language=report.language,
                kind=sentence.kind,
                text=_readable(
                    fill(
                        sentence.text,
                        finding=None if sentence.finding is None else detected[sentence.finding],
                        findings=detected,
                        days=days,
                        language=report.language,
                    )
                ),
                finding=sentence.finding,
                log_probability=round(sentence.log_probability, 4),
            )
            for report in generated
            for sentence in report.sentences
        )
        evidence = tuple(
            image for index, item in enumerate(findings) if item.present for image in illustrate(index, item, case)
        )
        return Report(
            study=case.study,
            model=self._identity(case),
            series=case.inputs.series,
            inputs=case.inputs.summary(),
            findings=findings,
            sentences=sentences,
            evidence=evidence,
        )

    @property
    def _unlearnt(self) -> frozenset[str]:
        """Codes that the checkpoint can't tell: their sealed threshold is infinite, so they are never called."""
        head = self.loaded.model.findings
        if head is None:
            return frozenset()
        never = head.threshold.isinf().tolist()
        return frozenset(item.code for item, unlearnt in zip(ontology.FINDINGS, never, strict=True) if unlearnt)

    def _identity(self, case: Case) -> ModelIdentity:
        card = self.loaded.card
        demonstration = card.kind == "demonstration"
        makers = [series.manufacturer.lower() for series in case.inputs.series]
        domain: Domain = "outside" if demonstration and not all("phantom" in maker for maker in makers) else "inside"
        return ModelIdentity(
            name=card.name,
            kind=card.kind,
            sha256=self.loaded.identity.sha256,
            ontology=ontology.digest(),
            domain=domain,
        )


def to_sample(case: Case) -> Sample:
    """The case as the model reads it: pseudonymous, without truth."""
    loaded = case.inputs
    return Sample(
        study=case.study,
        volumes=tuple(item.volume.voxels for item in loaded.volumes),
        days=tuple(float(item.days) for item in loaded.volumes),
        image=None if loaded.image is None else loaded.image.fitted,
        audio=loaded.audio,
        record=loaded.record,
    )


def locate(detected: DetectedFinding, case: Case, *, learnt: bool = True) -> ReportedFinding:
    """A finding with its place in the patient and on the stored slice or radiograph.

    Without sources, as what no input shows, where the model hasn't learnt it.
    """
    measure = ontology.finding(detected.code).measure
    size = detected.size if measure is not None else None
    center, index, uid, frame, pixel = None, None, None, None, None
    current = case.inputs.volumes[0] if case.inputs.volumes else None
    if detected.voxel is not None and current is not None and current.stack is not None:
        x, y, z = current.volume.to_mm(detected.voxel)
        center = (round(x, 1), round(y, 1), round(z, 1))
        index = current.stack.slice_of(center)
        uids = current.stack.sop_instance_uids
        uid = uids[index] if uids else None
        frames = current.stack.frame_numbers
        frame = frames[index] if frames else None
    if detected.pixel is not None and case.inputs.image is not None:
        stored = case.inputs.image.image
        height, width = stored.pixels.shape
        row, column = unfit_point(detected.pixel, (height, width), case.inputs.image.fitted.shape[0])
        pixel = (round(row, 1), round(column, 1))
        uid = uid or stored.sop_instance_uid
    given = set(to_sample(case).inputs())
    return ReportedFinding(
        code=detected.code,
        present=detected.present,
        probability=detected.probability,
        side=detected.side,
        center_mm=center,
        size=None if size is None or measure is None else Size(size, measure.unit),
        size_mm=size if measure is not None and measure.unit == "mm" else None,
        grade=ontology.grade(detected.code, size),
        change=detected.change,
        slice_index=index,
        sop_instance_uid=uid,
        image_pixel=pixel,
        sources=tuple(name for name in ontology.finding(detected.code).sources if name in given and learnt),
        frame_number=frame,
    )


def illustrate(index: int, finding: ReportedFinding, case: Case) -> list[KeyImage]:
    """The key slice and the radiograph of a finding, those that there are."""
    images = []
    radius = ring_mm(finding.code, finding.size)
    stack = case.inputs.volumes[0].stack if case.inputs.volumes else None
    if finding.center_mm is not None and stack is not None:
        images.append(key_slice(stack, finding=index, code=finding.code, center_mm=finding.center_mm, radius_mm=radius))
    if finding.image_pixel is not None and case.inputs.image is not None:
        image = case.inputs.image.image
        images.append(key_radiograph(image, finding=index, pixel=finding.image_pixel, radius_mm=radius))
    return images


def _readable(text: str) -> str:
    """One line; a decoder over bytes can write what no reader should be shown."""
    return " ".join("".join(letter for letter in text if letter.isprintable() or letter.isspace()).split())


def _told_side(detected: DetectedFinding, case: Case) -> DetectedFinding:
    """Without a side where only a radiograph shows the finding and its header doesn't say which side is left."""
    image = case.inputs.image
    if image is None or image.image.oriented or detected.pixel is None:
        return detected
    if detected.voxel is None:
        return replace(detected, side="none")
    # Pictures are paired by side.
    return detected if detected.side == "none" else replace(detected, pixel=None)


def _rounded(detected: DetectedFinding) -> DetectedFinding:
    """What report.json shows is what the sentences are filled from."""
    return replace(
        detected,
        probability=round(detected.probability, 4),
        size=None if detected.size is None else round(detected.size, SIZE_DECIMALS),
    )
