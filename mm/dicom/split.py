"""A series taken apart into volumes: by geometry first, by what repeats in one place second.

1. Images of one kind, size, pixel spacing and orientation are a group. Slices of a group that are one regular stack
   stay one volume, whatever else differs between them: a CT in two acquisitions is one CT.
2. Where a group isn't one regular stack, stacks that the header names (StackID) and images of another type (an
   appended projection) are set apart, if what they leave is regular.
3. Where several images share a place, the first of `mm.dicom.marks.Marks`, in the order of its fields, whose every
   value covers all places splits the group; then the next, until no place is shared. If there is none, images of a
   place are counted by InstanceNumber, acquisition time or trigger time, if every place has the same number of them
   and they run volume after volume or place after place.
   If there is none either, a mark is taken whose values give at least half of the images as whole volumes (a series
   that was broken off), or regular stacks only (two scans that overlap).
4. What nothing tells apart stays together and is refused as `duplicate_position`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from mm.dicom.errors import DicomError, GeometryError
from mm.dicom.geometry import Stack, directions, linked, places, stack
from mm.dicom.instance import Frame
from mm.dicom.marks import Mark, Marks, labels

ORIENTATION_TOLERANCE: Final = 1e-3
SPACING_TOLERANCE_MM: Final = 1e-4
MAX_DIMENSIONS: Final = 8
EXACT: Final = Marks._fields[: Marks._fields.index("dimensions")]
RANKED: Final = ("number", "acquired", "trigger")


@dataclass(frozen=True)
class Part:
    """Frames of one volume, in the order of the slice normal where they are one.

    Attributes:
        frames: In order.
        told: What told it from its neighbours, e.g. ("echo 2", "time 3"); words of ours and numbers.
        stack: Where it lies, or None where it can't be a volume.
        error: Why it can't.
    """

    frames: tuple[Frame, ...] = field(repr=False)
    told: tuple[str, ...]
    stack: Stack | None
    error: DicomError | None


class Piece(NamedTuple):
    """Some of a group's frames.

    Attributes:
        members: Index into the group.
        told: As in `Part`.
        whole: False where its neighbours show that it lacks slices.
    """

    members: list[int]
    told: tuple[str, ...] = ()
    whole: bool = True


Getter = Callable[[Frame], Mark | None]


def _getter(name: str) -> Getter:
    return lambda frame: getattr(frame.marks, name)


def _dimension(number: int) -> Getter:
    def value(frame: Frame) -> Mark | None:
        given = frame.marks.dimensions
        return given[number] if given is not None and number < len(given) else None

    return value


def _exact(frames: Sequence[Frame]) -> list[tuple[str, Getter]]:
    """The marks that differ at all, in the order of preference."""
    every: list[tuple[str, Getter]] = [(name, _getter(name)) for name in EXACT]
    longest = max((len(item.marks.dimensions or ()) for item in frames), default=0)
    every += [("dimensions", _dimension(number)) for number in range(min(longest, MAX_DIMENSIONS))]
    every.append(("object", _getter("object")))
    return [(name, get) for name, get in every if any(get(item) != get(frames[0]) for item in frames)]


def _by(members: Iterable[int], frames: Sequence[Frame], get: Getter) -> dict[Mark | None, list[int]]:
    """Members by value, values ascending, those without one first."""
    groups: dict[Mark | None, list[int]] = defaultdict(list)
    for index in members:
        value = get(frames[index])
        groups[round(value, 3) if isinstance(value, float) else value].append(index)
    return dict(sorted(groups.items(), key=lambda item: (item[0] is not None, item[0])))


def _told(name: str, values: Iterable[Mark | None]) -> list[str]:
    return labels(name, list(values))


class _Group:
    """Frames of one orientation and size, and the places they are in."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        self.frames = frames
        self.place: list[int] = places(frames).tolist()

    def counts(self, members: Iterable[int]) -> Counter[int]:
        """How many members each place has."""
        return Counter(self.place[index] for index in members)

    def is_regular(self, members: Sequence[int]) -> bool:
        """True for a stack that can be read or sheared back."""
        try:
            stack([self.frames[index] for index in members])
        except GeometryError:
            return False
        return True

    def pieces(self) -> list[Piece]:
        """The group, which isn't one regular stack, taken apart."""
        everything = list(range(len(self.frames)))
        for name in ("stack", "component"):
            groups = _by(everything, self.frames, _getter(name))
            if len(groups) < 2 or not (self._are_stacks if name == "stack" else self._are_types)(groups.values()):
                continue
            told = _told(name, groups)
            return [
                Piece(piece.members, (label, *piece.told), piece.whole)
                for label, group in zip(told, groups.values(), strict=True)
                for piece in self.divided(group, _exact([self.frames[index] for index in group]))
            ]
        return self.divided(everything, _exact(self.frames))

    def _are_stacks(self, groups: Iterable[Sequence[int]]) -> bool:
        return all(len(self.counts(group)) > 1 for group in groups)

    def _are_types(self, groups: Iterable[Sequence[int]]) -> bool:
        """True where the others are no slices that the largest lacks: it is regular, and so are they not."""
        most, *others = sorted(groups, key=len, reverse=True)
        return self.is_regular(most) and not any(self.is_regular(group) for group in others)

    def divided(self, members: list[int], marks: list[tuple[str, Getter]]) -> list[Piece]:
        """Members so that no place is shared, by the marks that are left; one piece where that can't be."""
        counts = self.counts(members)
        if max(counts.values()) == 1 or len(counts) == 1:
            return [Piece(members)]
        for index, (name, get) in enumerate(marks):
            groups = _by(members, self.frames, get)
            if len(groups) < 2 or any(len(self.counts(group)) < len(counts) for group in groups.values()):
                continue
            left = marks[:index] + marks[index + 1 :]
            return [
                Piece(piece.members, (label, *piece.told), piece.whole)
                for label, group in zip(_told(name, groups), groups.values(), strict=True)
                for piece in self.divided(group, left)
            ]
        return self._ranked(members, counts) or self._loosely(members, marks, len(counts)) or [Piece(members)]

    def _ranked(self, members: list[int], counts: Counter[int]) -> list[Piece]:
        """By the order in which the images of each place were made, if all places have equally many."""
        times = min(counts.values())
        if times != max(counts.values()):
            return []
        for name in RANKED:
            get = _getter(name)
            values = {index: get(self.frames[index]) for index in members}
            if None in values.values():
                continue
            by_place: dict[int, list[int]] = defaultdict(list)
            for index in sorted(members, key=lambda index: values[index]):  # type: ignore[arg-type, return-value]
                by_place[self.place[index]].append(index)
            if any(len({values[index] for index in group}) < times for group in by_place.values()):
                continue
            found = [list(volume) for volume in zip(*by_place.values(), strict=True)]
            if not (_are_blocks(found, values) or _are_blocks(by_place.values(), values)):
                continue
            return [Piece(volume, (label,)) for volume, label in zip(found, _told(name, [None] * times), strict=True)]
        return []

    def _loosely(self, members: list[int], marks: list[tuple[str, Getter]], num_places: int) -> list[Piece]:
        """A series that was broken off, or scans that overlap."""
        for name, get in marks:
            groups = _by(members, self.frames, get)
            if len(groups) < 2 or any(max(self.counts(group).values()) > 1 for group in groups.values()):
                continue
            whole = [len(group) == num_places for group in groups.values()]
            if 2 * num_places * sum(whole) < len(members):
                if not all(self.is_regular(group) for group in groups.values()):
                    continue
                whole = [True] * len(groups)
            rows = zip(groups.values(), _told(name, groups), whole, strict=True)
            return [Piece(group, (label,), complete) for group, label, complete in rows]
        return []


