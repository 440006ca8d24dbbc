"""Balanced accuracy with an interval that still means something when a recall is 0 or 1.

Resampling can't: of fifteen fractures all missed it draws fifteen missed each time, and the interval has no width.
"""

import math
from typing import Final

import numpy as np
from jaxtyping import Shaped

from mm.evaluation.bootstrap import Score

Z: Final = 1.959964
"""Quantile of the normal distribution for 95 %."""


def balanced_accuracy(predicted: Shaped[np.ndarray, " N"], truth: Shaped[np.ndarray, " N"]) -> Score:
    """Mean recall over the classes that occur (any labels), nan where fewer than two do, and its 95 % interval.

    Each recall has Wilson's interval; those of independent shares are combined by variance recovery (MOVER; Newcombe,
    Statistics in Medicine 17, 1998; Donner and Zou, The Statistician 51, 2002).
    """
    classes = np.unique(truth)
    if len(classes) < 2:
        return Score(math.nan, math.nan, math.nan)
    found = [(int((predicted[truth == label] == label).sum()), int((truth == label).sum())) for label in classes]
    value = sum(hits / number for hits, number in found) / len(classes)
    ranges = [wilson(hits, number) for hits, number in found]
    below = math.sqrt(sum((hits / n - low) ** 2 for (hits, n), (low, _) in zip(found, ranges, strict=True)))
    above = math.sqrt(sum((high - hits / n) ** 2 for (hits, n), (_, high) in zip(found, ranges, strict=True)))
    return Score(value, value - below / len(classes), value + above / len(classes))


def wilson(hits: int, number: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (JASA 22, 1927)."""
    share, extra = hits / number, Z**2 / number
    middle = share + extra / 2
    half = Z * math.sqrt(share * (1 - share) / number + extra / (4 * number))
    return (middle - half) / (1 + extra), (middle + half) / (1 + extra)
