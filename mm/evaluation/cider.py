"""CIDEr-D (Vedantam et al., CVPR 2015), as pycocoevalcap computes it.

Texts and references are vectors of n-gram counts, n 1 to 4, each weighted by how few reference texts hold it. Counts
beyond the reference's are clipped and differing lengths cost (the D). The weights come from the references that are
scored against, so scores of different test sets do not compare, and one text alone has weight 0 and scores 0.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
from jaxtyping import Float

from mm.evaluation.bleu import ORDERS, Ngram, check_pairs, ngrams

SIGMA: Final = 6.0
"""Of the length penalty, in pairs of neighbouring tokens."""


def cider_d(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> Float[np.ndarray, " N"]:
    """CIDEr-D of each text, 0 to 10; the corpus score is the mean.

    Args:
        candidates: Tokens of each text.
        references: For each text the tokens of one reference or more.

    Raises:
        ValueError: The numbers of texts differ, or a text has no reference.
    """
    check_pairs(candidates, references)
    counted = [[ngrams(reference) for reference in known] for known in references]
    # How many texts have the n-gram in any of their references.
    frequency = Counter(ngram for known in counted for ngram in set().union(*known))
    num_texts = math.log(len(candidates))

    def weighted(counts: Counter[Ngram]) -> _Vector:
        return _Vector({k: n * (num_texts - math.log(max(1, frequency[k]))) for k, n in counts.items()}, counts)

    scores = np.zeros(len(candidates))
    for number, (candidate, known) in enumerate(zip(candidates, counted, strict=True)):
        ours = weighted(ngrams(candidate))
        scores[number] = 10 * float(np.mean([_similarity(ours, weighted(reference)) for reference in known]))
    return scores


class _Vector:
    """Weighted n-grams, their norm for each n, and the number of pairs of neighbours."""

    def __init__(self, weights: dict[Ngram, float], counts: Counter[Ngram]) -> None:
        self.weights = weights
        squares = np.zeros(ORDERS)
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        self.norm: np.ndarray = np.sqrt(squares)
        self.pairs = sum(number for ngram, number in counts.items() if len(ngram) == 2)


def _similarity(ours: _Vector, theirs: _Vector) -> float:
    """Mean over n of the clipped cosine, less the length penalty."""
    shared = np.zeros(ORDERS)
    for ngram, weight in ours.weights.items():
        other = theirs.weights.get(ngram, 0.0)
        shared[len(ngram) - 1] += min(weight, other) * other
    norm = ours.norm * theirs.norm
    cosine = np.divide(shared, norm, out=np.zeros(ORDERS), where=norm > 0)
    return float(cosine.mean()) * math.exp(-((ours.pairs - theirs.pairs) ** 2) / (2 * SIGMA**2))
