"""The words everybody speaks: one study as a `Sample`, several as a `Batch`, and what networks exchange.

Axes in shapes: B studies, V visits (0 is the current one, then priors, the most recent first), K findings
(order of `mm.ontology.FINDINGS`), I instances, Z Y X voxels (Z to the head, Y to the back, X to the left),
S sound sites (order of `mm.ontology.SOUND_SITES`), T audio samples, R measurements (order of
`mm.ontology.MEASUREMENTS`), N tokens, D width, L text length, M rows of text to write.
All are frozen: a method returns a new one. A modality that no study of a batch has is None.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm import ontology

Modality = Literal["volume", "image", "audio", "record"]
SlotKind = Literal["finding", "normal", "comparison", "impression", "answer"]
SLOT_KINDS: tuple[SlotKind, ...] = ("finding", "normal", "comparison", "impression", "answer")
Language = Literal["en", "zh"]
T = TypeVar("T")


AnyMovable = TypeVar("AnyMovable", bound="Movable")


class Movable:
    """Tensors in dataclass fields, moved together."""

    def to(self: AnyMovable, device: torch.device | str, *, non_blocking: bool = False) -> AnyMovable:
        """The same content with every tensor on `device`."""
        moved = {}
        for item in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, item.name)
            if isinstance(value, Tensor | Movable):
                moved[item.name] = value.to(device, non_blocking=non_blocking)
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class SpecialIds:
    """The ids with a meaning of their own; a constant of the format, the same in every vocabulary.

    Attributes:
        pad: Fills rows on the right.
        end: Ends a sentence or an answer.
        en: First token of an English row.
        zh: First token of a Chinese row.
        slot: Where the decoder adds the embedding of the finding (or of the kind of sentence).
        answer: Behind a question; the answer follows.
        size: Placeholder of the finding's size.
        side: Placeholder of the finding's side.
        days: Placeholder of the days since the prior.
        findings: Placeholder of the list of findings.
    """

    pad: int = 0
    end: int = 1
    en: int = 2
    zh: int = 3
    slot: int = 4
    answer: int = 5
    size: int = 6
    side: int = 7
    days: int = 8
    findings: int = 9

    def language(self, language: Language) -> int:
        """The id that opens a row of this language."""
        return self.en if language == "en" else self.zh


SPECIAL_IDS = SpecialIds()
NUM_SPECIALS = len(fields(SpecialIds))
"""Id NUM_SPECIALS + i is token i of a vocabulary."""


# ---------------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class Tokens(Movable):
    """A padded sequence of vectors; what every encoder returns."""

    values: Float[Tensor, "B N D"]
    mask: Bool[Tensor, "B N"]

    def __post_init__(self) -> None:
        if self.values.shape[:2] != self.mask.shape:
            raise ValueError(f"mask {tuple(self.mask.shape)} does not fit values {tuple(self.values.shape)}")


@dataclass(frozen=True)
class Padded(Movable):
    """Token ids of texts, padded on the right with 0."""

    values: Int[Tensor, "M L"]
    lengths: Int[Tensor, " M"]

    @property
    def mask(self) -> Bool[Tensor, "M L"]:
        """True where a token is real."""
        return torch.arange(self.values.shape[1], device=self.values.device) < self.lengths[:, None]

    def rows(self) -> list[list[int]]:
        """The ids of each text, without padding."""
        return [row[:length] for row, length in zip(self.values.tolist(), self.lengths.tolist(), strict=True)]

    def select(self, rows: Int[Tensor, " R"]) -> "Padded":
        """Some of the texts, as wide as before."""
        return Padded(self.values[rows], self.lengths[rows])

    @classmethod
    def of(cls, rows: list[list[int]]) -> "Padded":
        """Pads lists of ids to the longest."""
        width = max((len(row) for row in rows), default=0)
        values = torch.zeros(len(rows), max(width, 1), dtype=torch.long)
        for index, row in enumerate(rows):
            values[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        return cls(values, torch.tensor([len(row) for row in rows], dtype=torch.long))


@dataclass(frozen=True)
class BySource(Movable, Generic[T]):
    """One thing a modality, each made from that modality alone; None where a batch has no such input."""

    volume: T | None = None
    image: T | None = None
    audio: T | None = None
    record: T | None = None

    def items(self) -> Iterator[tuple[Modality, T]]:
        """Those that are there, in this order."""
        if self.volume is not None:
            yield "volume", self.volume
        if self.image is not None:
            yield "image", self.image
        if self.audio is not None:
            yield "audio", self.audio
        if self.record is not None:
            yield "record", self.record


# ------------------------------------------------------------------------------------------------ inputs


@dataclass(frozen=True)
class Volumes(Movable):
    """CT volumes on the model grid in HU (float32, not windowed: the encoder windows).

    `count` is the number of visits a study has (0: no volume at all), `days` how long before the current
    visit each was made (0 for the current one).
    """

    values: Float[Tensor, "B V 1 Z Y X"]
    count: Int[Tensor, " B"]
    days: Float[Tensor, "B V"]


@dataclass(frozen=True)
class Images(Movable):
    """Radiographs on the model's image grid, 0 (black) to 1 (white: dense tissue), patient's left on the right.

    Of pictures in colour C is 3: red, green, blue.
    """

    values: Float[Tensor, "B C Y X"]
    present: Bool[Tensor, " B"]


@dataclass(frozen=True)
class Audio(Movable):
    """Sounds at `mm.ontology.SOUND_RATE`, -1 to 1; a missing site has length 0."""

    values: Float[Tensor, "B S T"]
    lengths: Int[Tensor, "B S"]


@dataclass(frozen=True)
class Records(Movable):
    """Measurements in canonical units (raw, not standardised: the encoder standardises) and words."""

    values: Float[Tensor, "B R"]
    known: Bool[Tensor, "B R"]
    words: Padded
    present: Bool[Tensor, " B"]


# ------------------------------------------------------------------------------------------------- truth


@dataclass(frozen=True)
class Targets(Movable):
    """What the finding head is trained on.

    Masks are bit fields: bit k of a voxel is set where finding k is. Centres are in voxel indices of the
    model grid (z, y, x) or pixel indices of the image grid (y, x). Sizes are in the finding's own unit.
    `sides` and `change` index `mm.ontology.SIDES` and `CHANGES`. Change 0 (unknown) is not trained on.
    """

    present: Bool[Tensor, "B K"]
    change: Int[Tensor, "B K"]
    volume_bits: Int[Tensor, "B V Z Y X"] | None
    count: Int[Tensor, "B V K"] | None
    centers: Float[Tensor, "B V K I 3"] | None
    sizes: Float[Tensor, "B V K I"] | None
    sides: Int[Tensor, "B V K I"] | None
    image_bits: Int[Tensor, "B rows columns"] | None
    image_count: Int[Tensor, "B K"] | None
    image_centers: Float[Tensor, "B K I 2"] | None
    image_sides: Int[Tensor, "B K I"] | None


@dataclass(frozen=True)
class Slots(Movable):
    """What each row of text is about: the decoder's view of one finding, or of the whole report.

    All five are indices: `kind` into SLOT_KINDS, `code` into ontology.CODES shifted by one (0: none),
    `side`, `change` and `grade` into ontology.SIDES, CHANGES and GRADES.
    """

    kind: Int[Tensor, " M"]
    code: Int[Tensor, " M"]
    side: Int[Tensor, " M"]
    change: Int[Tensor, " M"]
    grade: Int[Tensor, " M"]


@dataclass(frozen=True)
class Writing(Movable):
    """Rows of text to write or to learn: row m belongs to study `study[m]`.

    `prompt` holds language token, slot token and, for a question, its words and the answer token;
    `target` holds the sentence (or answer) and the end token, and is a label only: None when generating.
    `asked` holds each question in the words of a pretrained text tower, None where there is no such tower.
    """

    study: Int[Tensor, " M"]
    slots: Slots
    prompt: Padded
    target: Padded | None
    asked: Padded | None = None

    def select(self, rows: Int[Tensor, " R"]) -> "Writing":
        """Some of the rows; they stay with their studies."""
        return Writing(
            self.study[rows],
            Slots(*(getattr(self.slots, item.name)[rows] for item in fields(Slots))),
            self.prompt.select(rows),
            None if self.target is None else self.target.select(rows),
            None if self.asked is None else self.asked.select(rows),
        )


@dataclass(frozen=True)
class Batch(Movable):
    """Several studies; any input may be None.

    `text` is the whole report for contrastive alignment, empty for a study without one.
    """

    size: int
    volumes: Volumes | None = None
    image: Images | None = None
    audio: Audio | None = None
    record: Records | None = None
    text: Padded | None = None
    writing: Writing | None = None
    targets: Targets | None = None

    def without(self, modality: Modality | Literal["priors"]) -> "Batch":
        """The same studies with one input taken away (for ablations)."""
        if modality == "priors":
            if self.volumes is None:
                return self
            kept = self.volumes
            current = Volumes(kept.values[:, :1], kept.count.clamp(max=1), kept.days[:, :1])
            return replace(self, volumes=current)
        if modality == "volume":
            return replace(self, volumes=None)
        if modality == "image":
            return replace(self, image=None)
        if modality == "audio":
            return replace(self, audio=None)
        return replace(self, record=None)


# ------------------------------------------------------------------------------------------------ sample


@dataclass(frozen=True)
class Record:
    """A clinical record after unit conversion: canonical values by measurement name, and free words."""

    values: dict[str, float]
    words: str


@dataclass(frozen=True)
class FindingTruth:
    """One instance of a finding (or a resolved one), the same names as in report.json.

    Attributes:
        code: Of the ontology.
        present: False only for a finding that a prior shows and the current study doesn't.
        side: Patient's side.
        center_mm: Patient LPS, or None where the finding has no place in the volume.
        image_center_mm: (x, z) patient millimetres on the radiograph, or None where it doesn't show.
        size: In the unit of the finding's measure, or None.
        change: Against the last prior.
        sources: Where it can be seen in this patient.
    """

    code: str
    present: bool
    side: str
    center_mm: tuple[float, float, float] | None
    image_center_mm: tuple[float, float] | None
    size: float | None
    change: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class VisitTruth:
    """Truth of one volume on the model grid."""

    bits: Int[np.ndarray, "Z Y X"]
    findings: tuple[FindingTruth, ...]
    centers: tuple[tuple[float, float, float] | None, ...]
    """Voxel index (z, y, x) on the model grid of each of `findings`."""


@dataclass(frozen=True)
class Truth:
    """Labels of a sample; never an input. `visits` is parallel to the sample's volumes."""

    findings: tuple[FindingTruth, ...]
    visits: tuple[VisitTruth, ...]
    image_bits: Int[np.ndarray, "Y X"] | None
    image_centers: tuple[tuple[float, float] | None, ...]
    """Pixel index (y, x) on the image grid of each of `findings`."""


