"""Files that are broken, lie, or attack: each made when it is needed, with the reasons that it may be refused for."""

import gzip
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from raw import (
    BASELINE,
    BIG,
    CANARY,
    DEFLATED,
    EXPLICIT,
    FRAMES,
    IMPLICIT,
    J2K,
    JPEG_LS,
    PIXELS,
    RLE,
    SIDE,
    Elements,
    File,
    element,
    header,
    items,
    number,
    of_syntax,
)

UNDEFINED = 0xFFFFFFFF
CT_HEADER = ("damaged", "truncated", "missing_element", "not_dicom")
"""What a header that can't be followed ends in."""


@dataclass(frozen=True)
class Case:
    """How to make it, what it may be refused for, and whether reading it is right as well."""

    make: Callable[[Path], object]
    reasons: tuple[str, ...]


CASES: dict[str, Case] = {}


def case(name: str, make: Callable[[Path], object], *reasons: str) -> None:
    assert name not in CASES
    CASES[name] = Case(make, reasons)


def file(name: str, content: Callable[[], bytes] | bytes, *reasons: str) -> None:
    """One file alone."""

    def make(folder: Path) -> None:
        (folder / "a.dcm").write_bytes(content if isinstance(content, bytes) else content())

    case(name, make, *reasons)


def changed(name: str, changes: Elements, *reasons: str, syntax: str = EXPLICIT) -> None:
    """One slice among three whose elements say something else."""

    def make(folder: Path) -> None:
        for index in (1, 2, 3):
            slice_ = of_syntax(syntax, index)
            (folder / f"{index}.dcm").write_bytes((slice_.but(changes) if index == 2 else slice_).bytes())

    case(name, make, *reasons)


def frames(name: str, syntax: str, value: bytes | Callable[[], bytes], *reasons: str, **changes: int) -> None:
    """Three slices whose compressed frame is something else; `changes`: rows, columns, frames."""

    def make(folder: Path) -> None:
        content = value if isinstance(value, bytes) else value()
        for index in (1, 2, 3):
            made = of_syntax(syntax, index).but(
                {
                    0x00280010: ("US", number(changes.get("rows", SIDE))),
                    0x00280011: ("US", number(changes.get("columns", SIDE))),
                    **({0x00280008: ("IS", b"%d" % changes["frames"])} if "frames" in changes else {}),
                }
            )
            made.pixels = element(0x7FE00010, "OB", content, length=UNDEFINED)
            (folder / f"{index}.dcm").write_bytes(made.bytes())

    case(name, make, *reasons)


def data(*parts: bytes, syntax: str = EXPLICIT, before: int = 0x00280000) -> bytes:
    """A good slice with bytes put in before a tag."""
    made = of_syntax(syntax)
    pieces = made.pieces()
    place = sum(tag < before for tag in made.elements)
    return made.head() + b"".join([*pieces[:place], *parts, *pieces[place:]])


def sequence(content: bytes, length: int | None = None) -> bytes:
    return element(0x00081140, "SQ", content, length=length)


def item(content: bytes, length: int | None = None) -> bytes:
    return b"\xfe\xff\x00\xe0" + struct.pack("<L", len(content) if length is None else length) + content


def deep(levels: int) -> bytes:
    head = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    return head * levels + b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0" * levels


# ------------------------------------------------------------------------------- what isn't DICOM, or isn't a file

file("empty", b"", "not_dicom")
file("text renamed", b"This is a letter, not an image.\n" * 20, "not_dicom")
file("gzip of a good file", lambda: gzip.compress(of_syntax(EXPLICIT).bytes()), "not_dicom")
file("zeros", bytes(4096), "not_dicom")
file("the prefix alone", b"\0" * 128 + b"DICM", *CT_HEADER)
for _name, _magic in (
    ("PE", b"MZ\x90\0"),
    ("ELF", b"\x7fELF\2\1\1"),
    ("script", b"#!/bin/sh\n"),
    ("Mach-O", b"\xcf\xfa\xed\xfe"),
):
    file(f"{_name} preamble", lambda magic=_magic: File(preamble=magic.ljust(128, b"\0")).bytes(), "executable")
