"""BLEU-1 to BLEU-4 of a corpus (Papineni et al., ACL 2002), as pycocoevalcap computes it for captions.

Each precision is of the whole corpus, not a mean over texts; the brevity penalty compares the length with that of
the reference nearest in length (the shorter of two as near). sacrebleu's BLEU-4 has the same definition but smooths
precisions that are zero; this one has them near zero, so BLEU-4 of texts without a common 4-gram is 0.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from jaxtyping import Float, Int

ORDERS: Final = 4
_TINY: Final = 1e-15
_SMALL: Final = 1e-9
"""Keep 0 / 0 at 0, as pycocoevalcap does."""

Ngram = tuple[str, ...]


def ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    """How often each sequence of one to four tokens occurs."""
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, ORDERS + 1)
        for start in range(len(tokens) - order + 1)
    )


def nearest_length(length: int, lengths: Iterable[int]) -> int:
    """The reference length that the brevity penalty compares with: the nearest, of two as near the shorter."""
    return min((abs(other - length), other) for other in lengths)[1]


def bleu_counts(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> Int[np.ndarray, "N 10"]:
    """What BLEU needs of each text: resampling texts is resampling rows.

    Args:
        candidates: Tokens of each text.
        references: For each text the tokens of one reference or more.

    Returns:
        A row a text: its length, the nearest reference's length, n-grams (n 1 to 4) and those found in a reference.

    Raises:
        ValueError: The numbers of texts differ, or a text has no reference.
    """
    check_pairs(candidates, references)
    rows = np.zeros((len(candidates), 2 + 2 * ORDERS), dtype=np.int64)
    for row, candidate, known in zip(rows, candidates, references, strict=True):
        most: Counter[Ngram] = Counter()
        for reference in known:
            most |= ngrams(reference)
        row[:2] = len(candidate), nearest_length(len(candidate), map(len, known))
        row[2 : 2 + ORDERS] = [max(len(candidate) - order, 0) for order in range(ORDERS)]
        for ngram, number in ngrams(candidate).items():
            row[1 + ORDERS + len(ngram)] += min(number, most[ngram])
    return rows


def bleu_of(counts: Int[np.ndarray, "N 10"]) -> Float[np.ndarray, " 4"]:
    """BLEU-1 to BLEU-4, 0 to 1, of the texts that `bleu_counts` counted."""
    total = counts.sum(axis=0)
    length, reference, tried, found = total[0], total[1], total[2 : 2 + ORDERS], total[2 + ORDERS :]
    precision = (found + _TINY) / (tried + _SMALL)
    scores = np.cumprod(precision) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (length + _TINY) / (reference + _SMALL)
    # A text of no words at all: the penalty is exp(-1e15), which is 0.
    penalty = np.exp(min(1 - 1 / ratio, 0.0))
    return np.asarray(scores * penalty, dtype=np.float64)


def check_pairs(candidates: Sequence[object], references: Sequence[Sequence[object]]) -> None:
    """Tells of texts without a reference.

    Raises:
        ValueError: The numbers of texts differ, there are none, or a text has no reference.
    """
    if len(candidates) != len(references) or not candidates:
        raise ValueError(f"candidates: {len(candidates)} given for {len(references)} lists of references")
    for number, known in enumerate(references):
        if not known:
            raise ValueError(f"references of text {number} must be at least one, got none")
