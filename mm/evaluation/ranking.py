"""Rank, average precision and nDCG of every query, in tiles: 25,000 x 25,000 needs less than 64 MB besides its inputs.

What matches is said by the numbers of the items of each query, not by a table of all pairs. Items by their own numbers
are strict pairs; items whose texts are of one group (`text_groups`) forgive duplicates. Scores of matches are read from
the product they are compared with: a second product may round otherwise, and a perfect model then loses to itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from mm.decoder.onednn import onednn_matmul
from mm.evaluation.retrieval import check_finite
from mm.evaluation.tokens import fold

TILE_BYTES: Final = 8 << 20
"""Of scores, held at a time."""
_COUNTED: Final = 32
"""Matches of a query; to count what is ahead of so few is faster than to sort all."""


@dataclass(frozen=True)
class Ranking:
    """How each query's matches lie among all items.

    Attributes:
        rank: Of the best match, 1 is best. An item that ties with it and isn't a match counts half a place ahead,
            rounded up: constant embeddings score chance.
        average_precision: Mean over the matches of the precision down to each (ties as one step: scikit-learn's). With
            one match it is 1 / rank. The mean over queries is mAP.
        ndcg: Binary gains discounted by log2, over the best possible; tied items share their gain (scikit-learn's).
    """

    rank: Int[np.ndarray, " N"]
    average_precision: Float[np.ndarray, " N"]
    ndcg: Float[np.ndarray, " N"]


def text_groups(texts: Sequence[str]) -> Int[np.ndarray, " N"]:
    """A number for each text, the same where two are equal after folding case and white space."""
    ids: dict[str, int] = {}
    return np.array([ids.setdefault(fold(text), len(ids)) for text in texts], dtype=np.int64)


def rank_matches(
    queries: Float[Tensor, "N D"],
    items: Float[Tensor, "M D"],
    matches: Sequence[Int[np.ndarray, " _"]],
    *,
    depth: int | None = None,
) -> Ranking:
    """Ranks all items for every query by their product.

    Args:
        queries: On the CPU.
        items: On the CPU.
        matches: Of each query among the items, each once.
        depth: nDCG counts the first so many places; None counts all.

    Raises:
        ValueError: An embedding isn't finite (nothing is ahead of NaN, so it would score as perfect), or a query has
            no match.
    """
    check_finite(queries=queries, items=items)
    alone = sum(not len(chosen) for chosen in matches)
    if alone:
        raise ValueError(f"matches: every query needs one among the items, got {alone} without")
    gain = discounts(len(items), depth)
    number = len(queries)
    result = Ranking(np.zeros(number, dtype=np.int64), np.zeros(number), np.zeros(number))
    tile = max(1, TILE_BYTES // (items.element_size() * len(items)))
    for start in range(0, number, tile):
        with onednn_matmul():
            scores = (queries[start : start + tile] @ items.T).numpy()
        found = [row[chosen] for row, chosen in zip(scores, matches[start : start + len(scores)], strict=True)]
        for n, (row, matched) in enumerate(zip(scores, found, strict=True), start=start):
            result.rank[n], result.average_precision[n], result.ndcg[n] = _row(row, np.sort(matched), gain)
    return result


def discounts(num_items: int, depth: int | None = None) -> Float[np.ndarray, " _"]:
    """The discounts of the first so many places (nDCG's), added up; entry 0 is 0."""
    discount = 1 / np.log2(np.arange(2, num_items + 2))
    if depth is not None:
        discount[depth:] = 0
    return np.concatenate([[0.0], np.cumsum(discount)])


def _row(scores: np.ndarray, matched: np.ndarray, gain: np.ndarray) -> tuple[int, float, float]:
    """Rank, average precision and nDCG of one query: all its scores, and those of its matches ascending."""
    if len(matched) <= _COUNTED:
        ahead = np.array([np.count_nonzero(scores > score) for score in matched])
        through = np.array([np.count_nonzero(scores >= score) for score in matched])
    else:
        ordered = np.sort(scores)
        ahead = len(scores) - np.searchsorted(ordered, matched, "right")
        through = len(scores) - np.searchsorted(ordered, matched, "left")
    matched_through = len(matched) - np.searchsorted(matched, matched, "left")
    ties = through[-1] - ahead[-1] - matched_through[-1]
    rank = 1 + ahead[-1] + (ties + 1) // 2
    gained = ((gain[through] - gain[ahead]) / (through - ahead)).sum()
    return int(rank), float((matched_through / through).mean()), float(gained / gain[len(matched)])
