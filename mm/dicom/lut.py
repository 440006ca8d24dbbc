"""Lookup tables of Modality LUT, VOI LUT and palettes, plain or segmented (PS3.3 C.7.6.3.1.5, C.7.9.2 and C.11)."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from jaxtyping import Shaped, UInt8, UInt16
from pydicom.dataset import Dataset

from mm.dicom.errors import PixelError

CHANNELS: Final = ("Red", "Green", "Blue")
PALETTE: Final = tuple(
    f"{kind}{name}PaletteColorLookupTable{part}"
    for name in CHANNELS
    for kind, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
)


@dataclass(frozen=True, eq=False)
class Lut:
    """A table of integers.

    Attributes:
        first: The stored value that takes the first entry; smaller ones take it too, and larger ones the last.
        entries: The table.
        bits: An entry's range is 0 to `2**bits - 1`.
    """

    first: int
    entries: UInt16[np.ndarray, " N"] = field(repr=False)
    bits: int

    def __call__(self, values: Shaped[np.ndarray, "Y X"]) -> UInt16[np.ndarray, "Y X"]:
        """Each value's entry; values that aren't whole are rounded."""
        places = np.clip(np.rint(values) if values.dtype.kind == "f" else values, self.first, self.last)
        found: UInt16[np.ndarray, "Y X"] = self.entries[places.astype(np.int64) - self.first]
        return found

    @property
    def last(self) -> int:
        """The stored value that takes the last entry."""
        return self.first + len(self.entries) - 1


@dataclass(frozen=True, eq=False)
class Channel:
    """One colour of a palette."""

    lut: Lut

    def __call__(self, stored: Shaped[np.ndarray, "Y X"]) -> UInt8[np.ndarray, "Y X"]:
        """The eight highest bits of each value's entry."""
        return (self.lut(stored) >> max(0, self.lut.bits - 8)).astype(np.uint8)


def _descriptor(value: object) -> tuple[int, int, int]:
    """Number of entries (0 means 65,536), the first value mapped, and bits an entry."""
    items = list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else []
    if len(items) != 3:
        raise PixelError("invalid_lut")
    number, first, bits = (int(item) for item in items)
    number &= 0xFFFF  # as SS it may have come out negative
    if not 1 <= bits <= 16:
        raise PixelError("invalid_lut")
    return number or 1 << 16, first, bits


def _words(value: object, number: int, order: str) -> list[int]:
    """LUT Data: bytes, words, or what pydicom makes of US."""
    if isinstance(value, bytes):
        wide = len(value) >= 2 * number  # entries of 8 bits lie one a byte, or one a word in old files
        return [int(item) for item in np.frombuffer(value[: number * (1 + wide)], f"{order}u2" if wide else "u1")]
    if isinstance(value, int):
        return [value]
    return [int(item) for item in value][:number] if isinstance(value, Iterable) else []


def lut_of(descriptor: object, data: object, *, signed: bool, big_endian: bool = False) -> Lut:
    """A plain table.

    Args:
        descriptor: LUTDescriptor or that of a palette.
        data: LUTData.
        signed: Whether the values it is for may be negative, so that the first is read as such.
        big_endian: How words in bytes lie.

    Raises:
        PixelError: `invalid_lut`.
    """
    number, first, bits = _descriptor(descriptor)
    entries = _words(data, number, ">" if big_endian else "<")
    if len(entries) != number or min(entries) < 0 or max(entries) >= 1 << 16:
        raise PixelError("invalid_lut")
    table = np.array(entries, np.uint16)
    if bits < 9 and int(table.max()) > 255:
        bits = 16  # a descriptor that says 8 over entries of 16 bits
    return Lut(_signed(first, signed), table, bits)


def _signed(first: int, signed: bool) -> int:
    """Explicit VR files may say US where the value is negative."""
    return first - (1 << 16) if signed and first >= 1 << 15 else first


def _segments(content: bytes, number: int, wide: bool) -> list[int]:
    """Expands segmented data: discrete (0), linear (1) and indirect (2), which repeats earlier ones (PS3.3 C.7.9.2).

    Indirect segments don't nest, and it ends at `number` entries.
    """
    code = struct.Struct("<H" if wide else "<B")
    size = code.size
    table: list[int] = []

    def at(place: int) -> int:
        return int(code.unpack_from(content, place)[0])

    def expand(place: int) -> int:
        kind, length = at(place), at(place + size)
        body = place + 2 * size
        if kind == 0:
            table.extend(at(body + size * item) for item in range(min(length, number + 1)))
            return body + size * length
        if kind != 1 or not table:
            raise PixelError("invalid_lut")
        start, end = table[-1], at(body)
        table.extend(round(start + (end - start) * step / length) for step in range(1, length + 1))
        return body + size

    place = 0
    while place + 2 * size <= len(content) and len(table) < number:
        if at(place) != 2:
            place = expand(place)
            continue
        count, low = at(place + size), place + 2 * size
        pieces = range(4 // size)  # the offset takes 32 bits, the least part first
        target = sum(at(low + size * piece) << (8 * size * piece) for piece in pieces)
        for _ in range(count):
            if target >= place or len(table) >= number or at(target) == 2:
                raise PixelError("invalid_lut")
            target = expand(target)
        place = low + 4
    return table


def palette_of(data: Dataset) -> tuple[Channel, Channel, Channel]:
    """Red, green and blue of PALETTE COLOR (PS3.3 C.7.6.3.1.5 and C.7.6.3.1.6).

    Raises:
        PixelError: `invalid_lut`.
    """
    channels = []
    for name in CHANNELS:
        descriptor = data.get(f"{name}PaletteColorLookupTableDescriptor")
        packed = data.get(f"Segmented{name}PaletteColorLookupTableData")
        signed = data.get("PixelRepresentation") == 1
        big_endian = data.original_encoding[1] is False
        if packed:
            number, first, bits = _descriptor(descriptor)
            try:
                entries = _segments(bytes(packed), number, bits > 8)
            except struct.error:
                raise PixelError("invalid_lut") from None
            if len(entries) != number:
                raise PixelError("invalid_lut")
            channels.append(Channel(Lut(_signed(first, signed), np.array(entries, np.uint16), bits)))
        else:
            plain = data.get(f"{name}PaletteColorLookupTableData")
            channels.append(Channel(lut_of(descriptor, plain, signed=signed, big_endian=big_endian)))
    red, green, blue = channels
    return red, green, blue
