"""How wrong sizes are, and what two sizes alone say of a change."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Int

from mm import ontology
from mm.batch import DetectedFinding
from mm.evaluation.evaluate import table
from mm.evaluation.reports import SIZE_BINS_MM, Judged, nodule_pairs

CHANGED: Final = 1.2
"""A ratio of sizes from which on a finding is larger, or below its inverse smaller: 20 % count as a change."""


@dataclass(frozen=True)
class SizeError:
    """Of the nodules found in one range of true sizes, in mm; nan where none is.

    Attributes:
        true: Nodules in the range.
        found: Those that are matched and have a size.
        median: Of the absolute error.
        mean: Of the absolute error.
        bias: Mean of reported minus true.
    """

    true: int
    found: int
    median: float
    mean: float
    bias: float


def nodule_size_errors(judged: Sequence[Judged], spacing_mm: tuple[float, float, float]) -> dict[str, SizeError]:
    """By size bin, and of all."""
    pairs = [pair for item in judged for pair in nodule_pairs(item, spacing_mm)]
    result = {}
    for name, low, high in (*((f"{a:g}-{b:g} mm", a, b) for a, b in SIZE_BINS_MM), ("all", 0.0, np.inf)):
        inside = [pair for pair in pairs if low <= pair.true_mm < high]
        off = np.array([pair.found_mm - pair.true_mm for pair in inside if pair.found_mm is not None])
        some = len(off) > 0
        errors = (
            (float(np.median(np.abs(off))), float(np.abs(off).mean()), float(off.mean())) if some else (np.nan,) * 3
        )
        result[name] = SizeError(len(inside), len(off), *errors)
    return result


def size_error_table(errors: dict[str, SizeError]) -> str:
    """As Markdown."""
    rows = [
        (
            name,
            str(item.true),
            str(item.found),
            *(_mm(value) for value in (item.median, item.mean)),
            _mm(item.bias, "+"),
        )
        for name, item in errors.items()
    ]
    return table(("true size", "nodules", "found, with a size", "median error, mm", "mean error, mm", "bias, mm"), rows)


def _mm(value: float, sign: str = "") -> str:
    return "-" if np.isnan(value) else f"{value:{sign}.1f}"


def change_by_sizes(
    now: Sequence[Sequence[DetectedFinding]], before: Sequence[Sequence[DetectedFinding]], *, resolved: bool
) -> Int[np.ndarray, "N K"]:
    """What two reports, each of one volume alone, say of each finding's change: an index into `mm.ontology.CHANGES`.

    The sizes of the largest instances seen in each volume are compared; what isn't found has size 0. Not before: new;
    not now: resolved, or where that isn't a choice smaller; in neither: stable.

    Args:
        now: Findings of the current volumes.
        before: Findings of the last priors.
        resolved: Whether "resolved" is a choice.
    """
    shape = (len(now), len(ontology.CODES))
    said = np.full(shape, ontology.CHANGES.index("stable"))
    larger, smaller, new = (ontology.CHANGES.index(name) for name in ("larger", "smaller", "new"))
    for row, (here, there) in enumerate(zip(now, before, strict=True)):
        for column, code in enumerate(ontology.CODES):
            a, b = _largest(here, code), _largest(there, code)
            if a > CHANGED * b:
                said[row, column] = new if b == 0 else larger
            elif b > CHANGED * a:
                said[row, column] = ontology.CHANGES.index("resolved") if a == 0 and resolved else smaller
    return said


def _largest(findings: Sequence[DetectedFinding], code: str) -> float:
    sizes = [
        item.size for item in findings if item.code == code and item.present and item.voxel is not None and item.size
    ]
    return max(sizes, default=0.0)
