"""A frozen dataclass of numbers, words and further such dataclasses, as JSON and back; every entry is checked."""

import dataclasses
import math
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mm.decoder.told import short

Settings = TypeVar("Settings")
LARGEST: Final = 2**40
"""Of a whole number; no size comes near."""
LONGEST: Final = 2**16
"""Of a list."""


def entries_of(settings: Any) -> dict[str, Any]:
    """What `settings_from` reads."""
    return dataclasses.asdict(settings)


def settings_from(entries: object, kind: type[Settings], *, where: str) -> Settings:
    """Makes a dataclass from the entries of a JSON object.

    Args:
        entries: One for each field; those with a default may be missing.
        kind: The dataclass.
        where: What the entries are called in an error.

    Raises:
        ValueError: An entry is unknown, missing, or of another type than the field; the message names it.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(entries, dict):
        raise ValueError(f"{where} must be an object, got {short(entries)}")
    unknown = sorted(entries.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{where}.{unknown[0][:60]}: unknown; known are {', '.join(fields)}")
    missing = [name for name, field in fields.items() if name not in entries and field.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"{where}.{missing[0]} is missing")
    hints = get_type_hints(kind)
    values = {name: _value(value, hints[name], f"{where}.{name}") for name, value in entries.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _value(value: object, hint: Any, where: str) -> Any:
    """One entry as its field wants it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        if value is None and NoneType in inner:
            return None
        (hint,) = (part for part in inner if part is not NoneType)
        return _value(value, hint, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return settings_from(value, hint, where=where)
    if origin is Literal:
        if isinstance(value, str) and value in inner:
            return value
        raise ValueError(f"{where} must be one of {', '.join(map(str, inner))}, got {short(value)}")
    if origin is tuple:
        if isinstance(value, list | tuple) and len(value) <= LONGEST:
            return tuple(_value(item, inner[0], where) for item in value)
        raise ValueError(f"{where} must be a list of at most {LONGEST}, got {short(value)}")
    if hint is float and type(value) in (int, float) and math.isfinite(value):  # type: ignore[arg-type]
        return float(value)  # type: ignore[arg-type]
    if hint is not float and type(value) is hint and (hint is not int or abs(value) <= LARGEST):  # type: ignore[arg-type]
        return value
    raise ValueError(f"{where} must be a {hint.__name__}, got {short(value)}")