case("a folder called a.dcm", lambda folder: (folder / "a.dcm").mkdir())
case("a pipe", lambda folder: os.mkfifo(folder / "a.dcm"), "not_dicom")
case("a link to a device that never ends", lambda folder: (folder / "a.dcm").symlink_to("/dev/zero"), "not_dicom")
case("a link to itself", lambda folder: (folder / "a.dcm").symlink_to("a.dcm"), "unreadable")
case("a link to nothing", lambda folder: (folder / "a.dcm").symlink_to("nothing"), "unreadable")
case("a link to its own folder", lambda folder: (folder / "a.dcm").symlink_to(folder))
case("a file that nobody may read", lambda folder: (folder / "a.dcm").touch(mode=0), "unreadable", "not_dicom")


def _socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(folder)  # a path of a socket has 108 bytes at most
        try:
            made.bind("a.dcm")
        finally:
            os.chdir(here)


case("a socket", _socket, "not_dicom")
case("a good file called DICOMDIR", lambda folder: (folder / "DICOMDIR").write_bytes(File().bytes()), "dicomdir")

# ------------------------------------------------------------------------------------------------- cut and stretched

_GOOD = of_syntax(EXPLICIT).bytes()
_PIXELS_AT = len(_GOOD) - 2 * SIDE * SIDE - 12
for _length in (127, 131, 132, 140, 150, 200, 300, _PIXELS_AT - 3):
    file(f"cut at byte {_length}", _GOOD[:_length], *CT_HEADER)
for _length in (_PIXELS_AT, _PIXELS_AT + 5, _PIXELS_AT + 11, _PIXELS_AT + 12, len(_GOOD) - 1):
    file(f"cut at byte {_length}", _GOOD[:_length], "truncated", "damaged")
file("big endian cut in its pixels", of_syntax(BIG).bytes()[:-9], "truncated")
file("implicit cut in its pixels", of_syntax(IMPLICIT).bytes()[:-9], "truncated")
file("deflated cut", of_syntax(DEFLATED).bytes()[:-60], "truncated", "damaged", "missing_element")
file("deflated with another stream's end", of_syntax(DEFLATED).bytes()[:400] + b"\xff" * 300, *CT_HEADER)

# -------------------------------------------------------------------------------------------------- lengths that lie

for _claim in (1 << 31, UNDEFINED - 1, 0x7FFFFFFE):
    file(f"text of {_claim} bytes", data(element(0x00281199, "UT", b"x", length=_claim), before=0x7FE00010), *CT_HEADER)
    file(f"an unread element of {_claim} bytes", data(element(0x00211010, "OB", b"x", length=_claim)), *CT_HEADER)
file(
    "pixels of 2^31 bytes",
    lambda: _with_pixels(element(0x7FE00010, "OW", PIXELS.tobytes(), length=1 << 31)),
    "truncated",
)
file(
    "pixels of an odd length",
    lambda: _with_pixels(element(0x7FE00010, "OW", PIXELS.tobytes(), length=511)),
    "truncated",
)
file("pixels of no length", lambda: _with_pixels(element(0x7FE00010, "OW", b"")), "truncated")
file("native pixels of undefined length", lambda: _with_pixels(element(0x7FE00010, "OW", b"ab", length=UNDEFINED)),
     "truncated", "damaged")  # fmt: skip
