"""What lies in a folder: studies, their series, and every file that is refused with its reason.

Headers only. Nothing here writes an element's value to a log or into an exception; fields that could name
a patient are left out of every `repr`.
"""

import gc
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float
from pydicom.uid import DeflatedExplicitVRLittleEndian

from mm.dicom.errors import DicomError, FileError, KindError, Reason
from mm.dicom.guard import guarded
from mm.dicom.header import read_header
from mm.dicom.instance import Frame, Instance
from mm.dicom.kinds import ENHANCED, Kind
from mm.dicom.multiframe import check_concatenations, frames_of
from mm.dicom.pixels import check_greyscale, read_samples
from mm.dicom.siblings import Siblings
from mm.dicom.split import Part, split

LARGEST_COMPARED: Final = 1 << 30  # bytes of decoded pixels
COLLECTED_EVERY: Final = 1000  # files


@dataclass(frozen=True)
class Rejected:
    """A file that isn't read, and why."""

    path: Path = field(repr=False)
    reason: Reason
    place: str = ""
    study_instance_uid: str = field(default="", repr=False)
    series_instance_uid: str = field(default="", repr=False)
    """Of the series that the file belongs to, "" where that couldn't be read; for grouping, never shown."""


@dataclass(frozen=True)
class Series:
    """What belongs together of one SeriesInstanceUID: a volume, or objects of one kind and size.

    A series that mixes these, or holds several volumes, is split (`mm.dicom.split`); `part` counts the pieces from 0.

    Attributes:
        frames: Of a volume one a slice, in the order of the slice normal where it is regular; else one an instance.
        refused: Why `read_volume` or `read_image` will raise, or None where it can be tried.
        spacing_mm: (z, y, x) of a volume, (y, x) of an image, or None.
        affine: Of a volume that isn't refused.
        told: What tells it from the other volumes of its series, e.g. ("echo 2", "time 3"): words of ours and
            numbers, no text of the header.
    """

    series_instance_uid: str = field(repr=False)
    part: int
    modality: str
    kind: Kind
    frames: tuple[Frame, ...] = field(repr=False)
    refused: Reason | None
    place: str
    spacing_mm: tuple[float, ...] | None
    affine: Float[np.ndarray, "4 4"] | None = field(repr=False, compare=False)
    told: tuple[str, ...] = ()

    @property
    def instances(self) -> tuple[Instance, ...]:
        """What the frames are in, each once, in the order of the first frame of each."""
        return tuple({frame.instance.sop_instance_uid: frame.instance for frame in self.frames}.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """Where the instances lie."""
        return tuple(item.path for item in self.instances)

    @property
    def num_slices(self) -> int:
        """Number of slices of a volume, of instances of anything else."""
        return len(self.frames)

    @property
    def rows(self) -> int:
        """Pixels along a column."""
        return self.frames[0].instance.rows

    @property
    def columns(self) -> int:
        """Pixels along a row."""
        return self.frames[0].instance.columns

    @property
    def manufacturer(self) -> str:
        """Of the equipment."""
        return self.frames[0].instance.manufacturer

    @property
    def model(self) -> str:
        """ManufacturerModelName."""
        return self.frames[0].instance.model

    @property
    def body_part(self) -> str:
        """BodyPartExamined."""
        return self.frames[0].instance.body_part

    @property
    def kernel(self) -> str:
        """ConvolutionKernel of a CT."""
        return self.frames[0].instance.kernel

    @property
    def slice_thickness_mm(self) -> float | None:
        """SliceThickness, which isn't the distance between slices."""
        return self.frames[0].instance.slice_thickness

    @property
    def units(self) -> str:
        """Units of a PET: "BQML", "CNTS", "GML" (an SUV by body weight) and the like, or ""."""
        return self.frames[0].instance.units

    @property
    def view(self) -> str:
        """ViewPosition of a radiograph."""
        return self.frames[0].instance.view


@dataclass(frozen=True)
class Study:
    """One StudyInstanceUID of one patient. The identifiers are for `Case.source` only."""

    study_instance_uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    study_date: str = field(repr=False)
    """YYYYMMDD or ""."""
    accession_number: str = field(repr=False)
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Scan:
    """What `scan` found: studies by StudyInstanceUID, and the files that aren't read by path."""

    folder: Path = field(repr=False)
    studies: tuple[Study, ...]
    rejected: tuple[Rejected, ...]


def _files(folder: Path, closed: list[Path]) -> Iterator[str]:
    """Every file below a folder, sorted; links to folders aren't followed, so nothing is met in a circle.

    Args:
        folder: Where.
        closed: Gets the folders that can't be listed.
    """
    for root, folders, names in os.walk(folder, onerror=lambda error: closed.append(Path(error.filename))):
        folders.sort()
        yield from (f"{root}{os.sep}{name}" for name in sorted(names))


def _sources(source: str | Path | Sequence[str | Path]) -> tuple[Path, list[str], list[Path]]:
    """The folder that holds everything, every file once, and the folders that can't be listed.

    Raises:
        ValueError: Something isn't there.
    """
    closed: list[Path] = []
    if isinstance(source, (str, Path)):
        if not Path(source).is_dir():
            raise ValueError(f"folder must be an existing folder, got {str(source)!r}")
        return Path(source), list(_files(Path(source), closed)), closed
    paths = [Path(item).absolute() for item in source]
    missing = next((path for path in paths if not path.exists()), None)
    if missing is not None or not paths:
        raise ValueError(f"every file and folder must exist, and there must be one; got {str(missing)!r}")
    every = {file for path in paths for file in (_files(path, closed) if path.is_dir() else (str(path),))}
    root = Path(os.path.commonpath([path if path.is_dir() else path.parent for path in paths]))
    return root, sorted(every, key=Path), closed


def _check_kind(kind: Kind, instances: tuple[Instance, ...]) -> None:
    """Raises what can be known without decoding."""
    if kind in ("localizer", "multiframe"):
        raise KindError("localizer" if kind == "localizer" else "multiframe")
    if kind not in ("volume", "image"):
        raise KindError("not_a_volume")
    for item in instances:
        check_greyscale(item)
        if kind == "volume" and "MOSAIC" in item.image_type:
            raise KindError("mosaic")


def _series(uid: str, number: int, part: Part) -> Series:
    first = part.frames[0].instance
    spacing: tuple[float, ...] | None = first.spacing if first.kind == "image" else None
    series = Series(uid, number, first.modality, first.kind, part.frames, None, "", spacing, None, part.told)
    try:
        _check_kind(first.kind, series.instances)
        if part.error is not None:
            raise part.error
        if part.stack is not None:
            return replace(series, spacing_mm=part.stack.spacing_mm, affine=part.stack.affine)
    except DicomError as error:
        return replace(series, refused=error.reason, place=error.place)
    return series


def _lacking(series: Series) -> Series:
    """A volume refused because one of its files is: without its first or last slice it would still look regular."""
    if series.kind != "volume" or series.refused is not None:
        return series
    return replace(series, refused="broken_slice", place="", affine=None)


def _split(uid: str, instances: list[Instance]) -> list[Series]:
    """The pieces of one SeriesInstanceUID."""
    frames: list[Frame] = []
    broken: list[Part] = []
    lack: DicomError | None = None
    try:
        check_concatenations(instances)
    except DicomError as error:
        lack = error
    for item in sorted(instances, key=lambda item: item.sop_instance_uid):
        if item.kind != "volume" or item.sop_class_uid not in ENHANCED:
            frames.append(item.frame)
            continue
        try:
            with guarded():
                frames += frames_of(item)
        except DicomError as error:
            broken.append(Part((item.frame,), (), None, error))
    parts = [*(split(frames) if frames else []), *broken]
    if lack is not None:
        parts = [replace(part, error=part.error or lack) for part in parts]
    series = [_series(uid, number, part) for number, part in enumerate(parts)]
    return [_lacking(item) for item in series] if broken else series


def _content(item: Instance, *, decoded: bool) -> tuple[Instance, bytes | None]:
    """What makes two files of one SOPInstanceUID the same: the kept elements, and the pixels.

    Args:
        item: The file.
        decoded: The stored integers count, whatever transfer syntax they are in; else every byte from the pixels on,
            or of the whole file where these can't be told from the rest (deflated).

    Returns:
        None as the second where they can't be read.
    """
    same = replace(item, file="", pixel_offset=0)
    if decoded and item.num_bytes > LARGEST_COMPARED:
        return same, None
    if decoded:
        digest = hashlib.blake2b()
        try:
            for index in range(item.num_frames):
                digest.update(np.ascontiguousarray(read_samples(item, index)).data)
        except DicomError:
            return same, None
        return replace(same, transfer_syntax_uid=""), digest.digest()
    start = 0 if item.transfer_syntax_uid == DeflatedExplicitVRLittleEndian else item.pixel_offset
    try:
        with item.path.open("rb") as file:
            file.seek(start)
            return same, hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return same, None


def _is_one(items: Sequence[Instance]) -> bool:
    """True where files of one SOPInstanceUID tell the same, be it in transfer syntaxes of their own (lossless ones)."""
    decoded = len({item.transfer_syntax_uid for item in items}) > 1
    first, *others = (_content(item, decoded=decoded) for item in items)
    return first[1] is not None and all(other == first for other in others)


def _once(instances: Iterable[Instance]) -> tuple[list[Instance], list[Rejected]]:
    """One instance for every SOPInstanceUID; files that tell different things under one are all rejected."""
    by_uid: dict[str, list[Instance]] = defaultdict(list)
    for item in instances:
        by_uid[item.sop_instance_uid].append(item)
    kept: list[Instance] = []
    rejected: list[Rejected] = []
    for first, *others in by_uid.values():
        if not others or _is_one([first, *others]):
            kept.append(first)
            rejected += [Rejected(item.path, "duplicate_instance") for item in others]
            continue
        rejected += [
            Rejected(item.path, "conflicting_instance", "", item.study_instance_uid, item.series_instance_uid)
            for item in (first, *others)
        ]
    return kept, rejected


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """Puts off the search for cycles, of which headers have none: it walks every object of the process.

    Beside torch, MONAI and the like it takes longer than reading 300 headers. `scan` collects what is young now and
    then, for pydicom's data sets.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def scan(source: str | Path | Sequence[str | Path], progress: Callable[[int, int], None] | None = None) -> Scan:
    """Reads the headers of every file and groups them.

    The result depends on the files' content, not on their names or order. Of identical files (the same kept elements
    and pixels under one SOPInstanceUID) the first by path is kept; different ones are all rejected, and their series
    may lack a slice.

    Args:
        source: A folder, or files and folders.
        progress: Called after every file with how many are read and how many there are.

    Raises:
        ValueError: The folder, or one of the files, doesn't exist.
    """
    root, files, closed = _sources(source)
    rejected = [Rejected(path, "unreadable") for path in closed]
    studies: dict[str, list[Instance]] = defaultdict(list)
    patients: dict[str, set[str]] = defaultdict(set)
    found: list[Instance] = []
    siblings = Siblings()
    with _seldom_collected():
        for number, file in enumerate(files, 1):
            try:
                if file.rpartition(os.sep)[2].upper() == "DICOMDIR":
                    raise FileError("dicomdir")
                found.append(read_header(file, siblings))
            except FileError as error:
                rejected.append(Rejected(Path(file), error.reason, error.place, *(error.belongs_to or ("", ""))))
            if progress is not None:
                progress(number, len(files))
            if number % COLLECTED_EVERY == 0:
                gc.collect(1)
    for instance in found:
        patients[instance.study_instance_uid].add(instance.patient_id)
    unique, twice = _once(found)
    rejected += twice
    for instance in unique:
        studies[instance.study_instance_uid].append(instance)
    broken = {(item.study_instance_uid, item.series_instance_uid) for item in rejected}
    kept: list[Study] = []
    for study_uid, instances in sorted(studies.items()):
        named = patients[study_uid] - {""}  # some modality that leaves PatientID empty is no second patient
        if len(named) > 1:
            rejected += [
                Rejected(item.path, "two_patients", "", study_uid, item.series_instance_uid) for item in instances
            ]
            continue
        by_series: dict[str, list[Instance]] = defaultdict(list)
        for item in instances:
            by_series[item.series_instance_uid].append(item)
        series = tuple(
            _lacking(part) if (study_uid, uid) in broken else part
            for uid, items in sorted(by_series.items())
            for part in _split(uid, items)
        )
        date = max(item.study_date for item in instances)
        accession = max(item.accession_number for item in instances)
        kept.append(Study(study_uid, max(named, default=""), date, accession, series))
    return Scan(root, tuple(kept), tuple(sorted(rejected, key=lambda item: item.path)))
