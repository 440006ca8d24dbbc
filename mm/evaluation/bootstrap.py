"""Percentile bootstrap over studies (Efron and Tibshirani, 1993, chapter 13)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer


@dataclass(frozen=True)
class Score:
    """A value with the 95 % interval that resampling the studies gives."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    statistic: Callable[[Integer[np.ndarray, " N"]], float], num_items: int, *, rounds: int = 1000, seed: int = 0
) -> Score:
    """A statistic over items and its 95 % interval.

    Args:
        statistic: Of the indices of the items to count (with repetitions); may be nan for a sample on which
            it is not defined, which is then left out.
        num_items: Number of items.
        rounds: Number of resamples.
        seed: Of the resampling.

    Raises:
        ValueError: There is nothing to resample.
    """
    if num_items < 1:
        raise ValueError("num_items: nothing to score")
    rng = np.random.default_rng(seed)
    draws = np.array([statistic(rng.integers(0, num_items, num_items)) for _ in range(rounds)])
    draws = draws[np.isfinite(draws)]
    value = statistic(np.arange(num_items))
    if draws.size == 0:
        return Score(value, float("nan"), float("nan"))
    low, high = np.quantile(draws, [0.025, 0.975])
    return Score(float(value), float(low), float(high))
