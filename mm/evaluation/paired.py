"""Paired randomisation (Noreen, 1989, chapter 2): could the difference of two runs on the same items be chance?"""

from collections.abc import Callable
from typing import Final

import numpy as np
from jaxtyping import Shaped

EXACT_UP_TO: Final = 13
"""Items; all 2^13 = 8192 ways of swapping are then fewer than the draws."""
ROUNDS: Final = 10_000
_SLACK: Final = 1e-12
"""Relative: sums in another order round otherwise, and as large must count as large."""


def paired_p(
    ours: Shaped[np.ndarray, "N ..."],
    theirs: Shaped[np.ndarray, "..."],
    *,
    statistic: Callable[[Shaped[np.ndarray, "N ..."]], float] = lambda values: float(values.mean()),
    rounds: int = ROUNDS,
    seed: int = 0,
) -> float:
    """Two-sided p: how often runs whose items are swapped at random differ as much as these two do.

    Up to 13 items every way of swapping is counted; beyond, `rounds` seeded draws, the observed one counted too
    (Phipson and Smyth, 2010), so that p is never 0.

    Args:
        ours: A score of each item, or a row of counts of each (`mm.evaluation.bleu.bleu_counts`).
        theirs: Of the other run, the same items in the same order.
        statistic: Of the scores or rows of a run; by default the mean.
        rounds: Number of draws.
        seed: Of the draws.

    Raises:
        ValueError: The shapes differ, or there is nothing to compare.
    """
    if ours.shape != theirs.shape or not len(ours):
        raise ValueError(f"theirs must be of the shape of ours {ours.shape} with an item or more, got {theirs.shape}")
    number = len(ours)
    observed = abs(statistic(ours) - statistic(theirs))
    bound = observed - _SLACK * max(1.0, observed)
    exact = number <= EXACT_UP_TO
    if exact:
        swaps = (np.arange(2**number)[:, None] >> np.arange(number)) & 1 == 1
    else:
        swaps = np.random.default_rng(seed).random((rounds, number)) < 0.5
    extreme = 0
    for swap in swaps:
        chosen = swap.reshape(-1, *(1,) * (ours.ndim - 1))
        difference = statistic(np.where(chosen, theirs, ours)) - statistic(np.where(chosen, ours, theirs))
        extreme += abs(difference) >= bound
    return extreme / len(swaps) if exact else (extreme + 1) / (rounds + 1)