@dataclass(frozen=True)
class Sentence:
    """One sentence with placeholders (<size>, <side>, <days>, <findings>) and what it is about.

    `finding` is the index into the report's list of findings, or None for kinds that sum up. A sentence that isn't
    `measured` is worded as if nobody knew the finding's size, and says neither size nor grade.
    """

    kind: SlotKind
    text: str
    finding: int | None = None
    measured: bool = True


@dataclass(frozen=True)
class Question:
    """A question on a study and its answer."""

    question: str
    answer: str
    closed: bool
    region: str = ""
    """Part of the body on the image, where the data say it: a label like the answer, never an input."""


@dataclass(frozen=True)
class Sample:
    """One study, by role: inputs, then prompt and target, then truth. Any input may be None."""

    study: str
    volumes: tuple[Float[np.ndarray, "Z Y X"], ...] = ()
    days: tuple[float, ...] = ()
    image: Float[np.ndarray, "rows columns"] | Float[np.ndarray, "3 rows columns"] | None = None
    audio: tuple[Float[np.ndarray, " _"] | None, ...] = ()
    record: Record | None = None
    language: Language = "en"
    report: tuple[Sentence, ...] = ()
    text: str = ""
    """The whole report with its placeholders filled."""
    questions: tuple[Question, ...] = ()
    truth: Truth | None = None

    def __post_init__(self) -> None:
        if len(self.volumes) != len(self.days):
            raise ValueError(f"{len(self.volumes)} volumes but {len(self.days)} days")

    def inputs(self) -> Iterator[Modality]:
        """The modalities this study has."""
        if self.volumes:
            yield "volume"
        if self.image is not None:
            yield "image"
        if any(sound is not None for sound in self.audio):
            yield "audio"
        if self.record is not None:
            yield "record"


