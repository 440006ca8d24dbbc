"""Reading one file's header in bounded memory; the pixels stay where they are."""

import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from mm.dicom.allowlist import TAGS
from mm.dicom.elements import WINDOW, TooDeep, Unsure, elements, walk
from mm.dicom.errors import FileError
from mm.dicom.guard import (
    BROKEN,
    MAX_FILE_BYTES,
    PROGRAMS,
    BoundedFile,
    check_ratio,
    count_inflated,
    guarded,
    inflate,
    open_file,
)
from mm.dicom.instance import NATIVE, Instance, belongs_to, instance_of
from mm.dicom.siblings import Siblings

MAX_FRAME_PIXELS: Final = 178_956_970  # Pillow's limit of decompression bombs
MAX_HEADER_BYTES: Final = 16 << 20
TRANSFER_SYNTAX: Final = 0x00020010
PIXELS: Final = 0x7FE00008  # Float, Double Float and Pixel Data
FLOATS: Final = tuple(struct.pack(order + "HH", 0x7FE0, tag) for order in "<>" for tag in (0x0008, 0x0009))
"""Tags of Float and Double Float Pixel Data."""
POSITIONAL: Final = hasattr(os, "pread") and hasattr(os, "O_NONBLOCK")
PIXEL_KINDS: Final = ("volume", "image", "localizer", "multiframe", "secondary_capture")


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
    if instance.kind not in PIXEL_KINDS:
        return
    if instance.rows * instance.columns > MAX_FRAME_PIXELS:
        raise FileError("too_many_pixels")
    if min(instance.rows, instance.columns, instance.bits_allocated, instance.num_frames) < 1:
        raise FileError("missing_element", "Rows, Columns or BitsAllocated")
    element = pixel_element(head, instance.transfer_syntax_uid)
    if element is None:
        is_float = head[:4] in FLOATS
        raise FileError("unsupported_pixels", "floating point") if is_float else FileError("truncated", "no pixels")
    start, length = element
    left = num_bytes - instance.pixel_offset - start
    if instance.transfer_syntax_uid not in NATIVE:
        frame_bytes = instance.num_bytes // instance.num_frames
        runs = instance.transfer_syntax_uid == RLELossless
        check_ratio(frame_bytes=frame_bytes, num_frames=instance.num_frames, held=left, runs=runs)
    elif length == 0xFFFFFFFF or length > left or length < instance.num_bytes:
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


def _transfer_syntax(stream: BoundedFile) -> str:
    """Reads the meta group and leaves the stream at the first element behind it (PS3.10 section 7.1)."""
    tags: list[BaseTag | int] = [TRANSFER_SYNTAX]
    meta = read_dataset(stream, False, True, stop_when=lambda tag, _vr, _length: tag >> 16 != 2, specific_tags=tags)
    uid = meta.get("TransferSyntaxUID")
    return str(uid) if uid else str(ImplicitVRLittleEndian)


def behind_meta(file: BoundedFile) -> bytes:
    """What follows the meta group, whose length its first element tells (PS3.10 section 7.1)."""
    file.seek(132)
    first = file.read(12)
    if len(first) < 12 or first[:8] != b"\x02\x00\x00\x00UL\x04\x00":
        raise FileError("damaged", "meta group")
    file.seek(144 + struct.unpack("<L", first[8:12])[0])
    return file.read()


def read_elements(stream: BoundedFile | io.BytesIO, transfer_syntax_uid: str) -> Dataset:
    """The allowed elements from here to the pixels, which are left unread."""
    return read_dataset(
        stream,
        transfer_syntax_uid == ImplicitVRLittleEndian,
        transfer_syntax_uid != ExplicitVRBigEndian,
        stop_when=lambda tag, _vr, _length: tag >= PIXELS,
        specific_tags=list(TAGS),
    )


