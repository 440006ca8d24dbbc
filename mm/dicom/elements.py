"""A header walk of our own: wanted elements of little endian files by positional reads, the rest skipped by length.

It answers only where it is sure to say what pydicom would say. Anything odd (big endian, deflated, an unknown or
unexpected VR, lengths that don't add up, letters beyond ASCII, a wanted sequence) ends in `Unsure`, and pydicom
decides what the file is worth. Memory is bounded by `LARGEST`, time by the file's length.
"""

import os
import struct
from functools import lru_cache
from typing import Any, Final, NamedTuple

from pydicom.charset import python_encoding
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian
from pydicom.valuerep import EXPLICIT_VR_LENGTH_16, EXPLICIT_VR_LENGTH_32
from pydicom.values import convert_value

from mm.dicom.allowlist import TAGS
from mm.dicom.errors import FileError
from mm.dicom.guard import guarded

WINDOW: Final = 8 << 10  # bytes of the first read; most headers fit
LARGEST: Final = 1 << 20  # of a window that grows around one long element
MAX_VALUE: Final = 4096  # bytes of a wanted value
MAX_DEPTH: Final = 64  # of sequences of undefined length; pydicom would recurse
UNDEFINED: Final = 0xFFFFFFFF
ESCAPE: Final = 0x1B  # switches the character set (PS3.5 section 6.1.2.5)


def word(vr: str) -> int:
    """A VR as the number that its two bytes are in the file."""
    return int.from_bytes(vr.encode(), "little")


def swapped(tag: int) -> int:
    """A tag as the number that its four little endian bytes are: group in the low half. Its own inverse."""
    return tag >> 16 | (tag & 0xFFFF) << 16


IMPLICIT: Final = str(ImplicitVRLittleEndian)
ELSEWHERE: Final = frozenset((str(ExplicitVRBigEndian), str(DeflatedExplicitVRLittleEndian)))
SHORT: Final = frozenset(word(vr) for vr in EXPLICIT_VR_LENGTH_16)
LONG: Final = frozenset(word(vr) for vr in EXPLICIT_VR_LENGTH_32)
SQ: Final = word("SQ")
META_GROUP: Final = 0x0002
PIXEL_GROUP: Final = 0x7FE0
DELIMITERS: Final = 0xFFFE
TRANSFER_SYNTAX: Final = swapped(0x00020010)
CHARACTER_SET: Final = swapped(0x00080005)
SIGNED: Final = swapped(0x00280103)  # PixelRepresentation
ITEM: Final = swapped(0xFFFEE000)
END_OF_ITEM: Final = swapped(0xFFFEE00D)
END_OF_SEQUENCE: Final = swapped(0xFFFEE0DD)

VRS: Final = {swapped(tag): str(dictionary_VR(tag)) for tag in (*TAGS, 0x00080005)}
WORDS: Final = {tag: word(vr) for tag, vr in VRS.items()}
KEYWORDS: Final = {tag: keyword_for_tag(swapped(tag)) for tag in VRS}
EITHER: Final = "US or SS"  # as PixelRepresentation says
CONVERTED: Final = frozenset(
    ("AE", "AS", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "LO", "SH", "SL", "SS", "TM", "UI", "UL", "US")
)

_HEAD: Final = struct.Struct("<LHH").unpack_from
_IMPLICIT_HEAD: Final = struct.Struct("<LL").unpack_from
_LENGTH: Final = struct.Struct("<L").unpack_from


class Unsure(Exception):  # noqa: N818 - not an error: a file for pydicom
    """The walk can't vouch for this file."""


class TooDeep(Exception):  # noqa: N818
    """Sequences within sequences, more than anybody means."""


class Walk(NamedTuple):
    """What a walk found.

    Attributes:
        found: Raw value of every wanted element by its swapped tag.
        transfer_syntax_uid: As the meta group has it.
        offset: Where the first element from Pixel Data on starts, or the end of the file.
        head: The 12 bytes there, none at the end of the file.
        starts: Where the elements before it start, where the first window holds them all.
    """

    found: dict[int, bytes]
    transfer_syntax_uid: str
    offset: int
    head: bytes
    starts: list[int]


