"""Phantom patients as samples, rendered in memory when asked for."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Final, Literal

import numpy as np
import torch.utils.data
from jaxtyping import Float, Int

from mm import ontology
from mm.batch import FindingTruth, Language, Modality, Question, Sample, Sentence, Truth, VisitTruth
from mm.data.record import parse_record
from mm.dicom.resample import (
    IMAGE_GRID,
    MODEL_GRID,
    body_center,
    fit_bits,
    fit_image,
    fit_point,
    resample,
    resample_bits,
)
from mm.dicom.volume import Image, Volume
from mm.phantom import text
from mm.phantom.ct import render_ct
from mm.phantom.instances import Header, dx_stored
from mm.phantom.patient import Patient, draw_patient
from mm.phantom.questions import questions
from mm.phantom.record import render_record
from mm.phantom.sound import render_sounds
from mm.phantom.xray import render_xray

ENGLISH: Final = 0.8
"""Share of the samples whose language is English; the others are Chinese."""
_STREAM: Final = 23
_LANGUAGES: Final[tuple[Language, ...]] = ("en", "zh")
_SOURCES: Final[tuple[Modality, ...]] = ("volume", "image", "audio", "record")


@dataclass(frozen=True)
class Words:
    """What is said of a patient in one language."""

    report: tuple[Sentence, ...]
    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Radiograph:
    """On the image grid: pixels, masks as bit fields, and the pixel index (y, x) of each finding."""

    pixels: Float[np.ndarray, "Y X"] | None
    bits: Int[np.ndarray, "Y X"] | None
    centers: tuple[tuple[float, float] | None, ...]


NO_RADIOGRAPH: Final = Radiograph(None, None, ())


class PhantomDataset(torch.utils.data.Dataset[Sample]):
    """Procedural patients by index; (seed, index) decides everything but the choice of templates.

    Two splits must have different seeds or they hold the same patients. What `mm phantom` writes with the
    same seed are the same patients.
    """

    def __init__(
        self,
        *,
        studies: int,
        seed: int,
        split: Literal["train", "val", "test"],
        priors: int = 1,
        inputs: Sequence[Modality] = _SOURCES,
        every_other: str | None = None,
    ) -> None:
        """Draws nothing yet.

        Args:
            studies: Number of patients, one current study each.
            seed: Of the patients.
            split: "test" also draws the templates that are held out from "train" and "val".
            priors: Earlier volumes rendered for each patient, at most. Without any, nothing has changed
                and nothing is resolved as far as the labels go.
            inputs: The modalities rendered. A finding that none of them shows counts as absent.
            every_other: Code of a finding that patients of an even index have: they are drawn until they do.

        Raises:
            ValueError: `studies` or `priors` is negative, or `inputs` or `every_other` has an unknown name.
        """
        if studies < 0 or priors < 0:
            raise ValueError(f"studies and priors must not be negative, got {studies} and {priors}")
        unknown = [item for item in inputs if item not in _SOURCES]
        if unknown:
            raise ValueError(f"inputs must be among {', '.join(_SOURCES)}; got {', '.join(unknown)}")
        if every_other is not None and every_other not in ontology.CODES:
            raise ValueError(f"every_other must be among {', '.join(ontology.CODES)}; got {every_other!r}")
        self.studies = studies
        self.seed = seed
        self.every_other = every_other
        self.split: Literal["train", "val", "test"] = split
        self.inputs = tuple(inputs)
        self.priors = priors if "volume" in self.inputs else 0

    def __len__(self) -> int:
        return self.studies

    def patient_seed(self, index: int) -> int:
        """The seed of patient `index`."""
        if self.every_other is None or index % 2:
            return patient_seed(self.seed, index)
        seeds = (patient_seed(self.seed, index, drawn=drawn) for drawn in count())
        return next(seed for seed in seeds if self.every_other in draw_patient(seed).present)

    def __getitem__(self, index: int) -> Sample:
        """Renders one patient.

        Raises:
            IndexError: The index is beyond `studies`.
        """
        if not 0 <= index < self.studies:
            raise IndexError(f"index {index} of {self.studies} studies")
        patient = draw_patient(self.patient_seed(index))
        visits = patient.visits[: 1 + self.priors] if "volume" in self.inputs else ()
        days = visits[1].days if len(visits) > 1 else None
        findings = labelled(patient.findings, inputs=self.inputs, compared=days is not None)
        language = language_of(patient)
        said = words(patient, findings, days=days, language=language, split="test" if self.split == "test" else "train")
        scans = [
            visit_sample(
                patient,
                number,
                findings if number == 0 else labelled(visit.findings, inputs=("volume",), compared=False),
            )
            for number, visit in enumerate(visits)
        ]
        radiograph = image_sample(patient, findings) if "image" in self.inputs else NO_RADIOGRAPH
        sounds = render_sounds(patient) if "audio" in self.inputs else {}
        return Sample(
            study=header(patient, 0).study_instance_uid,
            volumes=tuple(voxels for voxels, _ in scans),
            days=tuple(visit.days for visit in visits),
            image=radiograph.pixels,
            audio=tuple(sounds[site] for site in ontology.SOUND_SITES) if sounds else (),
            record=parse_record(render_record(patient)) if "record" in self.inputs else None,
            language=language,
            report=said.report,
            text=said.text,
            questions=said.questions,
            truth=Truth(
                findings,
                tuple(truth for _, truth in scans),
                radiograph.bits,
                radiograph.centers or (None,) * len(findings),
            ),
        )


def patient_seed(seed: int, index: int, *, drawn: int = 0) -> int:
    """The seed of one patient of a set; 48 bits of a hash, so that sets of different seeds don't overlap.

    Args:
        seed: Of the set.
        index: In the set.
        drawn: How many were drawn for this place before, and put back.
    """
    name = f"{seed}/{index}/{drawn}" if drawn else f"{seed}/{index}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def header(patient: Patient, visit: int) -> Header:
    """The identifiers of a visit."""
    return Header.of(seed=patient.seed, visit=visit, days=patient.visits[visit].days, sex=patient.sex, age=patient.age)


def language_of(patient: Patient) -> Language:
    """The language that is spoken of a patient."""
    return "en" if _rng(patient).random() < ENGLISH else "zh"


def labelled(
    findings: Sequence[FindingTruth], *, inputs: Sequence[Modality], compared: bool
) -> tuple[FindingTruth, ...]:
    """The findings that the given inputs can show; without a prior no change is known and none is resolved."""
    shown = [item for item in findings if set(item.sources) & set(inputs)]
    if compared:
        return tuple(shown)
    return tuple(replace(item, change="unknown") for item in shown if item.present)


def words(
    patient: Patient,
    findings: Sequence[FindingTruth],
    *,
    days: float | None,
    language: Language,
    split: text.Split,
) -> Words:
    """Reference report and questions in one language; the questions are the same in both."""
    rng = _rng(patient, 1 + _LANGUAGES.index(language))
    report = text.report(findings, language=language, days=days, split=split, rng=rng)
    asked = questions(findings, rng=_rng(patient, 0))
    return Words(
        report,
        text.filled(report, findings, days=days, language=language),
        tuple(pair.en if language == "en" else pair.zh for pair in asked),
    )


def visit_sample(patient: Patient, visit: int, findings: tuple[FindingTruth, ...]) -> tuple[np.ndarray, VisitTruth]:
    """One CT on the model grid, on the very path that a CT from disk takes, and its truth."""
    rendered = render_ct(patient, visit)
    volume = Volume(rendered.voxels, rendered.affine, "HU")
    center = body_center(volume)
    fitted = resample(volume, MODEL_GRID, center_mm=center)
    bits = resample_bits(rendered.bits, rendered.affine, MODEL_GRID, center_mm=center)
    centers = tuple(None if item.center_mm is None else fitted.to_index(item.center_mm) for item in findings)
    return fitted.voxels, VisitTruth(bits.astype(np.int16), findings, centers)


def image_sample(patient: Patient, findings: Sequence[FindingTruth]) -> Radiograph:
    """The radiograph on the image grid, its masks, and where each finding lies on it."""
    rendered = render_xray(patient)
    image = Image(dx_stored(rendered.pixels).astype(np.float32), rendered.spacing_mm, "", view="PA")
    height, width = rendered.pixels.shape
    centers = tuple(
        None
        if item.image_center_mm is None
        else fit_point(rendered.pixel(item.image_center_mm), (height, width), IMAGE_GRID)
        for item in findings
    )
    return Radiograph(fit_image(image, IMAGE_GRID), fit_bits(rendered.bits, IMAGE_GRID).astype(np.int16), centers)


def _rng(patient: Patient, stream: int = 9) -> np.random.Generator:
    return np.random.default_rng([patient.seed, _STREAM, stream])
