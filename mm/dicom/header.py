"""One file's header: an allowlist of elements, read in bounded memory, pixels left where they are."""

import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_dataset, read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from mm.dicom.errors import DicomError, FileError

Kind = Literal[
    "volume", "image", "localizer", "multiframe", "secondary_capture", "segmentation", "document", "presentation", "other"
]

MAX_FILE_BYTES: Final = 2 << 30
MAX_FRAME_PIXELS: Final = 178_956_970  # Pillow's limit of decompression bombs
MAX_HEADER_BYTES: Final = 16 << 20
PROGRAMS: Final = (b"MZ", b"\x7fELF", b"#!", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")
BROKEN: Final = (
    InvalidDicomError,
    BytesLengthException,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What pydicom raises on broken input. Its messages quote element values, so none is passed on."""

ALLOWED: Final = (
    "AccessionNumber",
    "BitsAllocated",
    "BitsStored",
    "BodyPartExamined",
    "Columns",
    "ConvolutionKernel",
    "HighBit",
    "ImageLaterality",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "ImagerPixelSpacing",
    "Laterality",
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

STORAGE: Final = "1.2.840.10008.5.1.4.1.1."
SINGLE_FRAME: Final = frozenset(STORAGE + tail for tail in ("2", "4", "128"))  # CT, MR, PET
RADIOGRAPHS: Final = frozenset(STORAGE + tail for tail in ("1", "1.1", "1.1.1"))  # CR, DX for presentation, for processing
MULTI_FRAME: Final = ("2.1", "2.2", "4.1", "4.3", "4.4", "130", "7.1", "7.2", "7.3", "7.4", "13.1.1", "13.1.2", "13.1.3")


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

    @property
    def num_bytes(self) -> int:
        """Bytes that its pixels take uncompressed."""
        return self.rows * self.columns * self.samples * self.num_frames * self.bits_allocated // 8


class BoundedFile(io.BufferedReader):
    """A file that never allocates more than it holds, whatever length an element claims."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.num_bytes = os.fstat(raw.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes, and no more than are left."""
        left = max(0, self.num_bytes - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


@contextmanager
def guarded() -> Iterator[None]:
    """Silences pydicom's warnings (they quote element values) and turns what it raises into a FileError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except DicomError:
            raise
        except OSError:
            raise FileError("unreadable") from None
        except BROKEN:
            raise FileError("damaged") from None


def inflate(packed: bytes, limit: int) -> bytes:
    """Raw deflate (PS3.5 section A.5) up to `limit` bytes; what lies beyond is left packed."""
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, limit)


def open_file(path: Path) -> BoundedFile:
    """Opens a regular file of at most 2 GiB (a pipe would block, a device never ends).

    Raises:
        FileError: `unreadable`, `not_dicom` or `too_large`.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FileError("not_dicom")
        if status.st_size > MAX_FILE_BYTES:
            raise FileError("too_large")
        return BoundedFile(io.FileIO(path))
    except OSError:
        raise FileError("unreadable") from None


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


def _uid(data: Dataset, keyword: str) -> str:
    value = data.get(keyword)
    if value is None or value == "":
        raise FileError("missing_element", keyword)
    if not isinstance(value, str) or len(value) > 64 or not re.fullmatch(r"[0-9]+(\.[0-9]+)*", value):
        raise FileError("invalid_uid", keyword)
    return str(value)


def _kind(sop_class_uid: str, modality: str, image_type: tuple[str, ...], num_frames: int) -> Kind:
    """What a SOP class is to us (PS3.4 annex B.5)."""
    tail = sop_class_uid.removeprefix(STORAGE)
    kind: Kind = "other"
    if tail in MULTI_FRAME:
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


def _instance(path: Path, data: Dataset, transfer_syntax_uid: str, pixel_offset: int) -> Instance:
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
    )


def pixel_element(head: bytes, transfer_syntax_uid: str) -> tuple[int, int] | None:
    """Length of the element's own header and of its value, or None where no Pixel Data starts here."""
    order = ">" if transfer_syntax_uid == ExplicitVRBigEndian else "<"
    if len(head) < 12 or struct.unpack(order + "HH", head[:4]) != (0x7FE0, 0x0010):
        return None
    if transfer_syntax_uid == ImplicitVRLittleEndian:
        return 8, struct.unpack("<L", head[4:8])[0]
    return 12, struct.unpack(order + "L", head[8:12])[0]


def _check_pixels(instance: Instance, head: bytes, num_bytes: int) -> None:
    """Declared size against what is there, before anything is decoded."""
    if instance.rows * instance.columns > MAX_FRAME_PIXELS:
        raise FileError("too_many_pixels")
    if min(instance.rows, instance.columns, instance.bits_allocated, instance.num_frames) < 1:
        raise FileError("missing_element", "Rows, Columns or BitsAllocated")
    element = pixel_element(head, instance.transfer_syntax_uid)
    if element is None:
        raise FileError("truncated", "no pixels")
    start, length = element
    left = num_bytes - instance.pixel_offset - start
    if length != 0xFFFFFFFF and (length > left or length < instance.num_bytes):
        raise FileError("truncated", "pixels")


def _is_part10(head: bytes) -> bool:
    """True with a preamble, False for a bare data set (as written before 1993).

    Raises:
        FileError: `not_dicom` or `executable`.
    """
    if head[128:132] == b"DICM":
        if head.startswith(PROGRAMS):
            raise FileError("executable")
        return True
    group, vr_or_length = head[:2], head[4:8]
    plausible = len(head) >= 132 and group in (b"\x02\x00", b"\x08\x00") and head[3:4] == b"\x00"
    if not plausible or not (vr_or_length[:2].isalpha() or struct.unpack("<L", vr_or_length)[0] < 1024):
        raise FileError("not_dicom")
    return False


def _deflated_header(path: Path, file: BoundedFile) -> Instance:
    """A deflated file is inflated no further than its own header accounts for."""
    file.seek(144)  # behind preamble, magic and the element that gives the length of the meta group
    file.seek(132)
    meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, _vr, _len: tag.group != 2)
    packed = file.read()
    head = inflate(packed, MAX_HEADER_BYTES)
    stream = io.BytesIO(head)
    data = read_dataset(
        stream, False, True, stop_when=lambda tag, _vr, _len: tag >= 0x7FE00008, specific_tags=_tags()
    )
    assert meta is not None
    instance = _instance(path, data, str(DeflatedExplicitVRLittleEndian), stream.tell())
    limit = stream.tell() + 12 + instance.num_bytes + MAX_HEADER_BYTES
    num_bytes = count_inflated(packed, limit)
    if instance.rows:
        _check_pixels(instance, head[instance.pixel_offset : instance.pixel_offset + 12], num_bytes)
    return instance
