"""What tells apart images of one place: echo, b-value, time and the like, of a file or of one frame of it.

Labels are words of ours and numbers; no text of a header is in them.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

Mark = float | str | tuple[float, ...]


class Marks(NamedTuple):
    """One field for each thing that may differ between images of one place; None where the header doesn't say.

    The order is that of preference in splitting a series (`mm.dicom.split`). Numbers have the units of their
    elements; `gradient` is DiffusionGradientOrientation, `dimensions` are DimensionIndexValues (PS3.3 C.7.6.17).
    """

    component: str | None = None
    """ImageType or FrameType, and ComplexImageComponent: magnitude, phase, water, a derived map ..."""
    echo: float | None = None
    echo_time: float | None = None
    b_value: float | None = None
    gradient: tuple[float, ...] | None = None
    inversion: float | None = None
    flip: float | None = None
    temporal: float | None = None
    """TemporalPositionIdentifier or TemporalPositionIndex."""
    offset: float | None = None
    """TemporalPositionTimeOffset or FrameReferenceTime."""
    cardiac: float | None = None
    """NominalPercentageOfCardiacPhase, or NominalCardiacTriggerDelayTime."""
    respiratory: float | None = None
    trigger: float | None = None
    tube: float | None = None
    """KVP."""
    kernel: str | None = None
    acquisition: float | None = None
    reference: str | None = None
    """FrameReferenceDateTime."""
    dimensions: tuple[float, ...] | None = None
    object: str | None = None
    """Of a multi-frame object: its InstanceNumber and what names it or its concatenation."""
    stack: str | None = None
    """StackID: a stack of its own, never a repetition."""
    acquired: str | None = None
    """When, to the fraction of a second; differs from slice to slice."""
    number: float | None = None
    """InstanceNumber."""


LABELS: Final[dict[str, Callable[[float], str]]] = {
    "echo": lambda value: f"echo {value:g}",
    "echo_time": lambda value: f"TE {value:g} ms",
    "b_value": lambda value: f"b {value:g}",
    "inversion": lambda value: f"TI {value:g} ms",
    "flip": lambda value: f"flip angle {value:g}",
    "temporal": lambda value: f"time {value:g}",
    "trigger": lambda value: f"trigger {value:g} ms",
    "tube": lambda value: f"{value:g} kV",
    "acquisition": lambda value: f"acquisition {value:g}",
}
COUNTED: Final = {
    "component": "image type",
    "gradient": "direction",
    "offset": "time",
    "cardiac": "cardiac phase",
    "respiratory": "respiratory phase",
    "reference": "time",
    "acquired": "time",
    "dimensions": "index",
    "number": "repetition",
}
COMPONENTS: Final = (
    ("magnitude", {"MAGNITUDE", "M", "M_FFE", "M_SE", "M_IR", "M_PCA"}),
    ("phase", {"PHASE", "P", "PHASE MAP", "VELOCITY"}),
    ("real", {"REAL", "R"}),
    ("imaginary", {"IMAGINARY", "I"}),
    ("water", {"WATER", "W"}),
    ("fat", {"FAT", "F"}),
    ("in phase", {"IN_PHASE", "IP", "IN"}),
    ("out of phase", {"OUT_PHASE", "OPP_PHASE", "OP", "OUT"}),
    ("field map", {"FIELD_MAP", "B0", "B0 MAP"}),
    ("ADC", {"ADC"}),
    ("FA", {"FA"}),
    ("projection", {"PROJECTION IMAGE", "MIP", "MINIP"}),
)


def _component(value: str) -> str | None:
    words = set(value.split("\\"))
    found = [name for name, known in COMPONENTS if words & known]
    return found[-1] if found else None


def labels(name: str, values: Sequence[Mark | None]) -> list[str]:
    """How parts that differ in one mark are told: by its value where that is a number, else counted from 1.

    Args:
        name: Field of `Marks`.
        values: Of the parts, in their order.
    """
    if name == "component":
        found = [_component(value) if isinstance(value, str) else None for value in values]
        if None not in found and len(set(found)) == len(found):
            return [label for label in found if label is not None]
    if name in LABELS and all(isinstance(value, float) for value in values):
        found = [LABELS[name](value) for value in values if isinstance(value, float)]
        if len(set(found)) == len(found):
            return [label for label in found if label is not None]
    return [f"{COUNTED.get(name, name.replace('_', ' '))} {index}" for index in range(1, len(values) + 1)]


def number(value: object) -> float | None:
    """A finite number out of an element's value, of its first where it has several."""
    if isinstance(value, (str, int, float)):
        try:
            result = float(value)
        except ValueError:
            return None
        return result + 0.0 if math.isfinite(result) else None
    if isinstance(value, Sequence) and value:
        return number(value[0])
    return None


def numbers(value: object) -> tuple[float, ...] | None:
    """All of them, or None where one is none."""
    if value is None or isinstance(value, (str, bytes)):
        return None
    items = tuple(number(item) for item in value) if isinstance(value, Sequence) else (number(value),)
    return None if None in items else tuple(item for item in items if item is not None)


def moment(value: object) -> str | None:
    """A DICOM time or date and time as text that sorts; None where it is none."""
    text = str(value) if value is not None else ""
    return text if re.fullmatch(r"[0-9]{6,14}(\.[0-9]+)?([+-][0-9]{4})?", text) else None
