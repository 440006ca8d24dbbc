"""DICOM instances of a phantom study: CT Image Storage and Digital X-Ray Image Storage - For Presentation.

pydicom builds one header a series (PS3.3 A.3 and A.26); for each slice only the bytes of what differs are
patched, which is thirty times faster than building each (all patched values have a fixed width).
"""

import hashlib
import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final

import numpy as np
from jaxtyping import Float, UInt16
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, CTImageStorage, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

TODAY: Final = date(2026, 6, 30)
"""Date of every current visit; priors lie before it."""
RESCALE_INTERCEPT: Final = -1024
DX_STEPS: Final = 4095
IMPLEMENTATION_UID: Final = "2.25.329800735698586629295641978511506172918"
_UID_WIDTH: Final = 44
_PIXEL_DATA: Final = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 0)[:8]


@dataclass(frozen=True)
class Header:
    """What the instances of one study share.

    Attributes:
        study_instance_uid: Of the visit.
        patient_id: The same for all visits of a patient.
        accession_number: Of the visit.
        study_date: Of the visit.
        sex: F or M.
        age: In years.
    """

    study_instance_uid: str
    patient_id: str
    accession_number: str
    study_date: date
    sex: str
    age: int

    @classmethod
    def of(cls, *, seed: int, visit: int, days: float, sex: str, age: int) -> "Header":
        """The header of a phantom patient's visit; everything follows from the arguments."""
        return cls(
            study_instance_uid=uid("study", seed, visit),
            patient_id=f"PHANTOM-{_digest('patient', seed) % 10**12:012d}",
            accession_number=f"P{_digest('accession', seed, visit) % 10**12:012d}",
            study_date=TODAY - timedelta(days=round(days)),
            sex=sex,
            age=age,
        )


def _digest(*parts: str | int) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, ("mm phantom", *parts))).encode()).digest()[:16], "big")


def uid(*parts: str | int) -> str:
    """A UID under 2.25 (PS3.5 B.2) made of a hash of the parts; always 44 characters long."""
    shortest = 10**38
    return f"2.25.{shortest + _digest(*parts) % (2**128 - shortest)}"


def ct_instances(
    header: Header,
    voxels: Float[np.ndarray, "Z Y X"],
    affine: Float[np.ndarray, "4 4"],
    *,
    kernel: str,
) -> Iterator[tuple[str, bytes]]:
    """One CT series, slice by slice in the order of axis 0.

    Args:
        header: Of the study.
        voxels: HU; rounded to whole numbers.
        affine: Voxel index (z, y, x, 1) to LPS; its column 0 must be along the slice normal.
        kernel: ConvolutionKernel.

    Yields:
        SOPInstanceUID and the whole file.
    """
    num_slices, rows, columns = voxels.shape
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    cosines = affine[:3, :3] / spacing
    normal = np.cross(cosines[:, 2], cosines[:, 1])
    assert np.allclose(normal, cosines[:, 0], atol=1e-6), "slices must be stacked along their normal"
    dataset = _common(header, modality="CT", sop_class=CTImageStorage)
    dataset.SeriesNumber = 2
    dataset.SeriesDescription = "Chest CT (phantom)"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.KVP = "120"
    dataset.ConvolutionKernel = kernel
    dataset.SliceThickness = _decimal(spacing[0])
    dataset.PatientPosition = "HFS"
    dataset.FrameOfReferenceUID = uid("frame", header.study_instance_uid)
    dataset.PositionReferenceIndicator = ""
    dataset.ImagePositionPatient = [_decimal(0.0)] * 3
    dataset.ImageOrientationPatient = [_decimal(value) for value in (*cosines[:, 2], *cosines[:, 1])]
    dataset.SliceLocation = _decimal(0.0)
    dataset.PixelSpacing = [_decimal(spacing[1]), _decimal(spacing[2])]
    dataset.AcquisitionNumber = 1
    dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    dataset.RescaleIntercept = str(RESCALE_INTERCEPT)
    dataset.RescaleSlope = "1"
    dataset.RescaleType = "HU"
    dataset.WindowCenter = ["-600", "40"]
    dataset.WindowWidth = ["1500", "400"]
    template = _Template(dataset, rows, columns)
    stored = (np.rint(voxels) - RESCALE_INTERCEPT).clip(-32768, 32767).astype("<i2")
    for index in range(num_slices):
        instance = uid("ct", header.study_instance_uid, index)
        position = affine[:3, 3] + affine[:3, 0] * index
        template.patch_uid(instance)
        template.patch(0x0020, 0x0013, b"IS", f"{index + 1:<6d}")
        template.patch(0x0020, 0x0032, b"DS", "\\".join(_decimal(value) for value in position))
        template.patch(0x0020, 0x1041, b"DS", _decimal(position @ cosines[:, 0]))
        yield instance, template.file(stored[index].tobytes())


