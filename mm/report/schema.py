"""What a report says: the fields of report.json as dataclasses (docs/report_json.md tells them one by one).

Everything here is pseudonymous. `Report.evidence` holds pixels for people and stays out of report.json.
"""

from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import UInt8

from mm.batch import Language, SlotKind
from mm.dicom.quality import Quality

SCHEMA: Final = "mm-report/1"

NOTICE: Final[dict[Language, str]] = {
    "en": "Research software, not a medical device. Do not use this report for diagnosis or treatment.",
    "zh": "本软件仅供研究使用，不是医疗器械。不得将本报告用于诊断或治疗。",
}

InputName = Literal["volume", "priors", "image", "audio", "record"]
INPUTS: Final[tuple[InputName, ...]] = ("volume", "priors", "image", "audio", "record")

Role = Literal["volume", "prior", "image"]
Kind = Literal["demonstration", "trained"]
Domain = Literal["inside", "outside"]


@dataclass(frozen=True)
class SeriesUsed:
    """A series that was read, by its acquisition facts.

    Attributes:
        role: What it served as.
        modality: DICOM modality, for example CT or DX.
        num_slices: Slices stacked to the volume; 1 for a radiograph.
        spacing_mm: Slice, row and column distance for a volume; row and column for a radiograph; None if not given.
        manufacturer: As the header says.
        units: "HU" or "arbitrary".
        days_before: How long before the current study, 0 for the current one.
        quality: What the quality guard says of it.
    """

    role: Role
    modality: str
    num_slices: int
    spacing_mm: tuple[float, ...] | None
    manufacturer: str
    units: str
    days_before: int = 0
    quality: Quality = field(default_factory=Quality)


@dataclass(frozen=True)
class InputUsed:
    """Whether one kind of input was there.

    Attributes:
        name: Kind of input.
        used: True where the model saw it.
        reason: Why not, or why not all, as a stable word ("absent", "no_earlier_study", "not_in_pipeline", or the
            reason code of a prior that can't be read), or None.
        count: Volumes, priors, images, sounds, or known measurements.
        detail: Sound sites, measurements as "name value unit"; empty otherwise.
    """

    name: InputName
    used: bool
    reason: str | None = None
    count: int = 0
    detail: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelIdentity:
    """Who wrote the report.

    Attributes:
        name: On the checkpoint's card.
        kind: "demonstration" where the card says so.
        sha256: Over all files of the checkpoint.
        ontology: SHA-256 of the findings it was trained on.
        domain: "outside" where a demonstration model reads anything else than the phantoms it knows.
    """

    name: str
    kind: Kind
    sha256: str
    ontology: str
    domain: Domain


@dataclass(frozen=True)
class Size:
    """A number and its unit; the unit of a ratio is empty."""

    value: float
    unit: str


@dataclass(frozen=True)
class ReportedFinding:
    """One instance of a finding, or the row that says that a finding is absent.

    Attributes:
        code: Of the ontology.
        present: Probability at or above the sealed threshold.
        probability: Calibrated; of this code in this study, the same for all its instances.
        side: The patient's side: "left", "right" or "none".
        center_mm: Patient LPS (x, y, z) as the scanner counts, or None without a place in the volume.
        size: How large, in the unit of the finding's measure, or None.
        size_mm: The number again where the unit is mm, else None.
        grade: "none", "small", "moderate" or "large".
        change: Against the last prior.
        slice_index: Of the key slice in the stored volume, from 0 in the order of the slice normal, or None.
        sop_instance_uid: Pseudonym of the instance that shows it (key slice, else radiograph), or None.
        image_pixel: (row, column) on the stored radiograph, or None.
        sources: Inputs of this study that can show it; empty where it wasn't assessed, for none does or the model
            hasn't learnt it.
        frame_number: Which frame of the instance the key slice is, from 1; None where instances hold one.
    """

    code: str
    present: bool
    probability: float
    side: str
    center_mm: tuple[float, float, float] | None
    size: Size | None
    size_mm: float | None
    grade: str
    change: str
    slice_index: int | None
    sop_instance_uid: str | None
    image_pixel: tuple[float, float] | None
    sources: tuple[str, ...]
    frame_number: int | None = None


@dataclass(frozen=True)
class ReportedSentence:
    """One sentence, its numbers and sides copied from the finding that it is about.

    Attributes:
        language: "en" or "zh".
        kind: "finding", "normal", "comparison" or "impression".
        text: Ready to read.
        finding: Index into the report's findings, or None.
        log_probability: Of the words, as the decoder wrote them.
    """

    language: Language
    kind: SlotKind
    text: str
    finding: int | None
    log_probability: float


@dataclass(frozen=True)
class KeyImage:
    """What a reader looks at to check a finding; drawn by the HTML writer, not part of report.json.

    Attributes:
        finding: Index into the report's findings.
        pixels: Windowed, 0 to 255, turned as a radiologist expects (patient's right on the left).
        center: (row, column) of the ring, or None where the whole picture is meant.
        radius: Of the ring, pixels.
        mm_per_pixel: Of the picture (square pixels), or None.
        window: Name of the window, for example "lung".
        level: Centre and width in HU, or None.
        place: (index from 1, number of slices) of a volume's slice, or None for a radiograph.
        edges: Patient directions at the left, right, top and bottom edge ("R", "L", "A", "P", "H", "F" or "").
    """

    finding: int
    pixels: UInt8[np.ndarray, "Y X"]
    center: tuple[float, float] | None
    radius: float
    mm_per_pixel: float | None
    window: str
    level: tuple[int, int] | None
    place: tuple[int, int] | None
    edges: tuple[str, str, str, str]


@dataclass(frozen=True)
class Report:
    """One study's report. Its first fields are report.json's, in that order.

    Raises:
        ValueError: A sentence or key image names a finding that isn't there.
    """

    study: str
    model: ModelIdentity
    series: tuple[SeriesUsed, ...]
    inputs: tuple[InputUsed, ...]
    findings: tuple[ReportedFinding, ...]
    sentences: tuple[ReportedSentence, ...]
    evidence: tuple[KeyImage, ...] = ()

    def __post_init__(self) -> None:
        named = [item.finding for item in self.sentences] + [item.finding for item in self.evidence]
        for index in named:
            if index is not None and not 0 <= index < len(self.findings):
                raise ValueError(f"finding {index} is named, but there are {len(self.findings)}")

    @property
    def languages(self) -> tuple[Language, ...]:
        """Languages of the sentences, in their order."""
        return tuple(dict.fromkeys(sentence.language for sentence in self.sentences))

    @property
    def days_to_prior(self) -> int | None:
        """How long before the current study the last prior was made."""
        return min((item.days_before for item in self.series if item.role == "prior"), default=None)

    def text(self, language: Language) -> str:
        """The running text in one language."""
        words = [sentence.text for sentence in self.sentences if sentence.language == language]
        return (" " if language == "en" else "").join(words)


Json = dict[str, Any]
"""A JSON object: the one place where a free type is right."""