def _are_blocks(groups: Iterable[Iterable[int]], values: dict[int, Mark | None]) -> bool:
    """True where the numbers of each group lie between those of the group before and of the one behind."""
    spans = sorted((min(numbers), max(numbers)) for group in groups if (numbers := [values[item] for item in group]))  # type: ignore[type-var]
    return all(before[1] < after[0] for before, after in pairwise(spans))  # type: ignore[operator]


def _alike(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Frames by kind, modality, size, pixel spacing and orientation, the largest group first."""
    kinds = list(dict.fromkeys((frame.spacing, frame.orientation) for frame in frames))
    rows = np.full((len(kinds), 8), np.nan)
    for row, (spacing, orientation) in zip(rows, kinds, strict=True):
        row[:2] = spacing or np.nan
        try:
            row[2:] = np.concatenate(directions(orientation))
        except GeometryError:
            continue
    rows = np.nan_to_num(rows, nan=1e6).clip(-1e6, 1e6)
    tolerances = [SPACING_TOLERANCE_MM] * 2 + [ORIENTATION_TOLERANCE] * 6
    linked_rows = np.stack([linked(rows[:, column], each) for column, each in enumerate(tolerances)], axis=1).tolist()
    keys = dict(zip(kinds, map(tuple, linked_rows), strict=True))
    groups: dict[tuple[object, ...], list[Frame]] = defaultdict(list)
    for frame in frames:
        item, key = frame.instance, keys[frame.spacing, frame.orientation]
        groups[item.kind, item.modality, item.rows, item.columns, key].append(frame)
    return sorted(groups.values(), key=lambda group: (-len(group), group[0].instance.sop_instance_uid, group[0].index))


def _part(frames: Sequence[Frame], told: tuple[str, ...], *, whole: bool) -> Part:
    try:
        found = stack(frames)
    except GeometryError as error:
        return Part(tuple(frames), told, None, error)
    ordered = tuple(frames[index] for index in found.order)
    if not whole:
        return Part(ordered, told, None, GeometryError("missing_slice", "beside the other volumes of its series"))
    return Part(ordered, told, found, GeometryError("gantry_tilt") if found.tilted else None)


def _parts(group: Sequence[Frame]) -> list[Part]:
    """The volumes of one group of frames that are alike; the group itself where it is one, or can't be taken apart."""
    if group[0].instance.kind != "volume":
        return [Part(tuple(group), (), None, None)]
    together = _part(group, (), whole=True)
    if together.stack is not None:
        return [together]
    try:
        pieces = _Group(group).pieces()
    except GeometryError:
        return [together]
    return [_part([group[index] for index in piece.members], piece.told, whole=piece.whole) for piece in pieces]


def split(frames: Sequence[Frame]) -> list[Part]:
    """The volumes, and whatever else is in a series, deterministically.

    Args:
        frames: Of one SeriesInstanceUID, at least one, in the order of SOPInstanceUID and frame.

    Returns:
        The largest geometric group first; its parts in the order of what tells them apart.
    """
    return [part for group in _alike(frames) for part in _parts(group)]
