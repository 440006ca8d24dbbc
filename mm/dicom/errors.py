"""Why something was refused: one family of errors, each with a stable reason code.

Neither the message nor the place holds anything a patient could be known by: no element values, no UIDs
and no paths, only what is wrong and where in the stack.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Generic, Literal, TypeVar, get_args

Reason = Literal[
    # of one file
    "not_dicom",
    "dicomdir",
    "unreadable",
    "executable",
    "too_large",
    "damaged",
    "truncated",
    "expansion",
    "missing_element",
    "invalid_uid",
    "too_many_pixels",
    "duplicate_instance",
    "conflicting_instance",
    "changed",
    # of an object that is to be de-identified
    "burnt_in",
    "document",
    "unknown_object",
    # of a study
    "two_patients",
    # of its pixels
    "unsupported_pixels",
    "unsupported_transfer_syntax",
    "missing_decoder",
    "codestream_mismatch",
    "decoder_failed",
    "decoder_crashed",
    "decoder_timeout",
    "invalid_lut",
    "missing_rescale",
    "invalid_rescale",
    # of a series
    "not_a_volume",
    "not_an_image",
    "localizer",
    "multiframe",
    "functional_groups",
    "missing_part",
    "mosaic",
    "single_slice",
    "missing_geometry",
    "invalid_orientation",
    "invalid_spacing",
    "duplicate_position",
    "missing_slice",
    "broken_slice",
    "uneven_spacing",
    "gantry_tilt",
    "shifted_slice",
    # of a series that can be read
    "low_quality",
]

REASONS: Final[dict[Reason, str]] = {
    "not_dicom": "no DICOM file",
    "dicomdir": "a media directory; its files are read themselves",
    "unreadable": "the file system refuses to read it",
    "executable": "its preamble is that of a program",
    "too_large": "the file is over 2 GiB",
    "damaged": "its elements can't be parsed",
    "truncated": "it ends before its elements or pixels do",
    "expansion": "it expands to far more than its header declares",
    "missing_element": "an element that identifies it is missing or empty",
    "invalid_uid": "a UID isn't one (PS3.5 section 9.1)",
    "too_many_pixels": "a frame has over 178,956,970 pixels",
    "duplicate_instance": "another file is the same instance",
    "conflicting_instance": "another file has the same SOPInstanceUID and other content",
    "changed": "the file isn't the one that was scanned",
    "burnt_in": "its kind or its header tells of text in the pixels; look at them, then --pixels ok",
    "document": "reports and encapsulated documents can't be cleaned",
    "unknown_object": "objects other than images aren't de-identified",
    "two_patients": "two PatientIDs under one StudyInstanceUID",
    "unsupported_pixels": "only integers of 1, 8, 16 or 32 bits are read, as volume and radiograph only grey ones",
    "unsupported_transfer_syntax": "no decoder for its transfer syntax is known",
    "missing_decoder": "its transfer syntax needs a decoder: pip install 'mm-report[dicom]'",
    "codestream_mismatch": "the compressed image has another size than the header",
    "decoder_failed": "its decoder refuses the compressed image",
    "decoder_crashed": "its decoder died of the compressed image",
    "decoder_timeout": "its decoder took too long for the compressed image",
    "invalid_lut": "a lookup table is missing or isn't what its descriptor says",
    "missing_rescale": "CT without RescaleSlope and RescaleIntercept has no HU",
    "invalid_rescale": "RescaleSlope is zero or not a number",
    "not_a_volume": "no slices of a volume",
    "not_an_image": "no radiograph",
    "localizer": "a localizer",
    "multiframe": "a multi-frame object that is no stack of slices",
    "functional_groups": "its functional groups are missing, not one for each frame, or far too many",
    "missing_part": "a part of its concatenation is missing",
    "mosaic": "a mosaic of slices isn't read yet",
    "single_slice": "one slice is no volume",
    "missing_geometry": "ImagePositionPatient, ImageOrientationPatient or PixelSpacing is missing",
    "invalid_orientation": "ImageOrientationPatient isn't two unit vectors at a right angle",
    "invalid_spacing": "PixelSpacing isn't two positive numbers",
    "duplicate_position": "two slices lie in the same place",
    "missing_slice": "a slice is missing",
    "broken_slice": "a file of it can't be read, so it may lack a slice",
    "uneven_spacing": "the distance between slices changes",
    "gantry_tilt": "the slices are sheared against their normal (gantry tilt)",
    "shifted_slice": "a slice is shifted sideways or turned",
    "low_quality": "the quality guard flags it, and the pipeline is told to fail by that",
}
assert set(REASONS) == set(get_args(Reason))


Code = TypeVar("Code", bound=str)


class RefusedError(Exception, Generic[Code]):
    """Something that isn't read or written, whatever its format.

    Attributes:
        reasons: The meaning of each code.
        reason: Stable code.
        place: Where ("between slice 12 and 13"), counted along the normal from 1, or "".
    """

    reasons: ClassVar[Mapping[Any, str]]

    def __init__(self, reason: Code, place: str = "") -> None:
        self.reason: Code = reason
        self.place = place
        super().__init__(f"{reason}: {self.reasons[reason]}" + (f" ({place})" if place else ""))


class DicomError(RefusedError[Reason]):
    """A file, series or study that isn't read."""

    reasons = REASONS


class FileError(DicomError):
    """One file is no DICOM, broken, or hostile.

    Attributes:
        belongs_to: StudyInstanceUID and SeriesInstanceUID where they could be read, else None. For grouping alone:
            never part of the message.
    """

    def __init__(self, reason: Reason, place: str = "", *, belongs_to: tuple[str, str] | None = None) -> None:
        super().__init__(reason, place)
        self.belongs_to = belongs_to


class PixelError(DicomError):
    """The pixels of an instance can't be decoded to values."""


class GeometryError(DicomError):
    """The slices of a series are no regular stack."""


class QualityError(DicomError):
    """A series that can be read, but not trusted; the place has the codes (`mm.dicom.quality`)."""


class KindError(DicomError):
    """A series of another kind than was asked for."""
