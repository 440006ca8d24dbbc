"""Single elements out of a header, whoever read it: as text, number or UID, or nothing where there is none.

Numbers that aren't any raise what pydicom raises, value quoted: guard it.
"""

import re
from typing import Any

from pydicom.dataset import Dataset

from mm.dicom.errors import FileError

Elements = Dataset | dict[str, Any]
"""What `get(keyword)` is asked of: a data set of pydicom's, or what our own header walk found."""


def text(data: Elements, keyword: str, limit: int = 64) -> str:
    """Printable letters, at most so many; "" where it is missing."""
    value = data.get(keyword)
    return "".join(letter for letter in ("" if value is None else str(value)) if letter.isprintable()).strip()[:limit]


def words(data: Elements, keyword: str) -> tuple[str, ...]:
    """Each value as text."""
    value = data.get(keyword)
    if value is None or isinstance(value, str):
        return (value,) if value else ()
    return tuple(str(item) for item in value)


def integer(data: Elements, keyword: str, default: int = 0) -> int:
    """A whole number, or the default where it is missing or empty."""
    value = data.get(keyword)
    if value is None or value == "":
        return default
    return int(value)


def real(data: Elements, keyword: str) -> float | None:
    """A number, or None where it is missing or empty."""
    value = data.get(keyword)
    return None if value is None or value == "" else float(value)


def reals(data: Elements, keyword: str, count: int) -> tuple[float, ...] | None:
    """So many numbers, or None where it has fewer or more."""
    value = data.get(keyword)
    if value is None or isinstance(value, (str, float, int)) or len(value) != count:
        return None
    return tuple(float(item) for item in value)


def uid(data: Elements, keyword: str) -> str:
    """A UID (PS3.5 section 9.1).

    Raises:
        FileError: `missing_element` or `invalid_uid`.
    """
    value = data.get(keyword)
    if value is None or value == "":
        raise FileError("missing_element", keyword)
    if not isinstance(value, str) or len(value) > 64 or not re.fullmatch(r"[0-9]+(\.[0-9]+)*", value):
        raise FileError("invalid_uid", keyword)
    return str(value)


def optional(data: Elements, keyword: str) -> Any:
    """An element that a file may well have wrong without being refused for it."""
    try:
        return data.get(keyword)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return None