file("a short text of 65535 bytes", data(element(0x00281055, "LO", b"x", length=65535), before=0x7FE00010), *CT_HEADER)
file("a UID of 60000 bytes", lambda: File().but({0x0020000D: ("UI", b"1." * 30000)}).bytes(), "invalid_uid", *CT_HEADER)
file(
    "meta group of 2 GiB", File(meta=element(0x00020000, "UL", b"\xff\xff\xff\x7f")).bytes(), *CT_HEADER, "single_slice"
)
file(
    "meta group without end", File(meta=b"\2\0\0\0UL\4\0\xff\xff\xff\xff" + b"\2\0\1\0OB\0\0" * 300).bytes(), *CT_HEADER
)
file("deflated with a meta group of 2 GiB", File(DEFLATED, meta=element(0x00020000, "UL", b"\xff\xff\xff\x7f")
     + element(0x00020010, "UI", DEFLATED.encode())).bytes(), *CT_HEADER)  # fmt: skip


def _with_pixels(pixels: bytes) -> bytes:
    made = File()
    made.pixels = pixels
    return made.bytes()


# --------------------------------------------------------------------------------------------------------- sequences

file("20,000 nested sequences", lambda: data(deep(20_000), before=0x00081199), *CT_HEADER)
file("200,000 nested sequences that don't end", data(deep(200_000)[: 20 * 200_000], before=0x00081199), *CT_HEADER)
file("a sequence without end", data(sequence(item(b"", UNDEFINED), UNDEFINED), before=0x00081199), *CT_HEADER)
file(
    "an item longer than its sequence",
    data(sequence(item(b"ab", 1 << 30)), before=0x00081199),
    *CT_HEADER,
    "single_slice",
)
file("an item of undefined length without end",
     data(sequence(item(element(0x00080060, "CS", b"CT"), UNDEFINED), UNDEFINED),
     before=0x00081199), *CT_HEADER)  # fmt: skip
file("the pixels in a sequence", lambda: _pixels_nested(), *CT_HEADER)
file("a delimiter where an element is due", data(b"\xfe\xff\x0d\xe0\0\0\0\0"), *CT_HEADER, "single_slice")


def _pixels_nested() -> bytes:
    made = File()
    made.pixels = sequence(item(element(0x7FE00010, "OW", PIXELS.tobytes())))
    return made.bytes()


# --------------------------------------------------------------------------------------------- elements that can't be

for _uid in (
    b"../../../../etc/passwd",
    b"1.2.3/../../x",
    b"1.2.3\0.4",
    b"C:\\windows",
    b"1..2",
    b"a.b",
    b" ",
    b"1." * 40,
):
    for _tag in (0x0020000D, 0x00080018):
        file(f"{_tag:08x} is {_uid!r}", lambda tag=_tag, uid=_uid: File().but({tag: ("UI", uid)}).bytes(),
             "invalid_uid", "missing_element", "damaged")  # fmt: skip
for _tag in (0x00080016, 0x00080018, 0x0020000D, 0x0020000E, 0x00280010, 0x00280100):
    file(f"without {_tag:08x}", lambda tag=_tag: File().but({tag: None}).bytes(), "missing_element")  # type: ignore[dict-item]
for _value in (b"nan\\0\\0", b"0\\inf\\0", b"1e999\\0\\0", b"\xff\xfe", b"0\\0", b"one\\two\\three", b"1\\2\\3\\4"):
    changed(f"position {_value!r}", {0x00200032: ("DS", _value)}, "missing_geometry", "damaged", "broken_slice",
            "missing_slice", "single_slice")  # fmt: skip
for _value in (b"0\\0\\0\\0\\0\\0", b"nan\\0\\0\\0\\1\\0", b"1\\0\\0\\1\\0\\0", b"1e300\\0\\0\\0\\1e300\\0"):
    changed(f"orientation {_value!r}", {0x00200037: ("DS", _value)}, "invalid_orientation", "missing_geometry",
            "single_slice", "missing_slice")  # fmt: skip
for _value in (b"0\\0", b"-1\\-1", b"nan\\nan", b"1e-300\\1", b"inf\\1"):
    changed(f"spacing {_value!r}", {0x00280030: ("DS", _value)}, "invalid_spacing", "missing_geometry", "single_slice",
            "missing_slice", "damaged")  # fmt: skip
