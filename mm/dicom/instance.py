"""What is kept of one file: an allowlist of elements, and what kind of object they describe."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset

from mm.dicom.errors import FileError

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
    "BitsAllocated",
    "BitsStored",
    "BodyPartExamined",
    "BurnedInAnnotation",
    "Columns",
    "ContrastBolusAgent",
    "ConvolutionKernel",
    "HighBit",
    "ImageLaterality",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "ImagerPixelSpacing",
    "Laterality",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "Manufacturer",
    "ManufacturerModelName",
    "Modality",
    "NumberOfFrames",
    "PatientID",
    "PatientOrientation",
    "PhotometricInterpretation",
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
    "ViewPosition",
)
"""The elements that are read at all; every other is skipped unread."""

TAGS: Final = frozenset(tag for tag in map(tag_for_keyword, ALLOWED) if tag is not None)
assert len(TAGS) == len(ALLOWED)

STORAGE: Final = "1.2.840.10008.5.1.4.1.1."
SINGLE_FRAME: Final = frozenset(STORAGE + tail for tail in ("2", "4", "128"))  # CT, MR, PET
RADIOGRAPHS: Final = frozenset(STORAGE + tail for tail in ("1", "1.1", "1.1.1"))  # CR, DX (presentation, processing)
MULTI_FRAME: Final = frozenset(("2.1", "2.2", "4.1", "4.3", "4.4", "130", "13.1.1", "13.1.2", "13.1.3"))
MULTI_FRAME_CAPTURES: Final = frozenset(("7.1", "7.2", "7.3", "7.4"))


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
    contrast: bool
    """ContrastBolusAgent names one; which one isn't kept."""
    burnt_in: bool
    """BurnedInAnnotation is YES."""
    lossy: bool
    """LossyImageCompression is 01, or missing beside a ratio."""

    @property
    def frame(self) -> "Frame":
        """The plane of a single-frame instance."""
        return Frame(self, 0, self.position, self.orientation, self.spacing, self.slope, self.intercept)

    @property
    def num_bytes(self) -> int:
        """Bytes that its pixels take uncompressed."""
        return self.rows * self.columns * self.samples * self.num_frames * self.bits_allocated // 8


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
    """

    instance: Instance
    index: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    slope: float | None
    intercept: float | None


def _text(data: Dataset, keyword: str, limit: int = 64) -> str:
    value = data.get(keyword)
    text = "" if value is None else str(value)
    return "".join(letter for letter in text if letter.isprintable()).strip()[:limit]


def _words(data: Dataset, keyword: str) -> tuple[str, ...]:
    value = data.get(keyword)
    if value is None or isinstance(value, str):
        return (value,) if value else ()
    return tuple(str(item) for item in value)


def _integer(data: Dataset, keyword: str, default: int = 0) -> int:
    value = data.get(keyword)
    if value is None or value == "":
        return default
    return int(value)


def _number(data: Dataset, keyword: str) -> float | None:
    value = data.get(keyword)
    return None if value is None or value == "" else float(value)


def _numbers(data: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    value = data.get(keyword)
    if value is None or isinstance(value, (str, float, int)) or len(value) != count:
        return None
    return tuple(float(item) for item in value)


def _ratio_says(data: Dataset) -> str:
    """What LossyImageCompression must be where LossyImageCompressionRatio is given (PS3.3 section C.7.6.1.1.5)."""
    return "01" if data.get("LossyImageCompressionRatio") not in (None, "") else ""


def _uid(data: Dataset, keyword: str) -> str:
    value = data.get(keyword)
    if value is None or value == "":
        raise FileError("missing_element", keyword)
    if not isinstance(value, str) or len(value) > 64 or not re.fullmatch(r"[0-9]+(\.[0-9]+)*", value):
        raise FileError("invalid_uid", keyword)
    return str(value)


def belongs_to(data: Dataset) -> tuple[str, str] | None:
    """StudyInstanceUID and SeriesInstanceUID, or None where they aren't both there."""
    try:
        return _uid(data, "StudyInstanceUID"), _uid(data, "SeriesInstanceUID")
    except FileError:
        return None


def _kind(sop_class_uid: str, modality: str, image_type: tuple[str, ...], num_frames: int) -> Kind:
    """What a SOP class is to us (PS3.4 annex B.5)."""
    tail = sop_class_uid.removeprefix(STORAGE)
    kind: Kind = "other"
    if tail in MULTI_FRAME | MULTI_FRAME_CAPTURES:
        kind = "multiframe"
    elif sop_class_uid in SINGLE_FRAME:
        kind = "localizer" if "LOCALIZER" in image_type[2:] else "volume"
    elif sop_class_uid in RADIOGRAPHS or (tail == "7" and modality in ("CR", "DX")):
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


def instance_of(path: Path, data: Dataset, transfer_syntax_uid: str, pixel_offset: int) -> Instance:
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
        kind=_kind(sop_class_uid, modality, image_type, num_frames),
        modality=modality,
        rows=_integer(data, "Rows"),
        columns=_integer(data, "Columns"),
        num_frames=num_frames,
        samples=_integer(data, "SamplesPerPixel", 1),
        photometric=_text(data, "PhotometricInterpretation", 16),
        bits_allocated=_integer(data, "BitsAllocated"),
        bits_stored=bits_stored,
        high_bit=_integer(data, "HighBit", bits_stored - 1),
        signed=_integer(data, "PixelRepresentation") == 1,
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
        contrast=_text(data, "ContrastBolusAgent").upper() not in ("", "NONE", "NO"),
        burnt_in=_text(data, "BurnedInAnnotation", 16).upper() == "YES",
        lossy=(_text(data, "LossyImageCompression", 16) or _ratio_says(data)) == "01",
    )
