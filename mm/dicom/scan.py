"""What lies in a folder: studies, their series, and every file that is refused with its reason.

Headers only. Nothing here writes an element's value to a log or into an exception; fields that could name
a patient are left out of every `repr`.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from pydicom.uid import DeflatedExplicitVRLittleEndian

from mm.dicom.errors import DicomError, FileError, GeometryError, KindError, Reason
from mm.dicom.geometry import plane, stack
from mm.dicom.header import read_header
from mm.dicom.instance import Instance, Kind
from mm.dicom.pixels import check_greyscale
from mm.dicom.siblings import Siblings

SPACING_DECIMALS = 4
ORIENTATION_DECIMALS = 3


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
    """Instances of one SeriesInstanceUID that share kind, size and orientation.

    A series that mixes these is split; `part` counts the pieces from 0. `instances` of a volume that isn't
    refused are in the order of the slice normal.

    Attributes:
        refused: Why `read_volume` or `read_image` will raise, or None where it can be tried.
        spacing_mm: (z, y, x) of a volume, (y, x) of an image, or None.
        affine: Of a volume that isn't refused.
    """

    series_instance_uid: str = field(repr=False)
    part: int
    modality: str
    kind: Kind
    instances: tuple[Instance, ...] = field(repr=False)
    refused: Reason | None
    place: str
    spacing_mm: tuple[float, ...] | None
    affine: Float[np.ndarray, "4 4"] | None = field(repr=False, compare=False)

    @property
    def files(self) -> tuple[Path, ...]:
        """Where the instances lie."""
        return tuple(item.path for item in self.instances)

    @property
    def num_slices(self) -> int:
        """Number of instances."""
        return len(self.instances)

    @property
    def rows(self) -> int:
        """Pixels along a column."""
        return self.instances[0].rows

    @property
    def columns(self) -> int:
        """Pixels along a row."""
        return self.instances[0].columns

    @property
    def manufacturer(self) -> str:
        """Of the equipment."""
        return self.instances[0].manufacturer

    @property
    def model(self) -> str:
        """ManufacturerModelName."""
        return self.instances[0].model

    @property
    def body_part(self) -> str:
        """BodyPartExamined."""
        return self.instances[0].body_part

    @property
    def kernel(self) -> str:
        """ConvolutionKernel of a CT."""
        return self.instances[0].kernel

    @property
    def slice_thickness_mm(self) -> float | None:
        """SliceThickness, which isn't the distance between slices."""
        return self.instances[0].slice_thickness

    @property
    def view(self) -> str:
        """ViewPosition of a radiograph."""
        return self.instances[0].view


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


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder, sorted; links to folders aren't followed, so nothing is met in a circle."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(f"{root}/{name}") for name in sorted(names))


def _sources(source: str | Path | Sequence[str | Path]) -> tuple[Path, list[Path]]:
    """The folder that holds everything, and every file once.

    Raises:
        ValueError: Something isn't there.
    """
    if isinstance(source, (str, Path)):
        if not Path(source).is_dir():
            raise ValueError(f"folder must be an existing folder, got {str(source)!r}")
        return Path(source), list(_files(Path(source)))
    paths = [Path(item).absolute() for item in source]
    missing = next((path for path in paths if not path.exists()), None)
    if missing is not None or not paths:
        raise ValueError(f"every file and folder must exist, and there must be one; got {str(missing)!r}")
    every = {file for path in paths for file in (_files(path) if path.is_dir() else (path,))}
    return Path(os.path.commonpath([path if path.is_dir() else path.parent for path in paths])), sorted(every)


def _refusal(kind: Kind, instances: list[Instance]) -> None:
    """Raises what can be known without decoding."""
    if kind in ("localizer", "multiframe"):
        raise KindError("localizer" if kind == "localizer" else "multiframe")
    if kind not in ("volume", "image"):
        raise KindError("not_a_volume")
    for item in instances:
        check_greyscale(item)
        if kind == "volume" and "MOSAIC" in item.image_type:
            raise KindError("mosaic")