for _value in (b"nan", b"inf", b"0", b"1e999"):
    changed(f"slope {_value!r}", {0x00281053: ("DS", _value)}, "invalid_rescale", "damaged", "broken_slice")
changed("position 1e300", {0x00200032: ("DS", b"0\\0\\1e300")}, "missing_slice", "uneven_spacing", "duplicate_position",
        "invalid_spacing", "missing_geometry")  # fmt: skip
changed("65535 x 65535", {0x00280010: ("US", b"\xff\xff"), 0x00280011: ("US", b"\xff\xff")}, "too_many_pixels")
changed("no rows", {0x00280010: ("US", b"\0\0")}, "missing_element")
changed("2^31 frames", {0x00280008: ("IS", b"2147483648")}, "truncated", "damaged")
changed("-1 frames", {0x00280008: ("IS", b"-1")}, "missing_element", "damaged")
changed("frames nan", {0x00280008: ("IS", b"nan")}, "damaged", "missing_element")
changed("16 bits stored in 8", {0x00280100: ("US", b"\x08\0")}, "unsupported_pixels", "missing_slice")
changed("0 bits allocated", {0x00280100: ("US", b"\0\0")}, "missing_element", "unsupported_pixels")
changed("65535 bits allocated", {0x00280100: ("US", b"\xff\xff")}, "truncated", "unsupported_pixels")
changed("65535 bits stored", {0x00280101: ("US", b"\xff\xff")}, "unsupported_pixels", "missing_slice")
changed("high bit 40000", {0x00280102: ("US", b"\x40\x9c")}, "unsupported_pixels", "missing_slice")
changed("65535 samples", {0x00280002: ("US", b"\xff\xff")}, "truncated", "unsupported_pixels")
changed("rows as text", {0x00280010: ("LO", b"many")}, *CT_HEADER, "broken_slice")
changed("a sequence for the position", {0x00200032: ("SQ", b"")}, "missing_geometry", "damaged")
changed("an unknown character set, and bytes of none", {0x00080005: ("CS", b"ISO_IR 9999\\\x1b$B"),
        0x00081030: ("LO", b"\xff\xfe\x1b$)C\x80\x81")}, "read")  # fmt: skip
changed("a nul in a name", {0x00100020: ("LO", f"{CANARY}\0x".encode())}, "read", "two_patients")
changed("two patients", {0x00100020: ("LO", f"{CANARY} 2".encode())}, "two_patients")
file("every element twice", lambda: _twice(), *CT_HEADER, "single_slice")
file("elements in reverse", lambda: _reversed(), *CT_HEADER)
file("a VR that isn't one", data(element(0x00211010, "ZZ", b"abcdefgh")), *CT_HEADER, "single_slice")
file("an unknown transfer syntax", File("1.2.3.4.5.6").bytes(), "unsupported_transfer_syntax", *CT_HEADER)
file("a private transfer syntax", File("1.3.46.670589.33.1.4.1").bytes(), "unsupported_transfer_syntax", *CT_HEADER)
file("video as its transfer syntax", lambda: _video(), "unsupported_transfer_syntax")


def _twice() -> bytes:
    made = File()
    return made.head() + b"".join(2 * piece for piece in made.pieces())


def _reversed() -> bytes:
    made = File()
    return made.head() + b"".join(reversed(made.pieces()))


def _video() -> bytes:
    made = File("1.2.840.10008.1.2.4.102")
    made.pixels = element(0x7FE00010, "OB", items(b"\0\0\1\xb3" * 20), length=UNDEFINED)
    return made.bytes()


# ------------------------------------------------------------------------------------------------------------ deflate


def _bomb(sides: int, *, declared: bool) -> bytes:
    made = File(DEFLATED)
    if declared:
        made.but({0x00280010: ("US", number(sides)), 0x00280011: ("US", number(sides))})
    made.pixels = element(0x7FE00010, "OW", bytes(2 * sides * sides))
    return made.bytes()