def _meta(window: bytes, starts: list[int]) -> tuple[str, int]:
    """Transfer syntax, and where the data set starts (PS3.10 section 7.1)."""
    position = 132
    uid = b""
    while True:
        tag, vr, length = _HEAD(window, position)
        if tag & 0xFFFF != META_GROUP:
            break
        starts.append(position)
        start = position + 8
        if vr in LONG:
            (length,) = _LENGTH(window, start)
            start += 4
        elif vr not in SHORT:
            raise Unsure
        if tag == TRANSFER_SYNTAX:
            uid = window[start : start + length]
        position = start + length
    text = uid.rstrip(b" \0").decode("latin-1")
    if not text.replace(".", "").isdecimal() or text in ELSEWHERE:
        raise Unsure
    return text, position


def _starts_sequence(window: bytes, tag: int, start: int) -> bool:
    """True where an implicit VR element of undefined length is a sequence for pydicom, too."""
    try:
        return str(dictionary_VR(swapped(tag))) == "SQ"
    except KeyError:
        return bool(_LENGTH(window, start)[0] == ITEM)


def behind_sequence(window: bytes, position: int, implicit: bool) -> int:
    """From the first item of a sequence of undefined length to behind its end (PS3.5 section 7.5).

    Every nested element is walked, because pydicom does. Raises struct.error where the window ends first.
    """
    ends: list[int | None] = []  # of the open items; None where a delimiter tells
    before_item = True
    while True:
        tag, length = _IMPLICIT_HEAD(window, position)
        start = position + 8
        if before_item:
            position = start
            before_item = False
            if tag == END_OF_SEQUENCE:
                if not ends:
                    return position
                continue
            if tag != ITEM:
                raise Unsure
            if len(ends) == MAX_DEPTH:
                raise TooDeep
            ends.append(None if length == UNDEFINED else start + length)
            if length == 0:
                ends.pop()
                before_item = True
            continue
        if tag & 0xFFFF == DELIMITERS:
            if tag != END_OF_ITEM or ends.pop() is not None:
                raise Unsure
            position, before_item = start, True
            continue
        vr = length & 0xFFFF
        if implicit:
            is_sequence = length == UNDEFINED and _starts_sequence(window, tag, start)
        elif vr in SHORT:
            is_sequence, length = False, length >> 16
        elif vr in LONG:
            (length,) = _LENGTH(window, start)
            start += 4
            is_sequence = vr == SQ
        else:
            raise Unsure
        if tag == CHARACTER_SET:
            if start + length > len(window):
                raise struct.error
            if not (implicit or vr == WORDS[tag]) or not _is_known(window[start : start + length]):
                raise Unsure
        if length == UNDEFINED:
            if not is_sequence:
                raise Unsure
            position, before_item = start, True
            continue
        position = start + length
        if ends[-1] is not None:
            if position > ends[-1]:
                raise Unsure
            if position == ends[-1]:
                ends.pop()
                before_item = True


def _explicit(window: bytes, position: int, found: dict[int, bytes], starts: list[int]) -> tuple[int, bool]:
    """Collects wanted elements up to the first that the window doesn't hold.

    Returns:
        Where that element starts, and whether it is the first from Pixel Data on.
    """
    head, short, words = _HEAD, SHORT, WORDS  # locals: this loop is what a scan spends its time in
    try:
        while True:
            tag, vr, length = head(window, position)
            if vr in short:
                start = position + 8
            elif vr in LONG:
                (length,) = _LENGTH(window, position + 8)
                start = position + 12
            else:
                raise Unsure
            if tag & 0xFFFF >= PIXEL_GROUP and _is_end(tag):
                return position, True
            starts.append(position)
            if length == UNDEFINED:
                if vr != SQ or tag in VRS:
                    raise Unsure
                position = behind_sequence(window, start, implicit=False)
                continue
            if tag in words:
                if start + length > len(window):
                    return position, False
                if vr != words[tag]:
                    _check_either(tag, vr)
                found[tag] = window[start : start + length]
            position = start + length
    except struct.error:
        return position, False


def _implicit(window: bytes, position: int, found: dict[int, bytes], starts: list[int]) -> tuple[int, bool]:
    """The same for implicit VR."""
    try:
        while True:
            tag, length = _IMPLICIT_HEAD(window, position)
            start = position + 8
            if tag & 0xFFFF >= PIXEL_GROUP and _is_end(tag):
                return position, True
            starts.append(position)
            if length == UNDEFINED:
                if tag in VRS or not _starts_sequence(window, tag, start):
                    raise Unsure
                position = behind_sequence(window, start, implicit=True)
                continue
            if tag in VRS:
                if start + length > len(window):
                    return position, False
                found[tag] = window[start : start + length]
            position = start + length
    except struct.error:
        return position, False