# --------------------------------------------------------------------------------------------- generated


@dataclass(frozen=True)
class DetectedFinding:
    """One instance of a finding as the head reports it; the report's sentences copy from here.

    A code that is absent has one row with `present` False; a resolved one says so in `change`.

    Attributes:
        code: Of the ontology.
        present: Probability at or above the sealed threshold.
        probability: Calibrated, of this code in this study (the same for all its instances).
        side: Patient's side.
        voxel: (z, y, x) on the model grid of the current volume, or None.
        pixel: (y, x) on the model's image grid, or None.
        size: In the unit of the finding's measure, or None.
        change: Against the last prior.
    """

    code: str
    present: bool
    probability: float
    side: str
    voxel: tuple[float, float, float] | None
    pixel: tuple[float, float] | None
    size: float | None
    change: str


@dataclass(frozen=True)
class GeneratedSentence:
    """A sentence as the decoder wrote it, placeholders unfilled; `finding` indexes the report's findings."""

    kind: SlotKind
    text: str
    finding: int | None
    log_probability: float


@dataclass(frozen=True)
class GeneratedReport:
    """What the model says of one study in one language."""

    language: Language
    findings: tuple[DetectedFinding, ...]
    sentences: tuple[GeneratedSentence, ...]


# -------------------------------------------------------------------------------------------------- slots


def slot(kind: SlotKind, about: FindingTruth | DetectedFinding | None) -> tuple[int, int, int, int, int]:
    """Indices (kind, code + 1, side, change, grade) of what a row of text is about, as `Slots` has them.

    Args:
        kind: Of the sentence.
        about: The finding, true when learning and detected when writing; None for kinds that sum up.
    """
    if about is None:
        return SLOT_KINDS.index(kind), 0, 0, 0, 0
    return (
        SLOT_KINDS.index(kind),
        ontology.INDEX[about.code] + 1,
        ontology.SIDES.index(about.side),
        ontology.CHANGES.index(about.change),
        ontology.GRADES.index(ontology.grade(about.code, about.size)),
    )
