"""What is kept of one file: an allowlist of elements, and what kind of object they describe."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from mm.dicom.errors import FileError
from mm.dicom.marks import Marks, moment, number, numbers

Kind = Literal[
    "volume",
    "image",
    "localizer",
    "multiframe",
    "secondary_capture",
    "segmentation",
    "document",
    "presentation",
    "other",
]

ALLOWED: Final = (
    "AccessionNumber",
    "AcquisitionDateTime",
    "AcquisitionNumber",
    "AcquisitionTime",
    "BitsAllocated",
    "BitsStored",
    "BodyPartExamined",
    "BurnedInAnnotation",
    "Columns",
    "ComplexImageComponent",
    "ConcatenationFrameOffsetNumber",
    "ConcatenationUID",
    "ContrastBolusAgent",
    "ConvolutionKernel",
    "DiffusionBValue",
    "DiffusionGradientOrientation",
    "EchoNumbers",
    "EchoTime",
    "FlipAngle",
    "FrameReferenceTime",
    "HighBit",
    "ImageLaterality",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "ImagerPixelSpacing",
    "InConcatenationNumber",
    "InConcatenationTotalNumber",
    "InstanceNumber",
    "InversionTime",
    "KVP",
    "Laterality",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "Manufacturer",
    "ManufacturerModelName",
    "Modality",
    "NominalPercentageOfCardiacPhase",
    "NumberOfFrames",
    "PatientID",
    "PatientOrientation",
    "PhotometricInterpretation",
    "PixelPaddingRangeLimit",
    "PixelPaddingValue",
    "PixelRepresentation",
    "PixelSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "Rows",
    "SOPClassUID",
    "SOPInstanceUID",
    "SamplesPerPixel",
    "SeriesInstanceUID",
    "SliceThickness",
    "StudyDate",
    "StudyInstanceUID",
    "TemporalPositionIdentifier",
    "TriggerTime",
    "Units",
    "ViewPosition",
)
"""The elements that are read at all; every other is skipped unread."""

TAGS: Final = frozenset(tag for tag in map(tag_for_keyword, ALLOWED) if tag is not None)
assert len(TAGS) == len(ALLOWED)

Elements = Dataset | dict[str, Any]
"""What `get(keyword)` is asked of: a data set of pydicom's, or what our own header walk found."""

NATIVE: Final = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
STORAGE: Final = "1.2.840.10008.5.1.4.1.1."
SINGLE_FRAME: Final = frozenset(STORAGE + tail for tail in ("2", "4", "128"))  # CT, MR, PET
RADIOGRAPHS: Final = frozenset(STORAGE + tail for tail in ("1", "1.1", "1.1.1"))  # CR, DX (presentation, processing)
MAMMOGRAMS: Final = frozenset(STORAGE + tail for tail in ("1.2", "1.2.1", "1.3", "1.3.1"))  # and intra-oral
MULTI_FRAME: Final = frozenset(("2.1", "2.2", "4.1", "4.3", "4.4", "130", "13.1.1", "13.1.2", "13.1.3"))
MULTI_FRAME_CAPTURES: Final = frozenset(("7.1", "7.2", "7.3", "7.4"))
ENHANCED: Final = frozenset(
    # Enhanced and Legacy Converted CT, MR, PET; X-Ray 3D Angiographic and Craniofacial, Breast Tomosynthesis
    STORAGE + tail
    for tail in ("2.1", "2.2", "4.1", "4.4", "130", "128.1", "13.1.1", "13.1.2", "13.1.3")
)
"""Multi-frame objects whose functional groups say where each frame lies (PS3.3 C.7.6.16)."""
FLAT_FRAMES: Final = frozenset(
    # US, Enhanced MR Colour, captures, XA, RF and their enhanced kin, NM, endoscopy and microscopy in motion
    STORAGE + tail
    for tail in (
        *MULTI_FRAME_CAPTURES,
        *("3", "3.1", "4.3", "12.1", "12.1.1", "12.2", "12.2.1", "20"),
        *("77.1.1.1", "77.1.2.1", "77.1.4.1", "77.1.5.4", "77.1.6"),
    )
)
"""Multi-frame objects that are no stack of slices."""