def _is_end(tag: int) -> bool:
    """True from (Float, Double Float and) Pixel Data on."""
    if tag & 0xFFFF == DELIMITERS:
        raise Unsure
    return tag & 0xFFFF > PIXEL_GROUP or tag >> 16 >= 8


def _check_either(tag: int, vr: int) -> None:
    """Another VR than the dictionary's is fine where that leaves a choice.

    Some files write the one that PixelRepresentation doesn't ask for; the elements of this kind that are wanted are
    taken modulo 2^16 (`mm.dicom.instance`), so both are the same to us.
    """
    if VRS[tag] != EITHER or vr not in (word("US"), word("SS")):
        raise Unsure


def _chosen(found: dict[int, bytes]) -> str:
    signed = found.get(SIGNED)
    if signed not in (b"\0\0", b"\1\0"):
        raise Unsure
    return "SS" if signed == b"\1\0" else "US"


def walk(descriptor: int, window: bytes, num_bytes: int) -> Walk:
    """Walks the header of an open file that has a preamble.

    Args:
        descriptor: Of the file.
        window: Its first `WINDOW` bytes.
        num_bytes: Its length.

    Raises:
        Unsure: pydicom must read it.
        TooDeep: Nobody should.
        OSError: As the file system has it.
    """
    starts: list[int] = []
    try:
        transfer_syntax_uid, position = _meta(window, starts)
    except struct.error:
        raise Unsure from None
    implicit = transfer_syntax_uid == IMPLICIT
    if implicit and window[position + 4 : position + 6].isalpha():
        raise Unsure  # explicit after all
    found: dict[int, bytes] = {}
    base, size = 0, WINDOW
    while True:
        before = position
        position, ended = (_implicit if implicit else _explicit)(window, position, found, starts)
        offset = base + position
        head = window[position : position + 12]
        if (ended and len(head) == 12) or offset == num_bytes:
            return Walk(found, transfer_syntax_uid, offset, head, starts)
        if position == before == 0:
            size *= 4
        if offset > num_bytes or size > LARGEST or base + len(window) == num_bytes:
            raise Unsure
        window, base, position, starts = os.pread(descriptor, size, offset), offset, 0, []


@lru_cache(maxsize=64)
def _is_known(character_set: bytes) -> bool:
    """True where ASCII means ASCII (PS3.3 section C.12.1.1.2)."""
    names = character_set.decode("latin-1").rstrip(" \0").split("\\")
    return all(name in python_encoding for name in names)


@lru_cache(maxsize=8192)
def value(vr: str, raw: bytes) -> Any:
    """What pydicom makes of a raw value; most of them are the same in all files of a series.

    Raises:
        Unsure: It needs pydicom.
    """
    if len(raw) > MAX_VALUE or vr not in CONVERTED:
        raise Unsure
    if vr == "UI":
        uid = raw.decode("latin-1").rstrip("\0 ")
        if "\\" not in uid:
            return uid
    elif vr == "DS":
        parts = raw.decode("latin-1").strip().rstrip(" \0").split("\\")
        try:
            numbers = tuple(float(part) if part.strip() else part for part in parts)
        except ValueError:
            raise Unsure from None
        return numbers if len(numbers) > 1 else numbers[0]
    elif vr == "IS" and raw.strip(b" \0").isdigit():
        return int(raw.strip(b" \0"))
    elif vr in ("LO", "SH") and (not raw.isascii() or ESCAPE in raw):
        raise Unsure
    try:
        with guarded():
            return convert_value(vr, RawDataElement(BaseTag(0), vr, len(raw), raw, 0, False, True))
    except FileError:
        raise Unsure from None


def elements(found: dict[int, bytes]) -> dict[str, Any]:
    """The values of a walk by keyword, as `Dataset.get` has them, but numbers and UIDs are plain.

    Raises:
        Unsure: One of them needs pydicom.
    """
    if CHARACTER_SET in found and not _is_known(found[CHARACTER_SET]):
        raise Unsure
    return {KEYWORDS[tag]: value(VRS[tag] if VRS[tag] != EITHER else _chosen(found), raw) for tag, raw in found.items()}