def dx_instance(
    header: Header, pixels: Float[np.ndarray, "Y X"], *, spacing_mm: tuple[float, float]
) -> tuple[str, bytes]:
    """One radiograph, posterior-anterior, the patient's left on the right, MONOCHROME2 with 12 bits.

    Args:
        header: Of the study.
        pixels: 0 (black) to 1 (white).
        spacing_mm: Of rows and columns.

    Returns:
        SOPInstanceUID and the whole file.
    """
    dataset = _common(header, modality="DX", sop_class=DigitalXRayImageStorageForPresentation)
    dataset.SeriesNumber = 1
    dataset.SeriesDescription = "Chest PA (phantom)"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", ""]
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.ViewPosition = "PA"
    dataset.PatientOrientation = ["L", "F"]
    dataset.ImageLaterality = "U"
    dataset.AcquisitionNumber = 1
    dataset.KVP = "120"
    dataset.DetectorType = "DIRECT"
    dataset.ImagerPixelSpacing = [_decimal(value) for value in spacing_mm]
    dataset.PixelSpacing = [_decimal(value) for value in spacing_mm]
    dataset.PixelSpacingCalibrationType = "GEOMETRY"
    dataset.AnatomicRegionSequence = Sequence([_code("51185008", "Chest")])
    dataset.ViewCodeSequence = Sequence([_code("399348003", "postero-anterior")])
    dataset.AcquisitionContextSequence = Sequence([])
    dataset.PixelIntensityRelationship = "LOG"
    dataset.PixelIntensityRelationshipSign = -1
    dataset.RescaleIntercept = "0"
    dataset.RescaleSlope = "1"
    dataset.RescaleType = "US"
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.LossyImageCompression = "00"
    dataset.BitsStored = 12
    dataset.HighBit = 11
    dataset.PixelRepresentation = 0
    dataset.WindowCenter = "2048"
    dataset.WindowWidth = "4096"
    template = _Template(dataset, *pixels.shape)
    instance = uid("dx", header.study_instance_uid)
    template.patch_uid(instance)
    template.patch(0x0020, 0x0013, b"IS", f"{1:<6d}")
    return instance, template.file(dx_stored(pixels).tobytes())


def dx_stored(pixels: Float[np.ndarray, "Y X"]) -> UInt16[np.ndarray, "Y X"]:
    """The stored values of a radiograph between 0 and 1."""
    stored: UInt16[np.ndarray, "Y X"] = np.rint(pixels.clip(0, 1) * DX_STEPS).astype("<u2")
    return stored


def _common(header: Header, *, modality: str, sop_class: UID) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = UID(uid("placeholder"))
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(IMPLEMENTATION_UID)
    meta.ImplementationVersionName = "MM_PHANTOM_1"  # pydicom's own would change the bytes with its version
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    day = header.study_date.strftime("%Y%m%d")
    dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID = uid("placeholder")
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = day
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = "080000"
    dataset.AccessionNumber = header.accession_number
    dataset.Modality = modality
    dataset.Manufacturer = "mm phantom"
    dataset.ManufacturerModelName = "procedural"
    dataset.DeviceSerialNumber = "0"
    dataset.SoftwareVersions = "1"
    dataset.ReferringPhysicianName = ""
    dataset.StudyDescription = "Chest (phantom, no real patient)"
    dataset.PatientName = f"Phantom^{header.patient_id[-6:]}"
    dataset.PatientID = header.patient_id
    dataset.PatientBirthDate = ""
    dataset.PatientSex = header.sex
    dataset.PatientAge = f"{header.age:03d}Y"
    dataset.BodyPartExamined = "CHEST"
    dataset.StudyInstanceUID = header.study_instance_uid
    dataset.SeriesInstanceUID = uid("series", header.study_instance_uid, modality)
    dataset.StudyID = "1"
    dataset.InstanceNumber = "100000"  # six characters, patched
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = 16
    dataset.BurnedInAnnotation = "NO"
    return dataset


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue = value
    item.CodingSchemeDesignator = "SCT"
    item.CodeMeaning = meaning
    return item


def _decimal(value: float) -> str:
    """A decimal string of 14 characters, whatever the value (PS3.5 6.2, DS: at most 16)."""
    text = f"{round(float(value), 11) + 0.0:+.11f}"[:14]  # adding zero turns -0 into 0
    assert abs(float(text) - value) < 1e-5
    return text


class _Template:
    """The bytes of a file up to its pixels, with the places of what changes from slice to slice."""

    def __init__(self, dataset: FileDataset, rows: int, columns: int) -> None:
        dataset.Rows = rows
        dataset.Columns = columns
        dataset.PixelData = bytes(rows * columns * 2)
        dataset["PixelData"].VR = "OW"
        buffer = io.BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        self._head = bytearray(buffer.getvalue()[: -rows * columns * 2])
        assert self._head[-12:-4] == _PIXEL_DATA
        self._num_bytes = rows * columns * 2

    def patch(self, group: int, element: int, vr: bytes, text: str) -> None:
        """Overwrites the value of an element; the length must not change."""
        tag = struct.pack("<HH2s", group, element, vr)
        place = self._head.index(tag)
        assert self._head.find(tag, place + 1) < 0, "the tag's bytes occur twice"
        (length,) = struct.unpack_from("<H", self._head, place + 6)
        value = text.encode("ascii")
        assert len(value) <= length <= len(value) + 1, "a patched value keeps its length"
        self._head[place + 8 : place + 8 + length] = value.ljust(length)

    def patch_uid(self, instance: str) -> None:
        """Overwrites MediaStorageSOPInstanceUID and SOPInstanceUID."""
        assert len(instance) == _UID_WIDTH
        self.patch(0x0002, 0x0003, b"UI", instance)
        self.patch(0x0008, 0x0018, b"UI", instance)

    def file(self, pixels: bytes) -> bytes:
        """The whole file."""
        assert len(pixels) == self._num_bytes
        return bytes(self._head) + pixels
