"""Recall at k and median rank, both ways, strict and duplicate-aware, with a shuffled control."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

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
        recall_at_10: With Wilson's 95 % interval.
    """

    recall_at_1: float
    recall_at_5: float
    recall_at_10: Score
    median_rank: float
    chance_at_10: float

    @classmethod
    def of(cls, ranks: Int[Tensor, " N"], *, chance_at_10: float) -> "Retrieval":
        """From the rank of each query's best match (1 is best)."""
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


def equal_texts(texts: Sequence[str]) -> Bool[Tensor, "N N"]:
    """True where two texts are the same after folding case and white space."""
    ids: dict[str, int] = {}
    folded = torch.tensor([ids.setdefault(" ".join(text.lower().split()), len(ids)) for text in texts])
    return folded[:, None] == folded[None, :]


def chance(positive: Bool[Tensor, "N N"], k: int) -> float:
    """The recall at k of a random order: 1 - C(N - p, k) / C(N, k), averaged over queries with p matches."""
    num_items = positive.shape[1]
    misses = []
    for matches in positive.sum(dim=1).tolist():
        miss = 1.0
        for drawn in range(min(k, num_items)):
            miss *= max(num_items - matches - drawn, 0) / (num_items - drawn)
        misses.append(miss)
    return 1.0 - sum(misses) / len(misses)


def retrieval(
    queries: Float[Tensor, "N D"], items: Float[Tensor, "N D"], positive: Bool[Tensor, "N N"] | None = None
) -> Retrieval:
    """Scores of one direction; `positive` as in `ranks`."""
    known = torch.eye(len(items), dtype=torch.bool) if positive is None else positive
    return Retrieval.of(ranks(queries, items, known), chance_at_10=chance(known, 10))


def shuffled(
    queries: Float[Tensor, "N D"],
    items: Float[Tensor, "N D"],
    positive: Bool[Tensor, "N N"],
    *,
    seed: int,
    orders: int = 100,
) -> Retrieval:
    """The control: pairs drawn at random, `orders` times. Scores that lie above chance here have seen the answer.

    One order alone scatters by a third of chance and more. The interval is where 95 % of the orders lie.
    """
    generator = torch.Generator().manual_seed(seed)
    # Items move, the pairing stays by index: query n is now told that a stranger's item is its match.
    orders_of = (torch.randperm(len(items), generator=generator) for _ in range(orders))
    drawn = torch.stack([ranks(queries, items[order], positive) for order in orders_of])
    tens = (drawn <= 10).double().mean(1)
    low, high = tens.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    pooled = Retrieval.of(drawn.flatten(), chance_at_10=chance(positive, 10))
    return replace(pooled, recall_at_10=Score(pooled.recall_at_10.value, low, high))
