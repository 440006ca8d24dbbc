"""Stages that load: which series is theirs to say (`mm.pipeline.choose`), spacing, size and rate the checkpoint's."""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float

from mm import ontology
from mm.data.record import parse_record
from mm.dicom.errors import DicomError, QualityError
from mm.dicom.image import read_image
from mm.dicom.quality import Quality, image_quality, volume_quality
from mm.dicom.resample import fit_image, resample
from mm.dicom.scan import Series, Study
from mm.dicom.volume import Volume, read_volume
from mm.pipeline.attached import read_sound, record_content, sound_files
from mm.pipeline.case import Case, InputError, Inputs, LoadedImage, LoadedVolume, Sealed, Source
from mm.pipeline.choose import best_image, best_volume
from mm.pipeline.stage import Stage
from mm.report.evidence import Stack
from mm.report.schema import SeriesUsed

logger = logging.getLogger(__name__)

Policy = Literal["warn", "fail"]
"""What becomes of a series that `mm.dicom.quality` flags: a warning, or the same as of one that can't be read."""


class LoadStage(Stage):
    """A stage that treats each case alone."""

    def process(self, cases: Sequence[Case]) -> list[Case]:
        """Loads into each case, and warns of what the quality guard flags."""
        loaded = []
        for case in cases:
            inputs = self.load(case.source, case.sealed, case.inputs)
            for item in inputs.series[len(case.inputs.series) :]:
                if item.quality.faults:
                    logger.warning("study %s, %s: quality: %s", case.study, item.role, ", ".join(item.quality.faults))
            loaded.append(replace(case, inputs=inputs))
        return loaded

    @abstractmethod
    def load(self, source: Source, sealed: Sealed, inputs: Inputs) -> Inputs:
        """The inputs with what this stage adds."""


class LoadVolume(LoadStage):
    """Reads the best volume of a study: one of the chest before others, then the one with the most slices.

    Args:
        modality: DICOM modality of the series, for example CT.
        min_slices: Series with fewer slices (localisers, thick reformats) are passed over.
        quality: What becomes of a volume that the quality guard flags.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"volume"})

    def __init__(self, *, modality: str = "CT", min_slices: int = 16, quality: Policy = "warn") -> None:
        if min_slices < 1:
            raise ValueError(f"min_slices must be 1 or more, got {min_slices}")
        self.quality = quality
        self.modality = modality
        self.min_slices = min_slices

    def accepts(self, study: Study) -> bool:
        """True where a series passes the rules."""
        return best_volume(study, self.modality, self.min_slices) is not None

    def describe(self) -> str:
        """The rules in words."""
        return f"a {self.modality} series of the chest of at least {self.min_slices} slices"

    def load(self, source: Source, sealed: Sealed, inputs: Inputs) -> Inputs:
        """Adds the current volume, if the study has one."""
        series = best_volume(source.study, self.modality, self.min_slices)
        if series is None:
            return inputs.tell("volume", count=0)
        try:
            volume = read_volume(series)
            quality = _passed(volume_quality(series, volume), self.quality)
        except DicomError as error:
            return inputs.lack("volume", error)
        shown = replace(volume, sop_instance_uids=tuple(map(source.keys.instance, volume.sop_instance_uids)))
        loaded = LoadedVolume(resample(shown, sealed.grid), 0, Stack.of(shown))
        return replace(
            inputs, volumes=(loaded,), series=(*inputs.series, _facts(series, volume, quality, role="volume", days=0))
        ).tell("volume", count=1, reason=_passed_over(source.study, series))


class LoadPriors(LoadStage):
    """Reads earlier studies of the same PatientID in the same input, or those that `--context` names.

    A prior that can't be read is left out, and the report says so; its own report names the reason.

    Args:
        max_priors: The most recent so many.
        modality: As in LoadVolume.
        min_slices: As in LoadVolume.
        quality: As in LoadVolume.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"volume"})
    provides: ClassVar[frozenset[str]] = frozenset({"priors"})

    def __init__(
        self, *, max_priors: int = 3, modality: str = "CT", min_slices: int = 16, quality: Policy = "warn"
    ) -> None:
        if max_priors < 1:
            raise ValueError(f"max_priors must be 1 or more, got {max_priors}")
        self.quality = quality
        self.max_priors = max_priors
        self.modality = modality
        self.min_slices = min_slices

    def load(self, source: Source, sealed: Sealed, inputs: Inputs) -> Inputs:
        """Adds the priors, where there is a current volume to compare with them."""
        if not inputs.volumes:
            return inputs.tell("priors", count=0)
        volumes, series, reason = list(inputs.volumes), list(inputs.series), None
        for prior in source.priors:
            chosen = best_volume(prior.study, self.modality, self.min_slices)
            if chosen is None:
                continue
            if len(volumes) > self.max_priors:
                break
            try:
                volume = read_volume(chosen)
                quality = _passed(volume_quality(chosen, volume), self.quality)
            except DicomError as error:
                reason = error.reason
                continue
            volumes.append(LoadedVolume(resample(volume, sealed.grid), prior.days, None))
            series.append(_facts(chosen, volume, quality, role="prior", days=prior.days))
        told = replace(inputs, volumes=tuple(volumes), series=tuple(series))
        count = len(volumes) - 1
        return told.tell("priors", count=count, reason=reason or (None if count else "no_earlier_study"))