def read_header(path: str | Path, siblings: Siblings | None = None) -> Instance:
    """The allowed elements of one file: by our own walk where that is sure of them, else by pydicom's.

    Args:
        path: The file.
        siblings: What was learnt from files read before; None for a single file.

    Raises:
        FileError: It is no DICOM file, broken, hostile, or doesn't say what it is. Where the elements got so far, it
            knows the series that the file belongs to.
    """
    return walk_header(path, siblings) or parse_header(path)


def walk_header(path: str | Path, siblings: Siblings | None = None) -> Instance | None:
    """The instance that `parse_header` would return, or None where only that can tell.

    Raises:
        FileError: `not_dicom`, `executable`, or `damaged` where sequences are nested too deep.
    """
    if not POSITIONAL:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without a writer won't block
    except OSError:
        return None
    try:
        # A tenth of what `fstat` costs. What isn't a regular file has no end to seek or none to read to, and is left
        # to `parse_header`, which asks what it is.
        num_bytes = os.lseek(descriptor, 0, os.SEEK_END)
        if num_bytes > MAX_FILE_BYTES:
            return None
        window = os.pread(descriptor, (siblings and siblings.window) or WINDOW, 0)
        if not _is_part10(window):
            return None
        try:
            return _instance(os.fspath(path), descriptor, window, num_bytes, siblings)
        except TooDeep:
            raise FileError("damaged", "depth of sequences") from None
        except (Unsure, FileError, *BROKEN):
            return None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _instance(file: str, descriptor: int, window: bytes, num_bytes: int, siblings: Siblings | None) -> Instance:
    known = None if siblings is None else siblings.read(file, window)
    if known is not None:
        _check_pixels(*known, num_bytes)
        return known[0]
    if len(window) < min(WINDOW, num_bytes):
        window = os.pread(descriptor, WINDOW, 0)
    walked = walk(descriptor, window, num_bytes)
    instance = instance_of(file, elements(walked.found), walked.transfer_syntax_uid, walked.offset)
    _check_pixels(instance, walked.head, num_bytes)
    if siblings is not None:
        siblings.learn(window, walked)
    return instance


def parse_header(path: str | Path) -> Instance:
    """The allowed elements of one file through pydicom.

    Raises:
        FileError: As `read_header`.
    """
    with guarded(), open_file(Path(path)) as file:
        head = file.read(132)
        if _is_part10(head):
            transfer_syntax_uid = _transfer_syntax(file)
        else:
            file.seek(0)
            explicit = head[4:6].isalpha()
            transfer_syntax_uid = str(ExplicitVRLittleEndian if explicit else ImplicitVRLittleEndian)
        if transfer_syntax_uid != DeflatedExplicitVRLittleEndian:
            data = read_elements(file, transfer_syntax_uid)
            offset = file.tell()
            with _of_series(data):
                if offset > file.num_bytes:
                    raise FileError("truncated", "header")
                instance = instance_of(os.fspath(path), data, transfer_syntax_uid, offset)
                _check_pixels(instance, file.read(12), file.num_bytes)
            return instance
        packed = behind_meta(file)
        inflated = inflate(packed, MAX_HEADER_BYTES)
        stream = io.BytesIO(inflated)
        data = read_elements(stream, transfer_syntax_uid)
        with _of_series(data):
            instance = instance_of(os.fspath(path), data, transfer_syntax_uid, stream.tell())
            check_ratio(frame_bytes=instance.num_bytes, num_frames=1, held=len(packed), runs=False)
            limit = instance.pixel_offset + instance.num_bytes + MAX_HEADER_BYTES
            num_bytes = count_inflated(packed, limit)
            _check_pixels(instance, inflated[instance.pixel_offset :][:12], num_bytes)
        return instance


@contextmanager
def _of_series(data: Dataset) -> Iterator[None]:
    """What goes wrong inside is told with the series that the elements name."""
    with guarded():
        uids = belongs_to(data)
    try:
        with guarded():
            yield
    except FileError as error:
        raise FileError(error.reason, error.place, belongs_to=uids) from None
