"""The functional groups of a multi-frame object (PS3.3 C.7.6.16): what each frame says of itself.

A walk of our own over the bytes before the pixels, because thousands of frames hold hundreds of thousands of
elements: only the wanted ones are looked at, private and other sequences are skipped by their length. No recursion
on what the file nests; the number of steps is bounded.
"""

import struct
from dataclasses import dataclass, field
from typing import Final

from pydicom.datadict import tag_for_keyword
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from mm.dicom.errors import FileError
from mm.dicom.guard import inflate, open_file
from mm.dicom.header import behind_meta
from mm.dicom.instance import Instance

MAX_BYTES: Final = 256 << 20  # before the pixels
MAX_STEPS: Final = 3_000_000  # elements walked
MAX_FRAMES: Final = 100_000
MAX_DEPTH: Final = 32
UNDEFINED: Final = 0xFFFFFFFF
ITEM: Final = 0xFFFEE000
END_OF_ITEM: Final = 0xFFFEE00D
END_OF_SEQUENCE: Final = 0xFFFEE0DD
SHARED: Final = 0x52009229
PER_FRAME: Final = 0x52009230
LONG: Final = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))


def _tags(*keywords: str) -> frozenset[int]:
    tags = frozenset(tag for tag in map(tag_for_keyword, keywords) if tag is not None)
    assert len(tags) == len(keywords)
    return tags


MACROS: Final = _tags(
    "CTImageFrameTypeSequence",
    "CTReconstructionSequence",
    "CTXRayDetailsSequence",
    "CardiacSynchronizationSequence",
    "DiffusionGradientDirectionSequence",
    "FrameContentSequence",
    "MRDiffusionSequence",
    "MREchoSequence",
    "MRImageFrameTypeSequence",
    "MRModifierSequence",
    "MRTimingAndRelatedParametersSequence",
    "PETFrameTypeSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
    "PlaneOrientationSequence",
    "PlanePositionSequence",
    "RespiratorySynchronizationSequence",
    "TemporalPositionSequence",
    "UnassignedPerFrameConvertedAttributesSequence",
    "UnassignedSharedConvertedAttributesSequence",
    "XRay3DFrameTypeSequence",
)
"""Sequences that are looked into, one item each."""
WANTED: Final = _tags(
    "AcquisitionNumber",
    "ComplexImageComponent",
    "ConvolutionKernel",
    "DiffusionBValue",
    "DiffusionGradientOrientation",
    "DimensionIndexValues",
    "EchoNumbers",
    "EchoTime",
    "EffectiveEchoTime",
    "FlipAngle",
    "FrameAcquisitionDateTime",
    "FrameAcquisitionNumber",
    "FrameReferenceDateTime",
    "FrameReferenceTime",
    "FrameType",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "InversionTime",
    "InversionTimes",
    "KVP",
    "NominalCardiacTriggerDelayTime",
    "NominalPercentageOfCardiacPhase",
    "NominalPercentageOfRespiratoryPhase",
    "PixelSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "StackID",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "TemporalPositionTimeOffset",
    "TriggerTime",
)

Group = dict[int, bytes]
"""Raw values by tag."""


@dataclass(frozen=True)
class Groups:
    """The functional groups of one object.

    Attributes:
        shared: Of all frames.
        frames: Of each frame.
        order: "<" or ">", of numbers.
    """

    shared: Group = field(repr=False)
    frames: tuple[Group, ...] = field(repr=False)
    order: str


