"""Slices of one series have nearly the same header: what lies between the elements that change needs no second walk.

A pattern is made of headers with the same elements in the same order: the bytes that are equal in all, run by run,
and between the runs the elements whose values aren't. Where every run of a pattern is found in
a new file, byte by byte, its elements are those of the pattern but for these values, and so is its `Instance`.
Nothing is guessed: one other byte, and the file is walked.
"""

import math
import re
import struct
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from typing import Any, Final, NamedTuple

from mm.dicom.elements import (
    IMPLICIT,
    KEYWORDS,
    META_GROUP,
    SHORT,
    SIGNED,
    TRANSFER_SYNTAX,
    VRS,
    Unsure,
    Walk,
    behind_sequence,
    elements,
    value,
)
from mm.dicom.instance import Instance, instance_of
from mm.dicom.marks import Marks, moment, number

PATTERNS: Final = 8  # kept at a time, so that a folder may mix as many kinds of headers
VARIANTS: Final = 256  # and as many series of one kind
LAYOUTS: Final = 32
LARGEST_WINDOW: Final = 128 << 10
SPARE: Final = 512  # bytes that another header may be longer
FIXED: Final = (TRANSFER_SYNTAX, SIGNED)  # other elements are read by what these say
WITHOUT_LENGTH: Final = b"\xff\xff\xff\xff"
IS_UID: Final = re.compile(r"[0-9]+(\.[0-9]+)*").fullmatch

Extent = Callable[[bytes, int], tuple[int, int]]
_SHORT_LENGTH: Final = struct.Struct("<H").unpack_from
_LONG_LENGTH: Final = struct.Struct("<L").unpack_from


def _short(window: bytes, position: int) -> tuple[int, int]:
    return position + 2, position + 2 + _SHORT_LENGTH(window, position)[0]


def _long(window: bytes, position: int) -> tuple[int, int]:
    return position + 4, position + 4 + _LONG_LENGTH(window, position)[0]


def _explicit_sequence(window: bytes, position: int) -> tuple[int, int]:
    return position, behind_sequence(window, position, implicit=False)


def _implicit_sequence(window: bytes, position: int) -> tuple[int, int]:
    return position, behind_sequence(window, position, implicit=True)