def _series(uid: str, part: int, instances: list[Instance]) -> Series:
    first = instances[0]
    reason: Reason | None = None
    place = ""
    spacing: tuple[float, ...] | None = first.spacing if first.kind == "image" else None
    affine = None
    try:
        _refusal(first.kind, instances)
        if first.kind == "volume":
            found = stack(instances)
            instances = [instances[index] for index in found.order]
            spacing, affine = found.spacing_mm, found.affine
    except DicomError as error:
        reason, place = error.reason, error.place
    return Series(uid, part, first.modality, first.kind, tuple(instances), reason, place, spacing, affine)


def _lacking(series: Series) -> Series:
    """A volume refused because one of its files is: without its first or last slice it would still look regular."""
    if series.kind != "volume" or series.refused is not None:
        return series
    return replace(series, refused="broken_slice", place="", affine=None)


def _likeness(item: Instance) -> tuple[object, ...]:
    """Instances that differ in this are different stacks, whatever their SeriesInstanceUID says."""
    try:
        along_row, along_column = plane(item)
        directions = tuple(np.concatenate([along_row, along_column]).round(ORIENTATION_DECIMALS).tolist())
    except GeometryError:
        directions = ()
    spacing = tuple(round(value, SPACING_DECIMALS) for value in item.spacing or ())
    return item.kind, item.modality, item.rows, item.columns, spacing, tuple(value + 0.0 for value in directions)


def _split(uid: str, instances: list[Instance]) -> list[Series]:
    groups: dict[tuple[object, ...], list[Instance]] = defaultdict(list)
    for item in sorted(instances, key=lambda item: item.sop_instance_uid):
        groups[_likeness(item)].append(item)
    largest_first = sorted(groups.values(), key=lambda group: (-len(group), group[0].sop_instance_uid))
    return [_series(uid, part, group) for part, group in enumerate(largest_first)]


def _content(item: Instance) -> tuple[Instance, bytes | None]:
    """What makes two files of one SOPInstanceUID the same: the kept elements, and every byte from the pixels on.

    Where the pixels can't be told from the rest (deflated) all bytes count; None where they can't be read.
    """
    start = 0 if item.transfer_syntax_uid == DeflatedExplicitVRLittleEndian else item.pixel_offset
    try:
        with item.path.open("rb") as file:
            file.seek(start)
            digest = hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return item, None
    return replace(item, path=Path(), pixel_offset=0), digest


def _once(instances: Iterable[Instance]) -> tuple[list[Instance], list[Rejected]]:
    """One instance for every SOPInstanceUID; files that tell different things under one are all rejected."""
    by_uid: dict[str, list[Instance]] = defaultdict(list)
    for item in instances:
        by_uid[item.sop_instance_uid].append(item)
    kept: list[Instance] = []
    rejected: list[Rejected] = []
    for first, *others in by_uid.values():
        content = _content(first) if others else None
        if all(_content(item) == content and content[1] is not None for item in others if content):
            kept.append(first)
            rejected += [Rejected(item.path, "duplicate_instance") for item in others]
            continue
        rejected += [
            Rejected(item.path, "conflicting_instance", "", item.study_instance_uid, item.series_instance_uid)
            for item in (first, *others)
        ]
    return kept, rejected


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
    root, paths = _sources(source)
    rejected: list[Rejected] = []
    studies: dict[str, list[Instance]] = defaultdict(list)
    patients: dict[str, set[str]] = defaultdict(set)
    found: list[Instance] = []
    siblings = Siblings()
    for number, path in enumerate(paths, 1):
        try:
            if path.name.upper() == "DICOMDIR":
                raise FileError("dicomdir")
            found.append(read_header(path, siblings))
        except FileError as error:
            rejected.append(Rejected(path, error.reason, error.place, *(error.belongs_to or ("", ""))))
        if progress is not None:
            progress(number, len(paths))
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
