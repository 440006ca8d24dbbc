"""DICOM files byte by byte, as a library that writes good ones can't write them; and how they are tried."""

import base64
import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image as Picture

from mm.dicom.errors import DicomError
from mm.dicom.image import read_image
from mm.dicom.pixels import read_pixels
from mm.dicom.scan import scan
from mm.dicom.volume import read_volume

CANARY = "KANARIE"
"""Stands in every element that could name a patient; in no message, no log, no repr."""
LONG = ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")
ROOT = "1.2.840.10008.1.2"
IMPLICIT, EXPLICIT, DEFLATED, BIG = ROOT, ROOT + ".1", ROOT + ".1.99", ROOT + ".2"
BASELINE, EXTENDED, LOSSLESS = ROOT + ".4.50", ROOT + ".4.51", ROOT + ".4.70"
JPEG_LS, J2K, HTJ2K, RLE = ROOT + ".4.80", ROOT + ".4.90", ROOT + ".4.201", ROOT + ".5"
CT, DX, CAPTURE, ENHANCED = (f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("2", "1.1", "7", "2.1"))
SIDE = 16
PIXELS = (16 * np.arange(SIDE)[:, None] + 3 * np.arange(SIDE)).astype("<u2")

# `dcmcjpeg` of DCMTK wrote these: PIXELS by process 14, and min(PIXELS, 255) by process 2 and 4.
LOSSLESS_FRAME = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/wwALEAAQABABAREA/8QAFgABAQEAAAAAAAAAAAAAAAAAAgUQ/9oACAEBAAEAAM22222226DbbbbbbboNttttttug2222222"
    "6DbbbbbbboNttttttug22222226DbbbbbbboNttttttug22222226DbbbbbbboNttttttug22222226DbbbbbbboNttttttug2222222////Z"
)
JPEG_LS_FRAME = base64.b64decode(  # CharLS
    "/9j/9wALCQAQABABAREA/9oACAEBAAAAALd29ubbbdsI7K0kqquCP/9j3/9pz/95r/9xj/9xb/9xT/9yX/9kP/9e/39z/33P/3a//1r/f//Z"
)
EXTENDED_FRAME = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYUGBIUFRT/"
    "wQALCAAQABABAREA/8QAFwAAAwEAAAAAAAAAAAAAAAAABgcICf/EAB8QAAEEAQUBAAAAAAAAAAAAAAEAAgUIBAMRJDKicv/aAAgBAQAAPwCW4StvXi+UwIStvXi+"
    "VorCVuADScXYfKOImv2Njhp1GabV/9k="
)


def number(value: int, order: str = "<") -> bytes:
    return struct.pack(order + "H", value)


def element(
    tag: int, vr: str, value: bytes, *, length: int | None = None, implicit: bool = False, order: str = "<"
) -> bytes:
    """One element; `length` is what its header claims, right or wrong."""
    value += b"\0" * (len(value) % 2) if vr in ("UI", "OB") else b" " * (len(value) % 2)
    claimed = len(value) if length is None else length
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
    if implicit:
        return head + struct.pack("<L", claimed) + value
    if vr in LONG:
        return head + vr.encode() + struct.pack(order + "HL", 0, claimed) + value
    return head + vr.encode() + struct.pack(order + "H", claimed & 0xFFFF) + value


Elements = dict[int, tuple[str, bytes]]


def header(order: str = "<", **options: int) -> Elements:
    """Elements of a CT slice of SIDE x SIDE pixels; `options`: bits, number (of the slice)."""
    bits, slice_number = options.get("bits", 16), options.get("number", 1)
    return {
        0x00080008: ("CS", b"ORIGINAL\\PRIMARY\\AXIAL"),
        0x00080016: ("UI", CT.encode()),
        0x00080018: ("UI", b"1.2.3.4.%d" % slice_number),
        0x00080020: ("DA", b"20240102"),
        0x00080050: ("SH", CANARY.encode()),
        0x00080060: ("CS", b"CT"),
        0x00080070: ("LO", b"ACME"),
        0x00080080: ("LO", CANARY.encode()),
        0x00081030: ("LO", CANARY.encode()),
        0x00100010: ("PN", CANARY.encode()),
        0x00100020: ("LO", CANARY.encode()),
        0x00180015: ("CS", b"CHEST"),
        0x00180050: ("DS", b"2.5"),
        0x0020000D: ("UI", b"1.2.3"),
        0x0020000E: ("UI", b"1.2.3.1"),
        0x00200032: ("DS", b"0\\0\\%d" % (2 * slice_number)),
        0x00200037: ("DS", b"1\\0\\0\\0\\1\\0"),
        0x00280002: ("US", number(1, order)),
        0x00280004: ("CS", b"MONOCHROME2"),
        0x00280010: ("US", number(SIDE, order)),
        0x00280011: ("US", number(SIDE, order)),
        0x00280030: ("DS", b"1\\1"),
        0x00280100: ("US", number(bits, order)),
        0x00280101: ("US", number(bits, order)),
        0x00280102: ("US", number(bits - 1, order)),
        0x00280103: ("US", number(0, order)),
        0x00281052: ("DS", b"-1024"),
        0x00281053: ("DS", b"1"),
        0x00290010: ("LO", CANARY.encode()),
        0x00291001: ("LO", CANARY.encode()),
    }