class LoadImage(LoadStage):
    """Reads a study's radiograph, a frontal one before others; a lateral one is never read.

    Args:
        modalities: DICOM modalities, in order of preference.
        quality: As in LoadVolume.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"image"})

    def __init__(self, *, modalities: tuple[str, ...] = ("DX", "CR"), quality: Policy = "warn") -> None:
        if not modalities:
            raise ValueError("modalities must name at least one, for example DX")
        self.quality = quality
        self.modalities = modalities

    def accepts(self, study: Study) -> bool:
        """True where there is a series of one of the modalities."""
        return best_image(study, self.modalities) is not None

    def describe(self) -> str:
        """The rule in words."""
        return f"a {' or '.join(self.modalities)} image of the chest that is not lateral"

    def load(self, source: Source, sealed: Sealed, inputs: Inputs) -> Inputs:
        """Adds the radiograph, if the study has one."""
        chosen = best_image(source.study, self.modalities)
        if chosen is None:
            return inputs.tell("image", count=0)
        series, index = chosen
        try:
            image = read_image(series, index)
            quality = _passed(image_quality(series, index), self.quality)
        except DicomError as error:
            return inputs.lack("image", error)
        image = replace(image, sop_instance_uid=source.keys.instance(image.sop_instance_uid))
        spacing = None if image.spacing_mm is None else tuple(round(step, 4) for step in image.spacing_mm)
        facts = SeriesUsed("image", series.modality, 1, spacing, series.manufacturer, "arbitrary", quality=quality)
        loaded = LoadedImage(image, fit_image(image, sealed.image_size))
        return replace(inputs, image=loaded, series=(*inputs.series, facts)).tell("image", count=1)


class LoadAudio(LoadStage):
    """Reads chest sounds: `sound_<site>.wav` beside the series, or the files that `--context` names.

    Args:
        max_seconds: Longer recordings are cut.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"audio"})

    def __init__(self, *, max_seconds: float = 30.0) -> None:
        if max_seconds <= 0:
            raise ValueError(f"max_seconds must be positive, got {max_seconds}")
        self.max_seconds = max_seconds

    def load(self, source: Source, sealed: Sealed, inputs: Inputs) -> Inputs:
        """Adds one sound a site; sites without a file, or with one that can't be used, are None."""
        files, reason = sound_files(source), None
        sounds: dict[str, Float[np.ndarray, " T"]] = {}
        for site in ontology.SOUND_SITES:
            if site in files:
                try:
                    sounds[site] = read_sound(files[site], rate=sealed.sound_rate, max_seconds=self.max_seconds)
                except InputError as error:
                    reason = error.reason
        told = inputs.tell("audio", count=len(sounds), reason=reason, detail=tuple(sounds))
        return replace(told, audio=tuple(map(sounds.get, ontology.SOUND_SITES)) if sounds else ())


class LoadRecord(LoadStage):
    """Reads the clinical record: `record.json` beside the series, or what `--context` holds or names."""

    provides: ClassVar[frozenset[str]] = frozenset({"record"})

    def load(self, source: Source, sealed: Sealed, inputs: Inputs) -> Inputs:  # noqa: ARG002
        """Adds the record, if there is one that can be used."""
        try:
            content = record_content(source)
            if content is None:
                return inputs.tell("record", count=0)
            record = parse_record(content)
        except InputError as error:
            return inputs.tell("record", count=0, reason=error.reason)
        except ValueError:
            return inputs.tell("record", count=0, reason="record_layout")
        detail = tuple(
            f"{item.name} {_short(record.values[item.name])} {item.unit}"
            for item in ontology.MEASUREMENTS
            if item.name in record.values and item.name != "age"  # a very old age can tell who it is
        )
        known = len(record.values) or int(bool(record.words))
        return replace(inputs, record=record if known else None).tell("record", count=known, detail=detail)


def _passed_over(study: Study, used: Series) -> str | None:
    """Why another series of the kind that is used was no choice: it has lost a file."""
    broken = [item for item in study.series if item.modality == used.modality and item.refused == "broken_slice"]
    return broken[0].refused if broken else None


def _passed(quality: Quality, policy: Policy) -> Quality:
    """The record, where the policy lets it pass.

    Raises:
        QualityError: `low_quality`, with the codes.
    """
    if policy == "fail" and quality.faults:
        raise QualityError("low_quality", ", ".join(quality.faults))
    return quality


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _facts(series: Series, volume: Volume, quality: Quality, *, role: str, days: int) -> SeriesUsed:
    return SeriesUsed(
        role="prior" if role == "prior" else "volume",
        modality=series.modality,
        num_slices=volume.shape[0],
        spacing_mm=tuple(round(step, 4) for step in volume.spacing_mm),
        manufacturer=series.manufacturer,
        units=volume.units,
        days_before=days,
        quality=quality,
    )
