"""Encapsulated Pixel Data: where the fragments of each frame lie (PS3.5 section A.4), by own eyes and bounded.

Needs no pydicom, so that it can run in threads, and reads item headers only, so that a frame of a large file costs no
more than one of a small.
"""

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from mm.dicom.errors import FileError
from mm.dicom.guard import BoundedFile

ITEM: Final = b"\xfe\xff\x00\xe0"
UNDEFINED: Final = b"\xff\xff\xff\xff"
DELIMITER: Final = b"\xfe\xff\xdd\xe0"
PIXEL_DATA: Final = b"\xe0\x7f\x10\x00"
EXTENDED_OFFSETS: Final = b"\xe0\x7f\x01\x00OV\0\0"
EXTENDED_LENGTHS: Final = b"\xe0\x7f\x02\x00OV\0\0"
TOTAL_LENGTH: Final = b"\xe0\x7f\x03\x00UV\0\0\x08\0\0\0"
STARTS: Final = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  ")
"""How a JPEG or JPEG-LS, a JPEG 2000 and a JP2 begin."""
MAX_FRAGMENTS: Final = 1 << 16
"""Of one frame, and as many more as there are frames."""


@dataclass(frozen=True)
class Fragments:
    """The items of one Pixel Data element.

    Attributes:
        places: Where each value starts in the file, and its length.
        first: Index of the first fragment of each frame, and the number of fragments at the end.
        lengths: Of each frame's codestream without padding, or None where nothing says.
    """

    places: tuple[tuple[int, int], ...]
    first: tuple[int, ...]
    lengths: tuple[int, ...] | None

    def read(self, file: BoundedFile, index: int) -> bytes:
        """The codestream of one frame.

        Raises:
            FileError: `truncated`.
        """
        parts = []
        for start, length in self.places[self.first[index] : self.first[index + 1]]:
            file.seek(start)
            parts.append(file.read(length))
            if len(parts[-1]) != length:
                raise FileError("truncated", "pixels")
        content = b"".join(parts)
        if self.lengths is None:
            return content
        if self.lengths[index] > len(content):
            raise FileError("truncated", "pixels")
        return content[: self.lengths[index]]


def fragments(file: BoundedFile, pixel_offset: int, num_frames: int) -> Fragments:
    """Finds the frames by the basic or extended offset table, or by counting, or by how codestreams begin.

    Args:
        file: Explicit little endian, as all encapsulated ones are.
        pixel_offset: Where the Pixel Data element starts.
        num_frames: NumberOfFrames.

    Raises:
        FileError: `truncated` where an item is longer than the file, `damaged` where they can't be followed or don't
            say where frames begin.
    """
    file.seek(pixel_offset)
    head = file.read(12)
    size = 12 if head[8:] == UNDEFINED else 8  # 8 where a writer forgot to make it explicit
    if head[:4] != PIXEL_DATA or head[size - 4 : size] != UNDEFINED:
        raise FileError("damaged", "encapsulated pixels")
    file.seek(pixel_offset + size)
    tag, length = _item(file)
    base = pixel_offset + size + 8 + length
    if tag == ITEM and base > file.num_bytes:
        raise FileError("truncated", "offset table")
    if tag != ITEM or length % 4:
        raise FileError("damaged", "offset table")
    table = file.read(length)
    places = _places(file, base, num_frames)
    if num_frames == 1:
        return Fragments(places, (0, len(places)), None)
    extended = _extended(file, pixel_offset, num_frames)
    offsets = extended[0] if extended else np.frombuffer(table, "<u4").tolist()
    if len(offsets) == num_frames:
        at = {start - 8 - base: number for number, (start, _) in enumerate(places)}
        first = [at.get(offset, -1) for offset in offsets]
        if first[0] == 0 and -1 not in first and all(a < b for a, b in pairwise(first)):
            return Fragments(places, (*first, len(places)), extended[1] if extended else None)
    if len(places) == num_frames:
        return Fragments(places, tuple(range(num_frames + 1)), None)
    first = [number for number, place in enumerate(places) if _begins(file, place)]
    if len(first) != num_frames or first[0] != 0:
        raise FileError("damaged", "frames can't be told apart")
    return Fragments(places, (*first, len(places)), None)


def _item(file: BoundedFile) -> tuple[bytes, int]:
    head = file.read(8)
    return head[:4], struct.unpack("<L", head[4:])[0] if len(head) == 8 else 0


def _places(file: BoundedFile, base: int, num_frames: int) -> tuple[tuple[int, int], ...]:
    """Follows the items to their end; a file may end without the delimiter."""
    places: list[tuple[int, int]] = []
    position = base
    while position + 8 <= file.num_bytes:
        file.seek(position)
        tag, length = _item(file)
        if tag == DELIMITER:
            break
        if tag != ITEM or len(places) >= MAX_FRAGMENTS + num_frames:
            raise FileError("damaged", "encapsulated pixels")
        places.append((position + 8, length))
        position += 8 + length
        if position > file.num_bytes:
            raise FileError("truncated", "pixels")
    if not places:
        raise FileError("truncated", "pixels")
    return tuple(places)


def _extended(file: BoundedFile, pixel_offset: int, num_frames: int) -> tuple[list[int], tuple[int, ...]] | None:
    """Offsets and lengths of the extended offset table (PS3.3 C.7.6.3.1.8), which lies right before the pixels."""
    size = 12 + 8 * num_frames
    for behind in (0, 20):
        start = pixel_offset - behind - 2 * size
        if start < 0:
            return None
        file.seek(start)
        content = file.read(2 * size + behind)
        offsets, lengths, total = content[:size], content[size : 2 * size], content[2 * size :]
        known = offsets.startswith(EXTENDED_OFFSETS) and lengths.startswith(EXTENDED_LENGTHS)
        if known and total[:12] in (b"", TOTAL_LENGTH):
            starts, ends = (np.frombuffer(part, "<u8", offset=12).tolist() for part in (offsets, lengths))
            return starts, tuple(ends)
    return None


def _begins(file: BoundedFile, place: tuple[int, int]) -> bool:
    file.seek(place[0])
    return file.read(min(8, place[1])).startswith(STARTS)


def items_of(value: bytes) -> list[tuple[int, int]]:
    """Where the value of each item in memory starts and ends; the first is the table of offsets.

    Args:
        value: Of the Pixel Data element, without the delimiter.

    Raises:
        FileError: `truncated` where an item is longer than what is there, `damaged` where it isn't items alone.
    """
    spans: list[tuple[int, int]] = []
    place = 0
    while place < len(value):
        if value[place : place + 4] != ITEM or len(value) - place < 8:
            raise FileError("damaged", "compressed frames")
        start = place + 8
        place = start + struct.unpack_from("<L", value, place + 4)[0]
        if place > len(value):
            raise FileError("truncated", "pixels")
        spans.append((start, place))
    if not spans:
        raise FileError("damaged", "compressed frames")
    return spans
