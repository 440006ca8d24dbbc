"""Recall at k and median rank of one direction of retrieval, and what chance would give."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm.evaluation.balanced import wilson
from mm.evaluation.bootstrap import Score

_TILE_SCORES: Final = 1 << 19
"""Scores held at a time, with a masked copy and a few truth values each."""


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


def ranks(
    queries: Float[Tensor, "N D"],
    items: Float[Tensor, "M D"],
    positive: Bool[Tensor, "N M"] | None = None,
    *,
    tile: int | None = None,
) -> Int[Tensor, " N"]:
    """The rank of the best match of every query among all items, which may be more than the queries.

    Item n is the match of query n; `positive` may name more (texts that are equal). The score of a match is
    read from the same product as the scores it is compared with: a second product may round otherwise, and a
    perfect model would then lose to itself. An item that ties with the match counts half a place ahead,
    rounded up, so that constant embeddings score chance. Products are made `tile` queries at a time, by default
    so many that 25,000 x 25,000 needs less than 64 MB besides its inputs.

    Raises:
        ValueError: An embedding isn't finite: nothing is ahead of NaN, so it would score as perfect.
    """
    check_finite(queries=queries, items=items)
    num_items = len(items)
    result = torch.empty(len(queries), dtype=torch.long)
    tile = max(1, _TILE_SCORES // num_items) if tile is None else tile
    for start in range(0, len(queries), tile):
        scores = queries[start : start + tile] @ items.T
        if positive is None:
            rows = torch.arange(len(scores))
            match = torch.zeros(scores.shape, dtype=torch.bool)
            match[rows, rows + start] = True
        else:
            match = positive[start : start + tile]
        best = scores.masked_fill(~match, -torch.inf).amax(dim=1, keepdim=True)
        others = ~match
        ahead = ((scores > best) & others).sum(dim=1)
        ties = ((scores == best) & others).sum(dim=1)
        result[start : start + tile] = 1 + ahead + (ties + 1) // 2
    return result


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
