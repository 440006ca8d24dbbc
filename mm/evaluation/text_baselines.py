"""Texts that are to be had for nothing: one text for all, the most frequent, somebody else's."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np

from mm.batch import Language
from mm.evaluation.bleu import ORDERS, Ngram, bleu_of, ngrams
from mm.evaluation.tokens import fold, words

_MOST_CANDIDATES: Final = 2000


def most_frequent_text(training: Sequence[str]) -> str:
    """The text that occurs most often but for case and white space, of equals the first."""
    counted = Counter(fold(text) for text in training)
    return max(training, key=lambda text: counted[fold(text)])


def likest_text(training: Sequence[str], language: Language, *, seed: int = 0) -> str:
    """The training text that scores highest when it is given for every other one, by corpus BLEU-4.

    What a model without eyes can learn to say. Chosen on training texts alone, among all distinct ones or 2,000 drawn.
    """
    tokens = [words(text, language) for text in training]
    held: dict[Ngram, list[int]] = {}
    for each in tokens:
        for ngram, count in ngrams(each).items():
            held.setdefault(ngram, []).append(count)
    counts = {ngram: np.array(values) for ngram, values in held.items()}
    rows = list({fold(text): row for row, text in enumerate(training)}.values())
    if len(rows) > _MOST_CANDIDATES:
        rows = np.random.default_rng(seed).permutation(rows)[:_MOST_CANDIDATES].tolist()
    length = sum(map(len, tokens))

    def score(row: int) -> float:
        own = tokens[row]
        found = np.zeros(ORDERS)
        for ngram, count in ngrams(own).items():
            found[len(ngram) - 1] += np.minimum(counts[ngram], count).sum()
        tried = [len(tokens) * max(len(own) - order, 0) for order in range(ORDERS)]
        return float(bleu_of(np.array([[len(tokens) * len(own), length, *tried, *found]], dtype=np.int64))[-1])

    return training[max(rows, key=score)]


def random_texts(training: Sequence[str], number: int, *, seed: int = 0) -> list[str]:
    """Training texts drawn for so many others: what a patient's report says of a stranger."""
    drawn = np.random.default_rng(seed).integers(0, len(training), number)
    return [training[row] for row in drawn]
