"""Opening files that nobody vouches for: bounded memory, no blocking, no messages that quote patient data."""

import io
import logging
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pydicom.errors import BytesLengthException, InvalidDicomError

from mm.dicom.errors import DicomError, FileError

MAX_FILE_BYTES: Final = 2 << 30
MAX_RATIO: Final = 200
"""Of compression, above what costs nothing."""
FREE_FRAME_BYTES: Final = 16 << 20
FREE_BYTES: Final = 64 << 20
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
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What pydicom raises on broken input. Its messages quote element values, so none is passed on."""


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
    logger = logging.getLogger("pydicom")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        except DicomError:
            raise
        except OSError as error:  # pydicom raises some of its own, without a number
            raise FileError("damaged" if error.errno is None else "unreadable") from None
        except BROKEN:
            raise FileError("damaged") from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise FileError("damaged") from None  # a decoder in Rust (RLE); it derives from BaseException alone
        finally:
            logger.setLevel(level)


def inflate(packed: bytes, limit: int) -> bytes:
    """Raw deflate (PS3.5 section A.5) up to `limit` bytes; what lies beyond is left packed."""
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, limit)


def count_inflated(packed: bytes, limit: int) -> int:
    """How many bytes it inflates to, a mebibyte at a time.

    Raises:
        FileError: `expansion`, at the first byte over `limit`.
    """
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    total = 0
    rest = packed
    while rest and not engine.eof:
        part = engine.decompress(rest, 1 << 20)
        total += len(part)
        if total > limit:
            raise FileError("expansion")
        if not part:
            break
        rest = engine.unconsumed_tail
    return total


def check_ratio(*, frame_bytes: int, num_frames: int, held: int, runs: bool) -> None:
    """Whether compressed pixels can be what the header declares, before a decoder allocates for them.

    Real images shrink to a tenth, lossy ones to a fiftieth; small ones cost little whatever they claim.

    Args:
        frame_bytes: Of one frame, uncompressed.
        num_frames: How many are declared.
        held: Bytes of the file behind the pixel element's header.
        runs: RLE, where two bytes stand for 128 at most (PS3.5 annex G).

    Raises:
        FileError: `truncated` or `expansion`.
    """
    if num_frames * 8 > held or (runs and frame_bytes * num_frames > 64 * held):
        raise FileError("truncated", "pixels")
    ratio = MAX_RATIO * held
    if frame_bytes > FREE_FRAME_BYTES + ratio // num_frames or frame_bytes * num_frames > FREE_BYTES + ratio:
        raise FileError("expansion", "pixels")


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
