"""What a codestream says of itself, read before a decoder is let at it."""

import struct
from dataclasses import dataclass
from typing import Final

MAX_SEGMENTS: Final = 15
"""Of an RLE frame (PS3.5 section G.5)."""
JP2: Final = b"jP  "


@dataclass(frozen=True)
class Codestream:
    """The size that a decoder will allocate by, whatever Rows and Columns say.

    Attributes:
        rows: Lines.
        columns: Samples a line.
        samples: Components.
        precision: Bits a sample, the same for every component.
        signed: Only JPEG 2000 knows of signs.
    """

    rows: int
    columns: int
    samples: int
    precision: int
    signed: bool = False


def codestream(frame: bytes) -> Codestream | None:
    """Header of a JPEG, JPEG-LS or JPEG 2000 codestream, or None where there is none or its components differ."""
    if frame[4:8] == JP2:  # a JP2 file where a bare codestream is due (PS3.5 section A.4.4); decoders take it
        frame = frame[max(0, frame.find(b"\xff\x4f\xff\x51", 0, 4096)) :]
    if frame[:4] == b"\xff\x4f\xff\x51":
        return _size_of_jpeg2000(frame)
    return _size_of_jpeg(frame)


def _size_of_jpeg2000(frame: bytes) -> Codestream | None:
    """The SIZ marker segment (ISO/IEC 15444-1 annex A.5.1), which follows SOC."""
    if len(frame) < 42:
        return None
    right, bottom, left, top = struct.unpack(">LLLL", frame[8:24])
    samples = struct.unpack(">H", frame[40:42])[0]
    components = frame[42 : 42 + 3 * min(samples, 4)]
    depths = set(components[::3])
    if not 1 <= samples <= 4 or len(components) < 3 * samples or len(depths) != 1 or left > right or top > bottom:
        return None
    depth = depths.pop()
    return Codestream(bottom - top, right - left, samples, (depth & 0x7F) + 1, depth > 0x7F)


def _size_of_jpeg(frame: bytes) -> Codestream | None:
    """The frame header: SOF (ITU-T T.81 section B.2.2) or SOF55 (ITU-T T.87 section C.2.2)."""
    position = 2
    while frame[:2] == b"\xff\xd8" and position + 10 <= len(frame) and frame[position] == 0xFF:
        marker = frame[position + 1]
        if marker == 0xFF:
            position += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            precision, rows, columns, samples = struct.unpack(">BHHB", frame[position + 4 : position + 10])
            return Codestream(rows, columns, samples, precision)
        else:
            position += 2 + struct.unpack(">H", frame[position + 2 : position + 4])[0]
    return None


def is_rle(frame: bytes, num_pixels: int, num_segments: int) -> bool:
    """Whether an RLE frame can hold that many segments of that many pixels (PS3.5 sections G.3 to G.5).

    Two bytes of PackBits make 128 at most, and the header has the number and the places of the segments.
    """
    if len(frame) < 64 or not 1 <= num_segments <= MAX_SEGMENTS:
        return False
    count, *offsets = struct.unpack("<16L", frame[:64])
    starts = offsets[:num_segments]
    if count != num_segments or starts[0] != 64 or starts != sorted(starts):
        return False
    lengths = [end - start for start, end in zip(starts, [*starts[1:], len(frame)], strict=True)]
    return all(128 * ((length + 1) // 2) >= num_pixels for length in lengths)