file("200 MB of zeros, deflated", lambda: _bomb(10_000, declared=False), "expansion")
file("200 MB of zeros, deflated and declared", lambda: _bomb(10_000, declared=True), "expansion")
file("64 MB in a private element, deflated", lambda: _deflated_text(), "expansion", *CT_HEADER)


def _deflated_text() -> bytes:
    made = File(DEFLATED).but({0x00211010: ("OB", bytes(64 << 20))})
    return made.bytes()


# -------------------------------------------------------------------------------------------------------- codestreams


def _siz(width: int, height: int, *, components: int = 1, tile: tuple[int, int] | None = None) -> bytes:
    """A JPEG 2000 codestream that declares another image (ISO/IEC 15444-1 annex A.5.1)."""
    wide, high = tile or (width, height)
    marker = struct.pack(">HLLLLLLLLH", 0, width, height, 0, 0, wide, high, 0, 0, components) + b"\x0f\1\1" * components
    good = FRAMES[J2K]
    rest = good[4 + struct.unpack(">H", good[4:6])[0] :]
    return b"\xff\x4f\xff\x51" + struct.pack(">H", len(marker) + 2) + marker + rest


BAD_FRAME = ("codestream_mismatch", "damaged", "truncated", "expansion", "unsupported_pixels")
BAD_FRAME += ("decoder_failed", "decoder_crashed", "decoder_timeout")
BIG_SIDE = 12_000
frames("J2K that declares 30000 x 30000", J2K, items(_siz(30_000, 30_000)), *BAD_FRAME)
frames("J2K that declares 12000 x 12000, and so does the header", J2K, items(_siz(BIG_SIDE, BIG_SIDE)), *BAD_FRAME,
       rows=BIG_SIDE, columns=BIG_SIDE)  # fmt: skip
frames("J2K of 16384 components", J2K, items(_siz(SIDE, SIDE, components=16384)), *BAD_FRAME)
frames("J2K in tiles of one pixel", J2K, items(_siz(4000, 1000, tile=(1, 1))), *BAD_FRAME, rows=1000, columns=4000)
frames("J2K of no size", J2K, items(_siz(0, 0)), *BAD_FRAME)
frames("J2K cut in its header", J2K, items(FRAMES[J2K][:30]), *BAD_FRAME)
frames("J2K of which nothing but SIZ is left", J2K, items(FRAMES[J2K][:60]), *BAD_FRAME)
frames("J2K with noise behind its header", J2K, items(FRAMES[J2K][:110] + bytes(range(256)) * 3), *BAD_FRAME, "read")


def _sof(frame: bytes, height: int, width: int) -> bytes:
    """The same JPEG with another size in its frame header (ITU-T T.81 B.2.2)."""
    place = 2
    while frame[place + 1] not in (0xC0, 0xC1, 0xC3, 0xF7):
        place += 2 + struct.unpack(">H", frame[place + 2 : place + 4])[0]
    return frame[: place + 5] + struct.pack(">HH", height, width) + frame[place + 9 :]


for _syntax, _label in ((BASELINE, "JPEG"), (JPEG_LS, "JPEG-LS")):
    frames(f"{_label} that declares 65500 x 65500", _syntax, items(_sof(FRAMES[_syntax], 65500, 65500)), *BAD_FRAME)
    frames(f"{_label} that declares 12000 x 12000, and so does the header", _syntax,
           items(_sof(FRAMES[_syntax], BIG_SIDE, BIG_SIDE)), *BAD_FRAME, rows=BIG_SIDE, columns=BIG_SIDE)  # fmt: skip
    frames(f"{_label} of no lines", _syntax, items(_sof(FRAMES[_syntax], 0, SIDE)), *BAD_FRAME)
    frames(f"{_label} cut in two", _syntax, items(FRAMES[_syntax][:70]), *BAD_FRAME, "read")