def _uid(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 64 or not IS_UID(value):
        raise Unsure
    return value


def _position(value: Any) -> tuple[float, ...]:
    if not isinstance(value, tuple) or len(value) != 3 or "" in value:
        raise Unsure
    return value


def _number(value: Any) -> float:
    if not isinstance(value, float) or not math.isfinite(value):
        raise Unsure
    return value


OWN: Final[dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "SOPInstanceUID": ("sop_instance_uid", _uid),
    "ImagePositionPatient": ("position", _position),
    "RescaleSlope": ("slope", _number),
    "RescaleIntercept": ("intercept", _number),
}
"""Elements that decide one field of `Instance` and nothing else: the field, and its value in the usual case.

A series in which only these and `MARKS` change costs no `instance_of` a file.
"""
MARKS: Final[dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "InstanceNumber": ("number", number),
    "TriggerTime": ("trigger", number),
    "FrameReferenceTime": ("offset", number),
    "AcquisitionTime": ("acquired", moment),
}
"""The same for the fields of its `marks`."""
# Where AcquisitionDateTime is there, AcquisitionTime isn't what `acquired` is read from.
ACQUISITION_DATE_TIME, ACQUISITION_TIME = (
    next(tag for tag, keyword in KEYWORDS.items() if keyword == wanted)
    for wanted in ("AcquisitionDateTime", "AcquisitionTime")
)


class Step(NamedTuple):
    """A run of bytes up to the length of an element that changes.

    Attributes:
        run: What the file must hold here.
        extent: Where the element's value starts and ends, from where its length stands.
        tag: Of the element where it is wanted, else 0.
    """

    run: bytes
    extent: "Extent"
    tag: int


class Field(NamedTuple):
    """An element that decides one field of `Instance`, or one of its `marks`, and nothing else.

    Attributes:
        place: Which of the changing elements it is.
        vr: Its value representation.
        name: The field; of a mark its place in `Marks`.
        convert: The field's value from the element's, in the usual case.
    """

    place: int
    vr: str
    name: Any
    convert: Callable[[Any], Any]


class Pattern(NamedTuple):
    """What headers of one layout have in common."""

    steps: tuple[Step, ...]
    tail: bytes  # ends with the 12 bytes of the pixel element
    stable: dict[int, bytes]  # wanted elements in the runs
    transfer_syntax_uid: str
    tags: tuple[int, ...]  # of the wanted elements that change, in their order
    keyed: tuple[int, ...]  # which of them are neither own nor marks
    own: tuple[Field, ...]
    marks: tuple[Field, ...]
    variants: dict[tuple[bytes, ...], dict[str, Any]]  # fields of an `Instance` by the elements that are keyed
    layout: "Layout"

    def match(self, window: bytes) -> tuple[list[bytes], int] | None:
        """The wanted elements that change and where the pixels start, or None for another header."""
        position = 0
        changed: list[bytes] = []
        for run, extent, tag in self.steps:
            if not window.startswith(run, position):
                return None
            start, position = extent(window, position + len(run))
            if tag:
                changed.append(window[start:position])
        if not window.startswith(self.tail, position):
            return None
        return changed, position + len(self.tail) - 12

    def read(self, file: str, window: bytes) -> tuple[Instance, bytes] | None:
        """The instance of a file and the first bytes of its pixel element, or None for another header."""
        try:
            matched = self.match(window)
        except struct.error:
            return None
        if matched is None:
            return None
        raw, offset = matched
        key = tuple([raw[place] for place in self.keyed])
        known = self.variants.get(key)
        if known is None:
            found = elements(self.stable | dict(zip(self.tags, raw, strict=True)))
            instance = instance_of(file, found, self.transfer_syntax_uid, offset)
            if len(self.variants) == VARIANTS:
                self.variants.pop(next(iter(self.variants)))
            self.variants[key] = {field.name: getattr(instance, field.name) for field in fields(Instance)}
            return instance, self.tail[-12:]
        own = known.copy()
        own["file"], own["pixel_offset"] = file, offset
        for place, vr, name, convert in self.own:
            own[name] = convert(value(vr, raw[place]))
        if self.marks:
            marks = list(known["marks"])
            for place, vr, name, convert in self.marks:
                marks[name] = convert(value(vr, raw[place]))
            own["marks"] = Marks._make(marks)
        instance = object.__new__(Instance)  # `replace` would take six times as long
        object.__setattr__(instance, "__dict__", own)
        return instance, self.tail[-12:]


class Layout:
    """The elements that several headers have in common, by where they start, and which of them change."""

    def __init__(self) -> None:
        self.values: list[bytes] = []
        self.changing: set[int] = set()


class Siblings:
    """What is known of the headers read so far. Holds no more than a few of them.

    Attributes:
        window: Bytes that hold another header, very likely; 0 before the first.
    """

    def __init__(self) -> None:
        self.window = 0
        self._patterns: list[Pattern] = []
        self._layouts: dict[tuple[bytes, ...], Layout] = {}

    def read(self, file: str, window: bytes) -> tuple[Instance, bytes] | None:
        """The instance of a file and the first bytes of its pixel element, or None where it must be walked.

        Raises:
            Unsure, TooDeep: As for `walk`.
        """
        for index, pattern in enumerate(self._patterns):
            found = pattern.read(file, window)
            if found is not None:
                if index:
                    self._patterns.insert(0, self._patterns.pop(index))
                return found
        return None

    def learn(self, window: bytes, walk: Walk) -> None:
        """Takes in a header that had to be walked."""
        if len(walk.head) < 12 or walk.offset + 12 > LARGEST_WINDOW:
            return
        self.window = max(self.window, walk.offset + 12 + SPARE)
        if walk.offset + 12 > len(window):
            return
        starts = [*walk.starts, walk.offset]
        values = [window[start:end] for start, end in pairwise(starts)]
        kinds = [_kind(value, walk.transfer_syntax_uid) for value in values]
        tags = [int.from_bytes(value[:4], "little") for value in values]
        if len(set(tags)) < len(tags):
            return
        key = tuple(value[:size] for value, (size, _) in zip(values, kinds, strict=True))
        layout = self._layouts.get(key)
        if layout is None:
            layout = Layout()
            if len(self._layouts) == LAYOUTS:
                self._layouts.pop(next(iter(self._layouts)))
            self._layouts[key] = layout
        layout.changing |= {i for i, (old, new) in enumerate(zip(layout.values, values, strict=False)) if old != new}
        first, layout.values = not layout.values, values
        data_set = next((i for i, tag in enumerate(tags) if tag & 0xFFFF != META_GROUP), 0)
        if first or any(tags[i] in FIXED or i == data_set for i in layout.changing):
            return
        wanted = {tags[i] for i in layout.changing} & set(walk.found)
        steps: list[Step] = []
        run = window[:132]
        for i, whole in enumerate(values):
            if i not in layout.changing:
                run += whole
                continue
            size, extent = kinds[i]
            steps.append(Step(run + whole[:size], extent, tags[i] if tags[i] in wanted else 0))
            run = b""
        stable = {tag: raw for tag, raw in walk.found.items() if tag not in wanted}
        ordered = [step.tag for step in steps if step.tag]
        own, marks, keyed = [], [], []
        for place, tag in enumerate(ordered):
            keyword = KEYWORDS[tag]
            if keyword in OWN:
                own.append(Field(place, VRS[tag], *OWN[keyword]))
            elif keyword in MARKS and not (tag == ACQUISITION_TIME and ACQUISITION_DATE_TIME in walk.found):
                name, convert = MARKS[keyword]
                marks.append(Field(place, VRS[tag], Marks._fields.index(name), convert))
            else:
                keyed.append(place)
        pattern = Pattern(
            steps=tuple(steps),
            tail=run + walk.head,
            stable=stable,
            transfer_syntax_uid=walk.transfer_syntax_uid,
            tags=tuple(ordered),
            keyed=tuple(keyed),
            own=tuple(own),
            marks=tuple(marks),
            variants={},
            layout=layout,
        )
        others = [other for other in self._patterns if other.layout is not layout]
        self._patterns = [pattern, *others[: PATTERNS - 1]]


def _kind(value: bytes, transfer_syntax_uid: str) -> tuple[int, Extent]:
    """How many bytes of an element come before its length (or its first item), and what finds its end."""
    if transfer_syntax_uid == IMPLICIT and int.from_bytes(value[:2], "little") != META_GROUP:
        return (8, _implicit_sequence) if value[4:8] == WITHOUT_LENGTH else (4, _long)
    if int.from_bytes(value[4:6], "little") in SHORT:
        return 6, _short
    return (12, _explicit_sequence) if value[8:12] == WITHOUT_LENGTH else (8, _long)
