"""What is kept of one file."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from mm.dicom import values
from mm.dicom.errors import FileError
from mm.dicom.kinds import ENHANCED, MODALITIES, OTHER, Kind, kind_of
from mm.dicom.marks import Marks, moment, number, numbers

NATIVE: Final = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


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
    """What is kept of one file. Fields that could name a patient, and all free text, are left out of its `repr`.

    `file` is where it lies: text, because making a `Path` takes a fifth of the time that reading a header does.
    `position` and `orientation` are ImagePositionPatient and ImageOrientationPatient in LPS mm, `spacing`
    is (row, column) in mm; None where missing or not numbers. `pixel_offset` is where the pixel element
    starts in the (inflated) file.
    """

    file: str = field(repr=False)
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
    photometric: str = field(repr=False)
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    slope: float | None
    intercept: float | None
    rescale_type: str = field(repr=False)
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    slice_thickness: float | None
    image_type: tuple[str, ...] = field(repr=False)
    patient_orientation: tuple[str, ...] = field(repr=False)
    view: str = field(repr=False)
    laterality: str = field(repr=False)
    manufacturer: str = field(repr=False)
    model: str = field(repr=False)
    body_part: str = field(repr=False)
    kernel: str = field(repr=False)
    pixel_offset: int
    padding: tuple[int, int] | None = None
    """Lowest and highest stored value that means no data (PixelPaddingValue, PixelPaddingRangeLimit)."""
    units: str = field(default="", repr=False)
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
    def path(self) -> Path:
        """Where it lies."""
        return Path(self.file)

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


def _ratio_says(data: values.Elements) -> str:
    """What LossyImageCompression must be where LossyImageCompressionRatio is given (PS3.3 section C.7.6.1.1.5)."""
    return "01" if data.get("LossyImageCompressionRatio") not in (None, "") else ""


def belongs_to(data: values.Elements) -> tuple[str, str] | None:
    """StudyInstanceUID and SeriesInstanceUID, or None where they aren't both there."""
    try:
        return values.uid(data, "StudyInstanceUID"), values.uid(data, "SeriesInstanceUID")
    except FileError:
        return None


def _is_screen_shot(data: values.Elements, sop_class_uid: str, image_type: tuple[str, ...]) -> bool:
    """True for what sits among slices but is none: colour, or a secondary image that lies nowhere."""
    if values.integer(data, "SamplesPerPixel", 1) != 1:
        return True
    placed = data.get("ImagePositionPatient") is not None or data.get("ImageOrientationPatient") is not None
    return sop_class_uid not in ENHANCED and image_type[1:2] == ("SECONDARY",) and not placed


