"""Recall at k and median rank of one direction of retrieval, and what chance would give."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.evaluation.balanced import wilson
from mm.evaluation.bootstrap import Score


@dataclass(frozen=True)
class Retrieval:
    """One direction: share of queries whose match is among the first k, and the median rank (1 is best).

    Attributes:
        recall_at_10: With Wilson's 95 % interval, which takes queries for independent of each other.
    """

    recall_at_1: float
    recall_at_5: float
    recall_at_10: Score
    median_rank: float
    chance_at_10: float

    @classmethod
    def of(cls, ranks: Int[Tensor, " N"] | Int[np.ndarray, " N"], *, chance_at_10: float) -> "Retrieval":
        """From the rank of each query's best match (1 is best)."""
        ranks = torch.as_tensor(ranks)
        hits = {k: int((ranks <= k).sum()) for k in (1, 5, 10)}
        ten = Score(hits[10] / len(ranks), *wilson(hits[10], len(ranks)))
        return cls(hits[1] / len(ranks), hits[5] / len(ranks), ten, ranks.double().median().item(), chance_at_10)


def check_finite(**embeddings: Float[Tensor, "_ D"]) -> None:
    """Tells of embeddings that are no numbers, a part at a time: to look takes a copy.

    Raises:
        ValueError: A row isn't finite.
    """
    for name, values in embeddings.items():
        parts = (values[start : start + 4096] for start in range(0, len(values), 4096))
        broken = sum(int((~part.isfinite()).any(1).sum()) for part in parts)
        if broken:
            raise ValueError(f"{name} must be finite, got {broken} rows that aren't")


def chance(matches: Sequence[int], num_items: int, k: int) -> float:
    """The recall at k of a random order: 1 - C(N - p, k) / C(N, k), averaged over queries with p matches of N items."""
    misses = {
        number: math.prod(
            max(num_items - number - drawn, 0) / (num_items - drawn) for drawn in range(min(k, num_items))
        )
        for number in set(matches)
    }
    return 1.0 - sum(misses[number] for number in matches) / len(matches)
