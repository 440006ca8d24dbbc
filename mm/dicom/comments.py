"""What can be said beside the image in a JPEG, JPEG-LS or JPEG 2000 codestream: comments, application data, a tail.

Blanked in place: no length changes, so tables of offsets and tile lengths stay right, and so does every pixel.
"""

import re
import struct
from bisect import bisect_left
from typing import Final

from mm.dicom.errors import FileError, PixelError
from mm.dicom.fragments import items_of

SYNTAXES: Final = "1.2.840.10008.1.2."
JPEG: Final = re.compile(r"4\.(5\d|6\d|70|80|81)")
JPEG_2000: Final = re.compile(r"4\.(9[0-3]|20[1-3])")
RLE: Final = "5"
SOI, SOC = b"\xff\xd8", b"\xff\x4f"
IN_SCAN: Final = re.compile(rb"\xff+[\xc0-\xcf\xd8-\xfe]")
"""What ends a scan: a marker other than RST (ITU-T T.81 B.1.1.2)."""
KEPT: Final = {0xE0: (b"JFIF\0", 12), 0xE8: (b"mrfx", 5), 0xEE: (b"Adobe", 12)}
"""Of application data: how colours are meant, with its length; a thumbnail behind it isn't kept."""


def without_comments(value: bytes, transfer_syntax_uid: str) -> bytes:
    """Encapsulated pixels (PS3.5 section A.4) whose codestreams hold nothing but their image.

    Args:
        value: Items, the table of offsets first.
        transfer_syntax_uid: RLE is passed as it is, for it has no room for words.

    Raises:
        FileError: `damaged`, where it isn't items or a codestream can't be followed.
        PixelError: `unsupported_transfer_syntax`, where it is none of these (video).
    """
    spans = items_of(value)[1:]
    tail = transfer_syntax_uid.removeprefix(SYNTAXES)
    if tail == RLE:
        return value
    jpeg = JPEG.fullmatch(tail) is not None
    if not jpeg and JPEG_2000.fullmatch(tail) is None:
        raise PixelError("unsupported_transfer_syntax")
    joined = bytearray().join(value[start:stop] for start, stop in spans)
    _blank_all(joined, _starts(spans), jpeg=jpeg)
    out, taken = bytearray(value), 0
    for start, stop in spans:
        out[start:stop] = joined[taken : taken + stop - start]
        taken += stop - start
    return bytes(out)


def _starts(spans: list[tuple[int, int]]) -> list[int]:
    starts, place = [], 0
    for start, stop in spans:
        starts.append(place)
        place += stop - start
    return starts


def _blank_all(data: bytearray, starts: list[int], *, jpeg: bool) -> None:
    """Follows codestream after codestream; each begins with a fragment."""
    end = 0
    for start in starts:
        if start < end or start == len(data):  # goes on with the one before, or is empty
            continue
        if jpeg and data[start : start + 2] == SOI:
            stop = _jpeg(data, start + 2)
        elif not jpeg:
            begin = start if data[start : start + 2] == SOC else data.find(SOC + b"\xff\x51", start, start + 4096)
            if begin < 0:
                raise FileError("damaged", "compressed frames")
            data[start:begin] = bytes(begin - start)  # the boxes of a JP2 file
            stop = _jpeg_2000(data, begin + 2)
        else:
            raise FileError("damaged", "compressed frames")
        following = starts[place] if (place := bisect_left(starts, stop)) < len(starts) else len(data)
        data[stop:following] = bytes(following - stop)
        end = following


def _segment(data: bytearray, place: int) -> int:
    """Where the segment whose marker is at `place` ends."""
    if place + 4 > len(data):
        raise FileError("damaged", "compressed frames")
    stop: int = place + 2 + struct.unpack_from(">H", data, place + 2)[0]
    if stop > len(data) or stop < place + 4:
        raise FileError("damaged", "compressed frames")
    return stop


def _jpeg(data: bytearray, place: int) -> int:
    """Blanks from behind SOI and returns where EOI ends (ITU-T T.81 annex B, ISO/IEC 14495-1 annex C)."""
    while place + 1 < len(data):
        marker = data[place + 1]
        if data[place] != 0xFF:
            raise FileError("damaged", "compressed frames")
        if marker == 0xFF:
            place += 1
            continue
        if marker == 0xD9:
            return place + 2
        stop = _segment(data, place)
        if marker == 0xFE or 0xE0 <= marker <= 0xEF:
            known, length = KEPT.get(marker, (b"", 0))
            keep = length if known and data[place + 4 : place + 4 + len(known)] == known else 0
            begin = min(place + 4 + keep, stop)
            data[begin:stop] = bytes(stop - begin)
        if marker == 0xDA:
            found = IN_SCAN.search(data, stop)
            stop = len(data) if found is None else found.start()
        place = stop
    return len(data)


def _jpeg_2000(data: bytearray, place: int) -> int:
    """Blanks from behind SOC and returns where EOC ends (ISO/IEC 15444-1 annex A)."""
    tile_end = -1
    while place + 1 < len(data):
        marker = struct.unpack_from(">H", data, place)[0]
        if marker == 0xFFD9:
            return place + 2
        if marker == 0xFF93:  # SOD: packets up to the end of the tile part
            if tile_end < 0:
                tile_end = data.find(b"\xff\xd9", place)
                tile_end = len(data) if tile_end < 0 else tile_end
            if tile_end < place + 2:
                raise FileError("damaged", "compressed frames")
            place = tile_end
            continue
        if marker < 0xFF4F:
            raise FileError("damaged", "compressed frames")
        stop = _segment(data, place)
        if marker == 0xFF90 and stop >= place + 12:  # SOT
            length = struct.unpack_from(">L", data, place + 6)[0]
            tile_end = min(len(data), place + length) if length else -1
        if marker == 0xFF64 and stop > place + 6:  # COM, behind what kind of comment it is
            data[place + 6 : stop] = bytes(stop - place - 6)
        place = stop
    return len(data)