def items(*frames: bytes, table: bytes = b"", end: bool = True) -> bytes:
    """Fragments of an encapsulated PixelData (PS3.5 section A.4)."""
    out = b""
    for frame in (table, *frames):
        frame += b"\0" * (len(frame) % 2)
        out += b"\xfe\xff\x00\xe0" + struct.pack("<L", len(frame)) + frame
    return out + (b"\xfe\xff\xdd\xe0\0\0\0\0" if end else b"")


def rle(pixels: np.ndarray) -> bytes:
    """One frame in literal runs (PS3.5 annex G)."""
    planes = [pixels.astype(">u2").view(np.uint8).reshape(*pixels.shape, 2)[..., byte].tobytes() for byte in (0, 1)]
    coded = [b"".join(bytes([len(run) - 1]) + run for run in _runs(plane)) for plane in planes]
    coded = [part + b"\x80" * (len(part) % 2) for part in coded]
    return struct.pack("<16L", 2, 64, 64 + len(coded[0]), *([0] * 13)) + b"".join(coded)


def _runs(plane: bytes) -> list[bytes]:
    return [plane[start : start + 128] for start in range(0, len(plane), 128)]


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Picture.fromarray(np.minimum(pixels, 255).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def j2k(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Picture.fromarray(pixels).save(buffer, "JPEG2000", no_jp2=True)
    return buffer.getvalue()


FRAMES = {
    RLE: rle(PIXELS), BASELINE: jpeg(PIXELS), EXTENDED: EXTENDED_FRAME, LOSSLESS: LOSSLESS_FRAME,
    JPEG_LS: JPEG_LS_FRAME, J2K: j2k(PIXELS), HTJ2K: j2k(PIXELS),
}  # fmt: skip
EIGHT_BITS = (BASELINE, EXTENDED)


@dataclass
class File:
    """A file in the making: what goes before, and the elements in their order."""

    syntax: str = EXPLICIT
    elements: Elements = field(default_factory=header)
    pixels: bytes | None = None
    """The whole pixel element, tag and all; None: PIXELS by the transfer syntax."""
    preamble: bytes = b"\0" * 128
    meta: bytes | None = None
    behind: bytes = b""

    @property
    def order(self) -> str:
        return ">" if self.syntax == BIG else "<"

    def but(self, changes: Mapping[int, tuple[str, bytes] | None]) -> "File":
        """The same with elements replaced, or (None) removed; in the order of tags."""
        merged = {**self.elements, **changes}
        self.elements = {tag: merged[tag] for tag in sorted(merged) if merged[tag] is not None}
        return self

    def pieces(self) -> list[bytes]:
        """The elements, then the pixels."""
        implicit = self.syntax == IMPLICIT
        parts = [
            element(tag, vr, value, implicit=implicit, order=self.order) for tag, (vr, value) in self.elements.items()
        ]
        return [*parts, self._pixels() if self.pixels is None else self.pixels, self.behind]

    def _pixels(self) -> bytes:
        if self.syntax in FRAMES:
            return element(0x7FE00010, "OB", items(FRAMES[self.syntax]), length=0xFFFFFFFF)
        stored = PIXELS.astype(self.order + "u2").tobytes()
        return element(0x7FE00010, "OW", stored, implicit=self.syntax == IMPLICIT, order=self.order)

    def head(self) -> bytes:
        """Preamble and meta group."""
        meta = element(0x00020002, "UI", CT.encode()) + element(0x00020003, "UI", b"1.2.3.4.1")
        meta += element(0x00020010, "UI", self.syntax.encode())
        first = element(0x00020000, "UL", struct.pack("<L", len(meta)))
        return self.preamble + b"DICM" + (first + meta if self.meta is None else self.meta)

    def bytes(self) -> bytes:
        data = b"".join(self.pieces())
        return self.head() + (deflated(data) if self.syntax == DEFLATED else data)


def deflated(data: bytes) -> bytes:
    engine = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return engine.compress(data) + engine.flush()


def of_syntax(syntax: str, slice_number: int = 1) -> File:
    """A good file of a transfer syntax."""
    order = ">" if syntax == BIG else "<"
    return File(syntax, header(order, bits=8 if syntax in EIGHT_BITS else 16, number=slice_number))


def try_folder(folder: Path) -> list[str]:
    """What becomes of everything below a folder: a reason for each refusal, "read" for each that is read.

    Whatever isn't a `DicomError` passes through. Its text and repr, and those of all objects, hold no canary.
    """
    told: list[str] = []

    def note(error: DicomError) -> None:
        assert CANARY not in str(error)
        assert CANARY not in repr(error)
        told.append(error.reason)

    found = scan(folder)
    assert CANARY not in repr(found)
    told += [item.reason for item in found.rejected]
    for study in found.studies:
        for series in study.series:
            for instance in series.instances:
                for index in {0, instance.num_frames - 1}:
                    try:
                        read_pixels(instance, index)
                    except DicomError as error:
                        note(error)
            if series.refused is not None:
                told.append(series.refused)
            try:
                if series.kind == "image":
                    for index in range(series.num_slices):
                        read_image(series, index)
                else:
                    read_volume(series)
                told.append("read")
            except DicomError as error:
                note(error)
    return told
