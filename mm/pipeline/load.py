"""Stages that load: selection rules are theirs, spacing, size and sound rate are the checkpoint's."""

import json
import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import numpy as np
import soundfile
import torch
import torchaudio.functional
from jaxtyping import Float

from mm import ontology
from mm.data.record import parse_record
from mm.dicom.errors import DicomError, QualityError
from mm.dicom.image import read_image
from mm.dicom.instance import Instance
from mm.dicom.quality import CHEST, Quality, image_quality, names_chest, volume_quality
from mm.dicom.resample import fit_image, resample
from mm.dicom.scan import Series, Study
from mm.dicom.volume import Volume, read_volume
from mm.pipeline.case import Case, InputError, Inputs, LoadedImage, LoadedVolume, Sealed, Source
from mm.pipeline.stage import Stage
from mm.report.evidence import Stack
from mm.report.schema import SeriesUsed

logger = logging.getLogger(__name__)

Policy = Literal["warn", "fail"]
"""What becomes of a series that `mm.dicom.quality` flags: a warning, or the same as of one that can't be read."""
FRONTAL: Final = {"PA": 0, "AP": 0}
"""ViewPosition by preference; any other comes behind."""
LATERAL: Final = ("LL", "RL", "LATERAL", "LAT")
SOUND_RATES: Final = (4000, 192000)
MAX_RATIO: Final = 1024
"""Largest denominator between two sound rates: the resampler's filters take memory with its square."""


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
        shown = replace(volume, sop_instance_uids=tuple(map(source.pseudonyms.instance, volume.sop_instance_uids)))
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
        image = replace(image, sop_instance_uid=source.pseudonyms.instance(image.sop_instance_uid))
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


# ------------------------------------------------------------------------------------------------- rules


def best_volume(study: Study, modality: str, min_slices: int) -> Series | None:
    """The series of a study that the rules of `LoadVolume` pick, or None.

    A refused one is taken where there is no other: reading it then says why.
    """
    fitting = [
        item
        for item in study.series
        if item.kind == "volume" and item.modality == modality and item.num_slices >= min_slices and of_chest(item)
    ]
    return max(
        fitting,
        key=lambda item: (
            item.refused is None,
            item.body_part.upper().startswith(CHEST),
            item.num_slices,
            item.series_instance_uid,
        ),
        default=None,
    )


def _passed_over(study: Study, used: Series) -> str | None:
    """Why another series of the kind that is used was no choice: it has lost a file."""
    broken = [item for item in study.series if item.modality == used.modality and item.refused == "broken_slice"]
    return broken[0].refused if broken else None


def of_chest(series: Series) -> bool:
    """False where BodyPartExamined names another region; where it names none anything may be seen."""
    return names_chest(series.body_part)


def _passed(quality: Quality, policy: Policy) -> Quality:
    """The record, where the policy lets it pass.

    Raises:
        QualityError: `low_quality`, with the codes.
    """
    if policy == "fail" and quality.faults:
        raise QualityError("low_quality", ", ".join(quality.faults))
    return quality


def is_lateral(instance: Instance) -> bool:
    """True for a side view, by ViewPosition or by rows that run from front to back (PatientOrientation)."""
    rows = instance.patient_orientation[0][:1] if len(instance.patient_orientation) == 2 else ""
    return instance.view.upper() in LATERAL or rows in ("A", "P")


def best_image(study: Study, modalities: tuple[str, ...]) -> tuple[Series, int] | None:
    """The radiograph of a study, as series and index in it, or None: a frontal one first, a lateral one never."""
    fitting = [
        (item.refused is not None, FRONTAL.get(instance.view.upper(), 1), modalities.index(item.modality), item, index)
        for item in study.series
        if item.kind == "image" and item.modality in modalities and of_chest(item)
        for index, instance in enumerate(item.instances)
        if not is_lateral(instance)
    ]
    best = min(fitting, key=lambda choice: (*choice[:3], choice[3].series_instance_uid, choice[4]), default=None)
    return None if best is None else best[3:]


def sound_files(source: Source) -> dict[str, Path]:
    """Sound file by site: `--context` first, then fixed names beside the series."""
    if source.row is not None and source.row.audio:
        return dict(source.row.audio)
    places = ((site, folder / f"sound_{site}.wav") for folder in source.folders for site in ontology.SOUND_SITES)
    found: dict[str, Path] = {}
    for site, path in places:
        if site not in found and path.is_file():
            found[site] = path
    return found


def record_file(source: Source) -> Path | None:
    """The file that holds a study's record, or None."""
    if source.row is not None and source.row.record is not None:
        return source.row.record if isinstance(source.row.record, Path) else None
    return next((folder / "record.json" for folder in source.folders if (folder / "record.json").is_file()), None)


def record_content(source: Source) -> dict[str, Any] | None:
    """A study's record as JSON, or None.

    Raises:
        InputError: The file can't be read, or holds no JSON object.
    """
    if source.row is not None and isinstance(source.row.record, dict):
        return source.row.record
    path = record_file(source)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: text, JSON, or digits without end
        raise InputError("record_unreadable") from error
    if not isinstance(content, dict):
        raise InputError("record_layout")
    return content


def read_sound(path: Path, *, rate: int, max_seconds: float) -> Float[np.ndarray, " T"]:
    """A sound file as mono float32 at `rate`.

    Raises:
        InputError: The file can't be read, is empty, has a rate outside 4000 to 192000 Hz or samples that are no
            numbers.
    """
    try:
        with soundfile.SoundFile(path) as file:
            given = file.samplerate
            if not SOUND_RATES[0] <= given <= SOUND_RATES[1]:
                raise InputError("audio_rate")
            stored = file.read(int(max_seconds * given), dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise InputError("audio_unreadable") from error
    if len(stored) == 0:
        raise InputError("audio_empty")
    if not np.isfinite(stored).all():
        raise InputError("audio_not_finite")
    mono: Float[np.ndarray, " T"] = stored.mean(axis=1, dtype=np.float32)
    if given != rate:
        # 44101 Hz has no divisor in common with 8000 Hz; a ratio of small numbers is off by 1 in 2000 at most.
        ratio = Fraction(rate, given).limit_denominator(MAX_RATIO)
        mono = torchaudio.functional.resample(torch.from_numpy(mono), ratio.denominator, ratio.numerator).numpy()
    return mono


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
