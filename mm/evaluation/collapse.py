"""How much a set of reports says: does a model write for the patient, or one template for all?"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from mm.batch import Language
from mm.evaluation.bleu import ORDERS, Ngram, bleu_of, ngrams
from mm.evaluation.tokens import fold, words

_NUMBER: Final = re.compile(r"\d+(?:[.,]\d+)*")
_END: Final[dict[Language, re.Pattern[str]]] = {
    "en": re.compile(r"(?<=[.!?;])\s+|\n"),
    "zh": re.compile(r"(?<=[。！？；])|\n"),
}


@dataclass(frozen=True)
class Collapse:
    """Shares between 0 and 1, read beside those of the reference reports.

    Attributes:
        distinct: Different texts, of all, once numbers are masked: low where a template is filled.
        self_bleu: BLEU-4 of each text against all others: high where texts repeat one another (Zhu et al., 2018).
        copied: Sentences, numbers masked, that stand so in the training texts; nan without training texts.
    """

    distinct: float
    self_bleu: float
    copied: float


def collapse(texts: Sequence[str], language: Language, *, training: Sequence[str] = ()) -> Collapse:
    """The three together.

    Raises:
        ValueError: There are no texts.
    """
    return Collapse(distinct_ratio(texts), self_bleu(texts, language), copy_rate(texts, training, language))


def masked(text: str) -> str:
    """The text with every number as `#`, case and white space folded."""
    return fold(_NUMBER.sub("#", text))


def distinct_ratio(texts: Sequence[str]) -> float:
    """The share of different texts, numbers masked: 1/N where all are one template.

    Raises:
        ValueError: There are no texts.
    """
    if not texts:
        raise ValueError("texts must be one or more, got none")
    return len({masked(text) for text in texts}) / len(texts)


def copy_rate(texts: Sequence[str], training: Sequence[str], language: Language) -> float:
    """The share of sentences, numbers masked, that stand word for word in a training text; nan without any."""
    known = {sentence for text in training for sentence in _sentences(text, language)}
    written = [sentence for text in texts for sentence in _sentences(text, language)]
    return sum(sentence in known for sentence in written) / len(written) if known and written else float("nan")


def _sentences(text: str, language: Language) -> list[str]:
    return [masked(part) for part in _END[language].split(text) if part.strip()]


def self_bleu(texts: Sequence[str], language: Language) -> float:
    """Corpus BLEU-4 of each text with all others as its references; 0 for a single text.

    The most frequent count of an n-gram in any other text is the largest of all, or the second largest for the text
    that holds the largest: one pass over the texts, not one for each pair.
    """
    if len(texts) < 2:
        return 0.0
    tokens = [words(text, language) for text in texts]
    counted = [ngrams(item) for item in tokens]
    most: Counter[Ngram] = Counter()
    second: Counter[Ngram] = Counter()
    for counts in counted:
        for ngram, number in counts.items():
            second[ngram] = max(second[ngram], min(number, most[ngram]))
            most[ngram] = max(most[ngram], number)
    lengths = np.array([len(item) for item in tokens])
    rows = np.zeros((len(texts), 2 + 2 * ORDERS), dtype=np.int64)
    for index, (row, counts) in enumerate(zip(rows, counted, strict=True)):
        others = np.delete(lengths, index)
        near = np.abs(others - lengths[index])
        row[:2] = lengths[index], others[near == near.min()].min()
        row[2 : 2 + ORDERS] = np.maximum(lengths[index] - np.arange(ORDERS), 0)
        for ngram, number in counts.items():
            other = second[ngram] if number == most[ngram] else most[ngram]
            row[1 + ORDERS + len(ngram)] += min(number, other)
    return float(bleu_of(rows)[3])
