"""A clinical record from its JSON: numbers in canonical units by measurement name, the rest as words."""

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from mm.batch import Record
from mm.ontology import MEASUREMENT_INDEX, MEASUREMENTS, Measurement

logger = logging.getLogger(__name__)

SEXES: Final[dict[str, str]] = {"f": "female", "m": "male", "female": "female", "male": "male", "女": "女", "男": "男"}
LISTS: Final = ("vitals", "labs")
FARTHEST_SD: Final = 30.0
"""Beyond so many standard deviations (half as many of the logarithm) a number is no measurement of a patient."""


def parse_record(content: Mapping[str, Any]) -> Record:
    """Reads the layout of record.json.

    ```json
    {"demographics": {"sex": "F", "age": {"value": 61, "unit": "a"}}, "indication": "cough",
     "vitals": [{"name": "temperature", "value": 38.1, "unit": "Cel"}],
     "labs": [{"name": "crp", "value": 84, "unit": "mg/L"}]}
    ```
    Every part may be missing, and so may a value (null). Measurements that the ontology doesn't know are passed
    over. A value that is absurd, or in a unit that the ontology can't convert, is treated as missing, with a warning
    that names the measurement; neither value nor unit is ever logged, for anything may stand there.

    Args:
        content: The decoded JSON.

    Returns:
        Values in the ontology's canonical units, and the words (indication, history, sex).

    Raises:
        ValueError: A part has another type than the layout's.
    """
    demographics = content.get("demographics") or {}
    if not isinstance(demographics, Mapping):
        raise ValueError(f"record: demographics must be an object, got {type(demographics).__name__}")
    values = {}
    for name, value, unit in _entries(content, demographics):
        if name in MEASUREMENT_INDEX and value is not None:
            number = _canonical(MEASUREMENTS[MEASUREMENT_INDEX[name]], value, unit)
            if number is not None:
                values[name] = number
    words = [content.get("indication"), content.get("history"), SEXES.get(str(demographics.get("sex", "")).lower())]
    for word in words:
        if not isinstance(word, str | None):
            raise ValueError(f"record: indication and history must be text, got {type(word).__name__}")
    return Record(values, "; ".join(word.strip() for word in words if word and word.strip()))


def _entries(content: Mapping[str, Any], demographics: Mapping[str, Any]) -> Iterator[tuple[str, Any, str | None]]:
    """(name, value, unit) of everything measured."""
    age = demographics.get("age")
    if isinstance(age, Mapping):
        yield "age", age.get("value"), age.get("unit")
    else:
        yield "age", age, None
    for key in LISTS:
        items = content.get(key) or []
        if not isinstance(items, list):
            raise ValueError(f"record: {key} must be a list, got {type(items).__name__}")
        for item in items:
            if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
                raise ValueError(f"record: every item of {key} must be an object with a name")
            yield item["name"].strip().lower().replace(" ", "_"), item.get("value"), item.get("unit")


def _canonical(measurement: Measurement, value: object, unit: object) -> float | None:
    """The value in the canonical unit; None where unit or value can't be read. No unit means the canonical one."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:  # JSON knows integers of any length
        number = math.inf
    if not math.isfinite(number):
        logger.warning("record: value of %s is no finite number; treated as missing", measurement.name)
        return None
    units = {name: (factor, offset) for name, factor, offset in measurement.units} | {measurement.unit: (1.0, 0.0)}
    if unit is not None and (not isinstance(unit, str) or unit not in units):
        known = ", ".join((measurement.unit, *(name for name, _, _ in measurement.units)))
        logger.warning("record: unknown unit of %s (known: %s); treated as missing", measurement.name, known)
        return None
    factor, offset = units[measurement.unit if unit is None else unit]
    canonical = number * factor + offset
    if not _plausible(measurement, canonical):
        logger.warning("record: value of %s is out of all bounds; treated as missing", measurement.name)
        return None
    return canonical


def _plausible(measurement: Measurement, value: float) -> bool:
    """False for what would only drive the encoder out of its numbers."""
    if not 0 <= value < math.inf:
        return False
    if not measurement.log:
        return abs(value - measurement.mean) <= FARTHEST_SD * measurement.sd
    # The encoder takes logarithms from a thousandth on.
    return abs(math.log(max(value, 1e-3)) - measurement.mean) <= FARTHEST_SD / 2 * measurement.sd