@dataclass(frozen=True)
class Concatenation:
    """One object in several instances (PS3.3 C.7.6.16.2.2.4).

    Attributes:
        uid: ConcatenationUID.
        number: InConcatenationNumber, from 1.
        total: InConcatenationTotalNumber, or 0 where it isn't given.
        offset: ConcatenationFrameOffsetNumber, or None.
    """

    uid: str = field(repr=False)
    number: int
    total: int
    offset: int | None


@dataclass(frozen=True)
class Instance:
    """What is kept of one file. Fields that could name a patient are left out of its `repr`.

    `position` and `orientation` are ImagePositionPatient and ImageOrientationPatient in LPS mm, `spacing`
    is (row, column) in mm; None where missing or not numbers. `pixel_offset` is where the pixel element
    starts in the (inflated) file.
    """

    path: Path = field(repr=False)
    patient_id: str = field(repr=False)
    study_date: str = field(repr=False)
    accession_number: str = field(repr=False)
    study_instance_uid: str = field(repr=False)
    series_instance_uid: str = field(repr=False)
    sop_instance_uid: str = field(repr=False)
    sop_class_uid: str
    transfer_syntax_uid: str
    kind: Kind
    modality: str
    rows: int
    columns: int
    num_frames: int
    samples: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    slope: float | None
    intercept: float | None
    rescale_type: str
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    slice_thickness: float | None
    image_type: tuple[str, ...]
    patient_orientation: tuple[str, ...]
    view: str
    laterality: str
    manufacturer: str
    model: str
    body_part: str
    kernel: str
    pixel_offset: int
    padding: tuple[int, int] | None = None
    """Lowest and highest stored value that means no data (PixelPaddingValue, PixelPaddingRangeLimit)."""
    units: str = ""
    """Units of a PET: "BQML", "CNTS", "GML" (an SUV) ..."""
    marks: Marks = field(default=Marks(), repr=False)
    concatenation: Concatenation | None = field(default=None, repr=False)
    contrast: bool = False
    """ContrastBolusAgent names one; which one isn't kept."""
    burnt_in: bool = False
    """BurnedInAnnotation is YES."""
    lossy: bool = False
    """LossyImageCompression is 01, or missing beside a ratio."""

    @property
    def frame(self) -> "Frame":
        """The plane of a single-frame instance."""
        return Frame(
            self,
            0,
            self.position,
            self.orientation,
            self.spacing,
            self.slope,
            self.intercept,
            self.rescale_type,
            self.marks,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes that its pixels take uncompressed."""
        samples: float = self.samples
        if self.photometric == "YBR_FULL_422" and self.samples == 3 and self.transfer_syntax_uid in NATIVE:
            samples = 2  # two pixels share their colour (PS3.3 section C.7.6.3.1.2)
        return int(self.rows * self.columns * samples) * self.num_frames * self.bits_allocated // 8


@dataclass(frozen=True)
class Frame:
    """One plane of pixels: a single-frame instance, or one frame of a multi-frame one, with where it lies.

    Attributes:
        instance: The file it is in.
        index: Which frame of the file, from 0.
        position: ImagePositionPatient in LPS mm.
        orientation: ImageOrientationPatient.
        spacing: (row, column) in mm.
        slope: Of the rescale, or None.
        intercept: Of the rescale, or None.
        rescale_type: Of the rescale, "" where it isn't given.
        marks: What may tell it from another plane in the same place.
    """

    instance: Instance
    index: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    slope: float | None
    intercept: float | None
    rescale_type: str = ""
    marks: Marks = field(default=Marks(), repr=False)


def _text(data: Elements, keyword: str, limit: int = 64) -> str:
    value = data.get(keyword)
    text = "" if value is None else str(value)
    return "".join(letter for letter in text if letter.isprintable()).strip()[:limit]


def _words(data: Elements, keyword: str) -> tuple[str, ...]:
    value = data.get(keyword)
    if value is None or isinstance(value, str):
        return (value,) if value else ()
    return tuple(str(item) for item in value)


def _integer(data: Elements, keyword: str, default: int = 0) -> int:
    value = data.get(keyword)
    if value is None or value == "":
        return default
    return int(value)


def _number(data: Elements, keyword: str) -> float | None:
    value = data.get(keyword)
    return None if value is None or value == "" else float(value)


def _numbers(data: Elements, keyword: str, count: int) -> tuple[float, ...] | None:
    value = data.get(keyword)
    if value is None or isinstance(value, (str, float, int)) or len(value) != count:
        return None
    return tuple(float(item) for item in value)


def _ratio_says(data: Elements) -> str:
    """What LossyImageCompression must be where LossyImageCompressionRatio is given (PS3.3 section C.7.6.1.1.5)."""
    return "01" if data.get("LossyImageCompressionRatio") not in (None, "") else ""


def _uid(data: Elements, keyword: str) -> str:
    value = data.get(keyword)
    if value is None or value == "":
        raise FileError("missing_element", keyword)
    if not isinstance(value, str) or len(value) > 64 or not re.fullmatch(r"[0-9]+(\.[0-9]+)*", value):
        raise FileError("invalid_uid", keyword)
    return str(value)


def belongs_to(data: Elements) -> tuple[str, str] | None:
    """StudyInstanceUID and SeriesInstanceUID, or None where they aren't both there."""
    try:
        return _uid(data, "StudyInstanceUID"), _uid(data, "SeriesInstanceUID")
    except FileError:
        return None


def _kind(sop_class_uid: str, modality: str, image_type: tuple[str, ...], num_frames: int) -> Kind:
    """What a SOP class is to us (PS3.4 annex B.5)."""
    tail = sop_class_uid.removeprefix(STORAGE)
    kind: Kind = "other"
    if sop_class_uid in ENHANCED:
        return "localizer" if "LOCALIZER" in image_type[2:] else "volume"
    if sop_class_uid in FLAT_FRAMES:
        kind = "multiframe"
    elif sop_class_uid in SINGLE_FRAME:
        kind = "localizer" if "LOCALIZER" in image_type[2:] else "volume"
    elif sop_class_uid in RADIOGRAPHS | MAMMOGRAMS or (tail == "7" and modality in ("CR", "DX")):
        kind = "image"  # a Secondary Capture under CR or DX is an exported radiograph
    elif tail == "7":
        kind = "secondary_capture"
    elif tail.startswith("66."):
        kind = "segmentation"
    elif tail.startswith(("88.", "104.")):
        kind = "document"
    elif tail.startswith("11."):
        kind = "presentation"
    return "multiframe" if num_frames > 1 and kind in ("volume", "image", "secondary_capture") else kind


def _is_screen_shot(data: Elements, sop_class_uid: str, image_type: tuple[str, ...]) -> bool:
    """True for what sits among slices but is none: colour, or a secondary image that lies nowhere."""
    if _integer(data, "SamplesPerPixel", 1) != 1:
        return True
    placed = data.get("ImagePositionPatient") is not None or data.get("ImageOrientationPatient") is not None
    return sop_class_uid not in ENHANCED and image_type[1:2] == ("SECONDARY",) and not placed


def _padding(data: Elements, *, signed: bool) -> tuple[int, int] | None:
    """Stored values that mean no data (PS3.3 C.7.5.1.1.2), in the representation of the pixels."""
    ends = [_optional(data, keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    found = [item & 0xFFFF for item in ends if isinstance(item, int)]
    if not isinstance(ends[0], int):
        return None
    if signed:
        found = [item - 0x10000 if item >= 0x8000 else item for item in found]
    return min(found), max(found)


def _concatenation(data: Elements) -> Concatenation | None:
    uid = _text(data, "ConcatenationUID")
    offset, number, total = (
        _optional(data, keyword)
        for keyword in ("ConcatenationFrameOffsetNumber", "InConcatenationNumber", "InConcatenationTotalNumber")
    )
    if not uid or not isinstance(number, int):
        return None
    has_offset, has_total = isinstance(offset, int), isinstance(total, int)
    return Concatenation(uid, number, total if has_total else 0, offset if has_offset else None)


def _optional(data: Elements, keyword: str) -> Any:
    """An element that a file may well have wrong without being refused for it."""
    try:
        return data.get(keyword)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return None


def _marks(data: Elements, image_type: tuple[str, ...]) -> Marks:
    component = _optional(data, "ComplexImageComponent")
    words = (*image_type, str(component)) if component else image_type
    return Marks(
        component="\\".join(words) or None,
        echo=number(_optional(data, "EchoNumbers")),
        echo_time=number(_optional(data, "EchoTime")),
        b_value=number(_optional(data, "DiffusionBValue")),
        gradient=numbers(_optional(data, "DiffusionGradientOrientation")),
        inversion=number(_optional(data, "InversionTime")),
        flip=number(_optional(data, "FlipAngle")),
        temporal=number(_optional(data, "TemporalPositionIdentifier")),
        offset=number(_optional(data, "FrameReferenceTime")),
        cardiac=number(_optional(data, "NominalPercentageOfCardiacPhase")),
        trigger=number(_optional(data, "TriggerTime")),
        tube=number(_optional(data, "KVP")),
        kernel=_text(data, "ConvolutionKernel", 16) or None,
        acquisition=number(_optional(data, "AcquisitionNumber")),
        acquired=moment(_optional(data, "AcquisitionDateTime")) or moment(_optional(data, "AcquisitionTime")),
        number=number(_optional(data, "InstanceNumber")),
    )


def instance_of(path: Path, data: Elements, transfer_syntax_uid: str, pixel_offset: int) -> Instance:
    """Takes the allowed elements out of a data set.

    Raises:
        FileError: `missing_element` or `invalid_uid`.
        ValueError: An element holds no number where one is due (as pydicom raises it, value quoted: guard it).
    """
    modality = _text(data, "Modality", 16)
    image_type = _words(data, "ImageType")
    num_frames = _integer(data, "NumberOfFrames", 1)
    sop_class_uid = _uid(data, "SOPClassUID")
    bits_stored = _integer(data, "BitsStored")
    date = re.sub(r"\D", "", _text(data, "StudyDate"))
    signed = _integer(data, "PixelRepresentation") == 1
    kind = _kind(sop_class_uid, modality, image_type, num_frames)
    if kind == "volume" and _is_screen_shot(data, sop_class_uid, image_type):
        kind = "secondary_capture"
    return Instance(
        path=path,
        patient_id=_text(data, "PatientID"),
        study_date=date if len(date) == 8 else "",
        accession_number=_text(data, "AccessionNumber"),
        study_instance_uid=_uid(data, "StudyInstanceUID"),
        series_instance_uid=_uid(data, "SeriesInstanceUID"),
        sop_instance_uid=_uid(data, "SOPInstanceUID"),
        sop_class_uid=sop_class_uid,
        transfer_syntax_uid=transfer_syntax_uid,
        kind=kind,
        modality=modality,
        rows=_integer(data, "Rows"),
        columns=_integer(data, "Columns"),
        num_frames=num_frames,
        samples=_integer(data, "SamplesPerPixel", 1),
        photometric=_text(data, "PhotometricInterpretation", 16),
        bits_allocated=_integer(data, "BitsAllocated"),
        bits_stored=bits_stored,
        high_bit=_integer(data, "HighBit", bits_stored - 1),
        signed=signed,
        slope=_number(data, "RescaleSlope"),
        intercept=_number(data, "RescaleIntercept"),
        rescale_type=_text(data, "RescaleType", 16),
        position=_numbers(data, "ImagePositionPatient", 3),
        orientation=_numbers(data, "ImageOrientationPatient", 6),
        # PixelSpacing is calibrated where a radiograph has both (PS3.3 section 10.7.1.3).
        spacing=_numbers(data, "PixelSpacing", 2) or _numbers(data, "ImagerPixelSpacing", 2),
        slice_thickness=_number(data, "SliceThickness"),
        image_type=image_type,
        patient_orientation=_words(data, "PatientOrientation"),
        view=_text(data, "ViewPosition", 16),
        laterality=_text(data, "ImageLaterality", 16) or _text(data, "Laterality", 16),
        manufacturer=_text(data, "Manufacturer"),
        model=_text(data, "ManufacturerModelName"),
        body_part=_text(data, "BodyPartExamined", 16),
        kernel=_text(data, "ConvolutionKernel", 16),
        pixel_offset=pixel_offset,
        padding=_padding(data, signed=signed),
        units=_text(data, "Units", 16),
        marks=_marks(data, image_type),
        concatenation=_concatenation(data),
        contrast=_text(data, "ContrastBolusAgent").upper() not in ("", "NONE", "NO"),
        burnt_in=_text(data, "BurnedInAnnotation", 16).upper() == "YES",
        lossy=(_text(data, "LossyImageCompression", 16) or _ratio_says(data)) == "01",
    )
