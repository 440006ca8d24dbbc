"""The clinical record of a phantom patient as record.json: units differ between patients and values are missing."""

from typing import Any, Final

import numpy as np

from mm.ontology import MEASUREMENTS, Measurement
from mm.phantom.patient import Patient
from mm.phantom.table import TABLE

VITALS: Final = frozenset(
    {"temperature", "heart_rate", "respiratory_rate", "systolic_pressure", "oxygen_saturation"}
)  # fmt: skip
_STREAM: Final = 22


def render_record(patient: Patient) -> dict[str, Any]:
    """The record in the layout that `mm.data.record.parse_record` reads.

    Every measurement but the age is left out with the probability `TABLE.missing`, half of the time as an
    entry without a value. Values are rounded to four digits, as a laboratory prints them.
    """
    rng = np.random.default_rng([patient.seed, _STREAM])
    lists: dict[str, list[dict[str, Any]]] = {"vitals": [], "labs": []}
    for item in MEASUREMENTS:
        draw, null = rng.random(), rng.random() < 0.5
        unit, value = _express(rng, item, patient.record.values[item.name])
        if item.name == "age":
            continue
        missing = draw < TABLE.missing
        if missing and not null:
            continue
        entry = {"name": item.name, "value": None if missing else value, "unit": unit}
        lists["vitals" if item.name in VITALS else "labs"].append(entry)
    return {
        "demographics": {"sex": patient.sex, "age": {"value": patient.age, "unit": "a"}},
        "indication": patient.record.complaint,
        "history": "smoker" if patient.record.smoker else "non-smoker",
        **lists,
    }


def _express(rng: np.random.Generator, item: Measurement, canonical: float) -> tuple[str, float]:
    """Unit and value; the canonical unit half of the time."""
    if rng.random() < 0.5:
        return item.unit, _round(canonical)
    unit, factor, offset = item.units[int(rng.integers(len(item.units)))]
    return unit, _round((canonical - offset) / factor)


def _round(value: float) -> float:
    return float(f"{value:.4g}")