def _padding(data: values.Elements, *, signed: bool) -> tuple[int, int] | None:
    """Stored values that mean no data (PS3.3 C.7.5.1.1.2), in the representation of the pixels."""
    ends = [values.optional(data, keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    found = [item & 0xFFFF for item in ends if isinstance(item, int)]
    if not isinstance(ends[0], int):
        return None
    if signed:
        found = [item - 0x10000 if item >= 0x8000 else item for item in found]
    return min(found), max(found)


def _concatenation(data: values.Elements) -> Concatenation | None:
    uid = values.text(data, "ConcatenationUID")
    offset, number, total = (
        values.optional(data, keyword)
        for keyword in ("ConcatenationFrameOffsetNumber", "InConcatenationNumber", "InConcatenationTotalNumber")
    )
    if not uid or not isinstance(number, int):
        return None
    has_offset, has_total = isinstance(offset, int), isinstance(total, int)
    return Concatenation(uid, number, total if has_total else 0, offset if has_offset else None)


def _marks(data: values.Elements, image_type: tuple[str, ...]) -> Marks:
    component = values.optional(data, "ComplexImageComponent")
    words = (*image_type, str(component)) if component else image_type
    return Marks(
        component="\\".join(words) or None,
        echo=number(values.optional(data, "EchoNumbers")),
        echo_time=number(values.optional(data, "EchoTime")),
        b_value=number(values.optional(data, "DiffusionBValue")),
        gradient=numbers(values.optional(data, "DiffusionGradientOrientation")),
        inversion=number(values.optional(data, "InversionTime")),
        flip=number(values.optional(data, "FlipAngle")),
        temporal=number(values.optional(data, "TemporalPositionIdentifier")),
        offset=number(values.optional(data, "FrameReferenceTime")),
        cardiac=number(values.optional(data, "NominalPercentageOfCardiacPhase")),
        trigger=number(values.optional(data, "TriggerTime")),
        tube=number(values.optional(data, "KVP")),
        kernel=values.text(data, "ConvolutionKernel", 16) or None,
        acquisition=number(values.optional(data, "AcquisitionNumber")),
        acquired=moment(values.optional(data, "AcquisitionDateTime"))
        or moment(values.optional(data, "AcquisitionTime")),
        number=number(values.optional(data, "InstanceNumber")),
    )


def instance_of(file: str, data: values.Elements, transfer_syntax_uid: str, pixel_offset: int) -> Instance:
    """Takes the allowed elements out of a data set.

    Raises:
        FileError: `missing_element` or `invalid_uid`.
        ValueError: An element holds no number where one is due (as pydicom raises it, value quoted: guard it).
    """
    named = values.text(data, "Modality", 16)
    modality = named if named in MODALITIES or not named else OTHER  # it is shown, so nothing else gets in
    image_type = values.words(data, "ImageType")
    num_frames = values.integer(data, "NumberOfFrames", 1)
    sop_class_uid = values.uid(data, "SOPClassUID")
    bits_stored = values.integer(data, "BitsStored")
    date = re.sub(r"\D", "", values.text(data, "StudyDate"))
    signed = values.integer(data, "PixelRepresentation") == 1
    kind = kind_of(sop_class_uid, modality, image_type, num_frames)
    if kind == "volume" and _is_screen_shot(data, sop_class_uid, image_type):
        kind = "secondary_capture"
    return Instance(
        file=file,
        patient_id=values.text(data, "PatientID"),
        study_date=date if len(date) == 8 else "",
        accession_number=values.text(data, "AccessionNumber"),
        study_instance_uid=values.uid(data, "StudyInstanceUID"),
        series_instance_uid=values.uid(data, "SeriesInstanceUID"),
        sop_instance_uid=values.uid(data, "SOPInstanceUID"),
        sop_class_uid=sop_class_uid,
        transfer_syntax_uid=transfer_syntax_uid,
        kind=kind,
        modality=modality,
        rows=values.integer(data, "Rows"),
        columns=values.integer(data, "Columns"),
        num_frames=num_frames,
        samples=values.integer(data, "SamplesPerPixel", 1),
        photometric=values.text(data, "PhotometricInterpretation", 16),
        bits_allocated=values.integer(data, "BitsAllocated"),
        bits_stored=bits_stored,
        high_bit=values.integer(data, "HighBit", bits_stored - 1),
        signed=signed,
        slope=values.real(data, "RescaleSlope"),
        intercept=values.real(data, "RescaleIntercept"),
        rescale_type=values.text(data, "RescaleType", 16),
        position=values.reals(data, "ImagePositionPatient", 3),
        orientation=values.reals(data, "ImageOrientationPatient", 6),
        # PixelSpacing is calibrated where a radiograph has both (PS3.3 section 10.7.1.3).
        spacing=values.reals(data, "PixelSpacing", 2) or values.reals(data, "ImagerPixelSpacing", 2),
        slice_thickness=values.real(data, "SliceThickness"),
        image_type=image_type,
        patient_orientation=values.words(data, "PatientOrientation"),
        view=values.text(data, "ViewPosition", 16),
        laterality=values.text(data, "ImageLaterality", 16) or values.text(data, "Laterality", 16),
        manufacturer=values.text(data, "Manufacturer"),
        model=values.text(data, "ManufacturerModelName"),
        body_part=values.text(data, "BodyPartExamined", 16),
        kernel=values.text(data, "ConvolutionKernel", 16),
        pixel_offset=pixel_offset,
        padding=_padding(data, signed=signed),
        units=values.text(data, "Units", 16),
        marks=_marks(data, image_type),
        concatenation=_concatenation(data),
        contrast=values.text(data, "ContrastBolusAgent").upper() not in ("", "NONE", "NO"),
        burnt_in=values.text(data, "BurnedInAnnotation", 16).upper() == "YES",
        lossy=(values.text(data, "LossyImageCompression", 16) or _ratio_says(data)) == "01",
    )
