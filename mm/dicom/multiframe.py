"""The frames of a multi-frame object, each with its own place, rescale and marks (PS3.3 C.7.6.16)."""

import struct
from collections.abc import Iterable
from typing import Final

from pydicom.datadict import dictionary_VR, tag_for_keyword

from mm.dicom.errors import FileError, GeometryError
from mm.dicom.groups import WANTED, Group, Groups, read_groups
from mm.dicom.instance import Concatenation, Frame, Instance
from mm.dicom.marks import Marks, moment

BINARY: Final = {"FD": "d", "FL": "f", "UL": "L", "US": "H"}
KEYWORDS: Final = {tag: dictionary_VR(tag) for tag in WANTED}


class _Elements:
    """What a frame says: its own functional groups before the shared ones."""

    def __init__(self, groups: Groups, own: Group) -> None:
        self.groups = groups
        self.own = own

    def raw(self, keyword: str) -> tuple[str, bytes] | None:
        """VR and value, or None where it is missing or empty."""
        tag = tag_for_keyword(keyword)
        assert tag is not None
        value = self.own.get(tag) or self.groups.shared.get(tag)
        return (KEYWORDS[tag], value) if value else None

    def text(self, keyword: str) -> str | None:
        """Printable ASCII of it."""
        found = self.raw(keyword)
        text = "" if found is None else found[1].decode("ascii", "replace").strip(" \0")
        return "".join(letter for letter in text if letter.isprintable())[:256] or None

    def numbers(self, keyword: str) -> tuple[float, ...] | None:
        """All its values.

        Raises:
            FileError: `damaged`, where one is no number.
        """
        found = self.raw(keyword)
        if found is None:
            return None
        vr, value = found
        try:
            if vr in BINARY:
                kind = BINARY[vr]
                count = len(value) // struct.calcsize(f"<{kind}")
                values = struct.unpack(f"{self.groups.order}{count}{kind}", value)
            else:
                values = tuple(float(item) for item in value.decode("ascii").strip(" \0").split("\\"))
        except (struct.error, ValueError):
            raise FileError("damaged", "functional groups") from None
        return tuple(item + 0.0 for item in values)

    def number(self, *keywords: str) -> float | None:
        """First value of the first of these elements that is there."""
        for keyword in keywords:
            values = self.numbers(keyword)
            if values:
                return values[0] if abs(values[0]) < float("inf") else None
        return None

    def vector(self, keyword: str, count: int) -> tuple[float, ...] | None:
        """Its values if there are so many."""
        values = self.numbers(keyword)
        return values if values is not None and len(values) == count else None


def _marks(instance: Instance, given: _Elements) -> Marks:
    whole = instance.marks
    words = (given.text("FrameType"), given.text("ComplexImageComponent"))
    concatenation = instance.concatenation
    name = instance.sop_instance_uid if concatenation is None else concatenation.uid
    order = 0.0 if concatenation is not None or whole.number is None else whole.number
    acquisition = given.number("FrameAcquisitionNumber", "AcquisitionNumber")
    return Marks(
        component="\\".join(word for word in words if word) or whole.component,
        echo=given.number("EchoNumbers"),
        echo_time=given.number("EffectiveEchoTime", "EchoTime"),
        b_value=given.number("DiffusionBValue"),
        gradient=given.vector("DiffusionGradientOrientation", 3),
        inversion=given.number("InversionTimes", "InversionTime"),
        flip=given.number("FlipAngle"),
        temporal=given.number("TemporalPositionIndex", "TemporalPositionIdentifier"),
        offset=given.number("TemporalPositionTimeOffset", "FrameReferenceTime"),
        cardiac=given.number("NominalPercentageOfCardiacPhase", "NominalCardiacTriggerDelayTime"),
        respiratory=given.number("NominalPercentageOfRespiratoryPhase"),
        trigger=given.number("TriggerTime"),
        tube=given.number("KVP"),
        kernel=given.text("ConvolutionKernel"),
        acquisition=whole.acquisition if acquisition is None else acquisition,
        reference=moment(given.text("FrameReferenceDateTime")),
        dimensions=given.numbers("DimensionIndexValues"),
        object=f"{order:012.1f}/{name}",
        stack=given.text("StackID"),
        acquired=moment(given.text("FrameAcquisitionDateTime")),
    )


def frames_of(instance: Instance) -> list[Frame]:
    """Every frame of an enhanced CT, MR or PET (or kin), in the order of the file.

    What a frame's functional groups don't say is None; only orientation, spacing and rescale are also looked for in
    the object itself, where older writers put them.

    Raises:
        FileError: The functional groups can't be read, or there isn't one for each frame.
    """
    groups = read_groups(instance)
    frames = []
    for index, own in enumerate(groups.frames):
        given = _Elements(groups, own)
        slope, intercept = given.number("RescaleSlope"), given.number("RescaleIntercept")
        frames.append(
            Frame(
                instance,
                index,
                given.vector("ImagePositionPatient", 3),
                given.vector("ImageOrientationPatient", 6) or instance.orientation,
                given.vector("PixelSpacing", 2) or instance.spacing,
                instance.slope if slope is None else slope,
                instance.intercept if intercept is None else intercept,
                given.text("RescaleType") or instance.rescale_type,
                _marks(instance, given),
            )
        )
    return frames


def check_concatenations(instances: Iterable[Instance]) -> None:
    """Refuses objects of which an instance is missing (PS3.3 C.7.6.16.2.2.4).

    Raises:
        GeometryError: `missing_part`.
    """
    parts: dict[str, list[tuple[Concatenation, int]]] = {}
    for item in instances:
        if item.concatenation is not None:
            parts.setdefault(item.concatenation.uid, []).append((item.concatenation, item.num_frames))
    for members in parts.values():
        before = 0
        members.sort(key=lambda member: member[0].number)
        for number, (part, num_frames) in enumerate(members, start=1):
            if part.number != number or part.offset not in (None, before) or part.total not in (0, len(members)):
                raise GeometryError("missing_part")
            before += num_frames
