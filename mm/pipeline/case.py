"""What flows through a pipeline: a `Case` is one study on its way to a report.

`source` holds true identifiers and file names; it has no repr, is never logged and never given to a model.
Everything else in a case is pseudonymous.
"""

import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float

import mm
from mm.batch import Record
from mm.dicom.errors import DicomError
from mm.dicom.resample import Grid
from mm.dicom.scan import Study
from mm.dicom.volume import Image, Volume
from mm.pipeline.keys import Keys
from mm.report.evidence import Stack
from mm.report.schema import INPUTS, InputName, InputUsed, Report, SeriesUsed

PACKAGE: Final = Path(mm.__file__).parent
PASSING: Final = ("missing_decoder", "unreadable", "changed")
"""Reasons that lie outside the files: what fails by them is tried again."""


class InputError(Exception):
    """A file beside the series can't be used. `reason` is a stable word; no content ever stands in it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Sealed:
    """The preprocessing that a checkpoint was trained with; loading follows it and nothing else.

    Attributes:
        grid: Of volumes.
        image_size: Side of the square image grid, pixels.
        sound_rate: Samples a second.
    """

    grid: Grid
    image_size: int
    sound_rate: int


@dataclass(frozen=True)
class ContextRow:
    """What `--context` says of a study.

    Attributes:
        record: A record as JSON, the file that holds one, or None.
        audio: Sound file by site; empty where the row has none.
        priors: StudyInstanceUIDs of earlier studies, or None: link by PatientID and date.
    """

    record: dict[str, Any] | Path | None = None
    audio: dict[str, Path] = field(default_factory=dict)
    priors: tuple[str, ...] | None = None


@dataclass(frozen=True)
class PriorSource:
    """An earlier study of the same patient and how many days before it was made."""

    study: Study
    days: int


@dataclass(frozen=True, repr=False)
class Source:
    """Where a study comes from: true identifiers.

    Attributes:
        study: As scanned.
        priors: Most recent first.
        folders: Where `record.json` and `sound_<site>.wav` may lie: folders that hold this study alone.
        row: What `--context` says, or None.
        keys: Turns identifiers into what a report may show.
    """

    study: Study
    priors: tuple[PriorSource, ...]
    folders: tuple[Path, ...]
    row: ContextRow | None
    keys: Keys


@dataclass(frozen=True)
class LoadedVolume:
    """A CT on the model's grid.

    Attributes:
        volume: On the sealed grid; its affine leads back to the patient.
        days: Before the current study.
        stack: The slices as stored, for key images, under pseudonymous UIDs; None for priors.
    """

    volume: Volume
    days: int
    stack: Stack | None


@dataclass(frozen=True)
class LoadedImage:
    """A radiograph as stored, under a pseudonymous UID, and on the model's grid."""

    image: Image
    fitted: Float[np.ndarray, "S S"]


@dataclass(frozen=True)
class Failure:
    """Why a study has no report: a stable reason (or a type's name) and the place, never a message.

    Attributes:
        reason: A stable word, or the name of an error's type.
        place: File and line of this package, and where in the stack.
        lasting: The same files would fail again; False where the machine may be to blame.
    """

    reason: str
    place: str
    lasting: bool = True

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Type and place. The message is left behind: it may quote what the file says of the patient."""
        known = isinstance(error, DicomError | InputError)
        reason = error.reason if isinstance(error, DicomError | InputError) else type(error).__name__
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
        last = (ours or list(frames))[-1]
        path = Path(last.filename)
        place = f"{path.relative_to(PACKAGE.parent) if ours else path.name}:{last.lineno}"
        if isinstance(error, DicomError) and error.place:
            place = f"{place}, {error.place}"
        lasting = reason not in PASSING if known else not isinstance(error, OSError | MemoryError)
        return cls(reason, place, lasting and "OutOfMemory" not in reason)


@dataclass(frozen=True)
class Inputs:
    """What has been loaded of a study so far.

    Attributes:
        volumes: The current one, then priors, the most recent first.
        image: The radiograph.
        audio: One a sound site (None where missing), or empty.
        record: The clinical record.
        series: Facts of every series read.
        told: One row for each input that a stage has looked for.
        failure: Of the first picture that can't be read; the study's own, if there is no other to report.
    """

    volumes: tuple[LoadedVolume, ...] = ()
    image: LoadedImage | None = None
    audio: tuple[Float[np.ndarray, " T"] | None, ...] = ()
    record: Record | None = None
    series: tuple[SeriesUsed, ...] = ()
    told: tuple[InputUsed, ...] = ()
    failure: Failure | None = None

    @property
    def pictured(self) -> bool:
        """True with a volume or an image: without either there is nothing to report."""
        return bool(self.volumes) or self.image is not None

    def lack(self, name: InputName, error: DicomError) -> "Inputs":
        """The same, told that a picture can't be read."""
        told = self.tell(name, count=0, reason=error.reason)
        return replace(told, failure=told.failure or Failure.of(error))

    def tell(self, name: InputName, *, count: int, reason: str | None = None, detail: tuple[str, ...] = ()) -> "Inputs":
        """The same with a row on one input; without a reason a missing one is "absent"."""
        row = InputUsed(name, count > 0, reason if count or reason else "absent", count, detail)
        return replace(self, told=(*self.told, row))

    def summary(self) -> tuple[InputUsed, ...]:
        """One row for every kind of input, in a fixed order."""
        told = {row.name: row for row in self.told}
        return tuple(told.get(name, InputUsed(name, False, "not_in_pipeline")) for name in INPUTS)


@dataclass(frozen=True)
class Case:
    """One study on its way to a report."""

    source: Source = field(repr=False)
    study: str
    sealed: Sealed
    inputs: Inputs = field(default_factory=Inputs)
    result: Report | None = None
    failure: Failure | None = None