frames(
    "RLE whose segments lie outside",
    RLE,
    items(struct.pack("<16L", 2, 1 << 30, 1 << 31, *([0] * 13)) + b"\0" * 64),
    *BAD_FRAME,
)
frames("RLE of 2^32 - 1 segments", RLE, items(struct.pack("<16L", UNDEFINED, *([64] * 15)) + b"\0" * 64), *BAD_FRAME)
frames(
    "RLE whose segments go backwards",
    RLE,
    items(struct.pack("<16L", 2, 600, 64, *([0] * 13)) + FRAMES[RLE][64:]),
    *BAD_FRAME,
)
frames("RLE that repeats without end", RLE,
       items(struct.pack("<16L", 2, 64, 2064, *([0] * 13)) + b"\x81\0" * 2000), *BAD_FRAME,
       "read")  # fmt: skip
frames(
    "RLE of 64 bytes that declares 12000 x 12000", RLE, items(FRAMES[RLE]), *BAD_FRAME, rows=BIG_SIDE, columns=BIG_SIDE
)
frames("a frame that is no codestream", J2K, items(b"\0" * 64), *BAD_FRAME)
frames("fragments that aren't items", J2K, b"no items here, only text" * 9, *BAD_FRAME)
frames("no fragments", J2K, items(), *BAD_FRAME)
frames("fragments without end", J2K, items(FRAMES[J2K], end=False)[:-40], *BAD_FRAME, "read")
for _claim in (1 << 31, UNDEFINED - 1, UNDEFINED, 2000):
    _item = b"\xfe\xff\x00\xe0" + struct.pack("<L", _claim)
    frames(f"a fragment of {_claim} bytes", J2K, b"\xfe\xff\x00\xe0\0\0\0\0" + _item + FRAMES[J2K], "truncated")
    frames(f"a table of {_claim} bytes", J2K, _item + FRAMES[J2K], "truncated")
frames("a table that points outside", J2K,
       items(FRAMES[J2K], FRAMES[J2K], table=struct.pack("<2L", 0, 1 << 30)), *BAD_FRAME,
       "multiframe", "single_slice", "missing_geometry", "duplicate_position", frames=2)  # fmt: skip
frames("a million frames in one fragment", J2K, items(FRAMES[J2K]), *BAD_FRAME, "multiframe", frames=1_000_000)


def _extended_table(offsets: bytes, lengths: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        made = of_syntax(J2K).but({0x00280008: ("IS", b"2")})
        made.pixels = element(0x7FE00001, "OV", offsets) + element(0x7FE00002, "OV", lengths)
        made.pixels += element(0x7FE00010, "OB", items(FRAMES[J2K], FRAMES[J2K]), length=UNDEFINED)
        (folder / "a.dcm").write_bytes(made.bytes())

    return make


file(
    "floats instead of integers",
    lambda: _with_pixels(element(0x7FE00008, "OF", bytes(4 * SIDE * SIDE))),
    "unsupported_pixels",
)
file(
    "doubles instead of integers",
    lambda: _with_pixels(element(0x7FE00009, "OD", bytes(8 * SIDE * SIDE))),
    "unsupported_pixels",
)
case("an extended table that points outside",
     _extended_table(struct.pack("<2Q", 0, 1 << 60), struct.pack("<2Q", 1 << 60, 8)),
     *BAD_FRAME, "multiframe", "missing_geometry", "single_slice")  # fmt: skip
case("an extended table of odd length", _extended_table(b"\0" * 9, b"\xff" * 7),
     *BAD_FRAME, "multiframe", "missing_geometry", "single_slice")  # fmt: skip


def _same_uid(folder: Path) -> None:
    for index in range(3):
        made = File(elements=header(number=1)).but({0x00281052: ("DS", b"%d" % index)})
        (folder / f"{index}.dcm").write_bytes(made.bytes())


case("three contents under one SOPInstanceUID", _same_uid, "conflicting_instance")