class _Walk:
    """A position-free reader of one data set in memory."""

    def __init__(self, content: bytes, *, order: str, implicit: bool, num_frames: int) -> None:
        self.content = content
        self.order = order
        self.implicit = implicit
        self.num_frames = num_frames
        self.steps = 0
        self.tag = struct.Struct(order + "HH").unpack_from
        self.long = struct.Struct(order + "L").unpack_from
        self.short = struct.Struct(order + "H").unpack_from

    def element(self, at: int, *, implicit: bool) -> tuple[int, int, int, bool]:
        """Tag, length, where the value starts, and whether its content is implicit VR whatever the file is."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise FileError("functional_groups")
        group, number = self.tag(self.content, at)
        tag = group << 16 | number
        if implicit or group == 0xFFFE:
            return tag, self.long(self.content, at + 4)[0], at + 8, implicit
        vr = self.content[at + 4 : at + 6]
        if vr in LONG:
            return tag, self.long(self.content, at + 8)[0], at + 12, vr == b"UN"
        return tag, self.short(self.content, at + 6)[0], at + 8, False

    def skipped(self, at: int, *, implicit: bool) -> int:
        """Behind a value of undefined length, which starts here (PS3.5 section 7.5)."""
        open_ones = [(False, implicit)]  # innermost last: whether it is an item, and whether it is implicit VR
        while open_ones:
            in_item, plain = open_ones[-1]
            tag, length, start, inner = self.element(at, implicit=plain)
            if tag == (END_OF_ITEM if in_item else END_OF_SEQUENCE):
                open_ones.pop()
                at = start
            elif not in_item and tag != ITEM:
                raise FileError("damaged", "functional groups")
            elif length == UNDEFINED:
                if len(open_ones) == MAX_DEPTH:
                    raise FileError("damaged", "functional groups")
                open_ones.append((not in_item, inner))
                at = start
            else:
                at = start + length
        return at

    def behind(self, length: int, start: int, *, implicit: bool) -> int:
        """Behind the value of an element."""
        return self.skipped(start, implicit=implicit) if length == UNDEFINED else start + length

    def items(
        self, length: int, start: int, limit: int, *, depth: int, implicit: bool, merged: Group | None = None
    ) -> list[Group]:
        """The wanted elements of every item of a sequence.

        Args:
            length: Of the sequence.
            start: Of its first item.
            limit: Number of items that are allowed.
            depth: Macros around it.
            implicit: Its content is implicit VR, as in a file of that kind or under a VR of UN.
            merged: Takes the elements of all items, the first of a tag first, instead of one group each.

        Raises:
            FileError: `functional_groups` where there are more items.
        """
        end = None if length == UNDEFINED else start + length
        if end is not None and end > len(self.content):
            raise FileError("damaged", "functional groups")
        at = start
        found: list[Group] = []
        while end is None or at < end:
            tag, size, at, _ = self.element(at, implicit=implicit)
            if tag == END_OF_SEQUENCE and end is None:
                break
            if tag != ITEM:
                raise FileError("damaged", "functional groups")
            if len(found) == limit:
                raise FileError("functional_groups")
            group: Group = {} if merged is None else merged
            found.append(group)
            at = self.item(size, at, group, depth=depth, implicit=implicit)
        return found

    def item(self, length: int, at: int, group: Group, *, depth: int, implicit: bool) -> int:
        """Collects the wanted elements of one item and of the macros in it; returns where it ends."""
        end = None if length == UNDEFINED else at + length
        while end is None or at < end:
            tag, size, start, plain = self.element(at, implicit=implicit)
            if tag == END_OF_ITEM and end is None:
                return start
            if tag in MACROS and depth < 3:
                self.items(size, start, MAX_DEPTH, depth=depth + 1, implicit=plain, merged=group)
            elif tag in WANTED and size != UNDEFINED:
                group.setdefault(tag, self.content[start : start + size])
            at = self.behind(size, start, implicit=plain)
        return at

    def groups(self, at: int) -> Groups:
        """Walks the data set that starts here."""
        shared: Group = {}
        frames: list[Group] = []
        while at < len(self.content):
            tag, length, start, plain = self.element(at, implicit=self.implicit)
            if tag == SHARED:
                self.items(length, start, 1, depth=0, implicit=plain, merged=shared)
            elif tag == PER_FRAME:
                frames = self.items(length, start, self.num_frames, depth=0, implicit=plain)
                break
            at = self.behind(length, start, implicit=plain)
        if len(frames) != self.num_frames:
            raise FileError("functional_groups")
        return Groups(shared, tuple(frames), self.order)


def _start(content: bytes) -> int:
    """Where the data set starts behind preamble and meta group, if they are there (PS3.10 section 7.1)."""
    if content[128:132] != b"DICM":
        return 0
    walk = _Walk(content, order="<", implicit=False, num_frames=0)
    at = 132
    while at + 8 <= len(content) and content[at : at + 2] == b"\2\0":
        _, length, start, _ = walk.element(at, implicit=False)
        at = start + length
    return at


def read_groups(instance: Instance) -> Groups:
    """The functional groups of a multi-frame instance.

    Raises:
        FileError: `functional_groups` where there isn't one item a frame or there are far too many; `damaged` or
            `unreadable`.
    """
    if instance.pixel_offset > MAX_BYTES or instance.num_frames > MAX_FRAMES:
        raise FileError("functional_groups")
    syntax = instance.transfer_syntax_uid
    with open_file(instance.path) as file:
        if syntax == DeflatedExplicitVRLittleEndian:
            content, at = inflate(behind_meta(file), instance.pixel_offset), 0
        else:
            content = file.read(instance.pixel_offset)
            at = _start(content)
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    implicit = syntax == ImplicitVRLittleEndian
    walk = _Walk(content, order=order, implicit=implicit, num_frames=instance.num_frames)
    try:
        return walk.groups(at)
    except struct.error:
        raise FileError("damaged", "functional groups") from None
