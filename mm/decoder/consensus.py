"""Minimum Bayes risk: of several sentences drawn for one row, the one that agrees most with the others.

The most probable sentence is one wording among many, and need not be near any other. Sentences drawn at random stand
for all that could be said; the one with the highest expected overlap with them is what they have in common (Kumar &
Byrne, HLT-NAACL 2004; Eikema & Aziz, COLING 2020). Overlap is of tokens: a placeholder is one of them.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

ORDERS: Final = 4

_Counts = tuple[Counter[tuple[int, ...]], ...]


def consensus(drawn: Sequence[Sequence[int]]) -> int:
    """The place of the sentence whose mean `overlap` with all that were drawn is highest; of several, the first.

    Args:
        drawn: Token ids of at least one sentence. One that was drawn twice counts twice.
    """
    weights = Counter(tuple(ids) for ids in drawn)
    counted = {ids: ngrams(ids) for ids in weights}

    def utility(ids: tuple[int, ...]) -> float:
        return sum(weight * overlap(counted[ids], counted[other]) for other, weight in weights.items())

    # Keys are in the order in which they were drawn first. Rounded, so that how a sum is ordered never decides.
    best = max(weights, key=lambda ids: round(utility(ids), 9))
    return next(place for place, ids in enumerate(drawn) if tuple(ids) == best)


def ngrams(ids: Sequence[int]) -> _Counts:
    """How often each run of one, two, three and four tokens occurs."""
    return tuple(
        Counter(tuple(ids[start : start + order]) for start in range(len(ids) - order + 1))
        for order in range(1, ORDERS + 1)
    )


def overlap(candidate: _Counts, reference: _Counts) -> float:
    """BLEU-4 of one sentence, 0 to 1: one is added to the counts of longer n-grams (Lin & Och, COLING 2004)."""
    logs = 0.0
    for order, (own, other) in enumerate(zip(candidate, reference, strict=True)):
        smooth = int(order > 0)
        found = sum(min(number, other[ngram]) for ngram, number in own.items()) + smooth
        if found == 0:
            return 0.0
        logs += math.log(found / (own.total() + smooth)) / ORDERS
    length, wanted = candidate[0].total(), reference[0].total()
    return math.exp(logs + min(0.0, 1 - wanted / length))
