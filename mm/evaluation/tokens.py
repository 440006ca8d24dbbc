"""Tokens of a text for the measures of overlap: words in English, characters in Chinese."""

import re
from typing import Final

from mm.batch import Language

_WORD: Final = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:'[^\W\d_]+)?")
_ROUGE_WORD: Final = re.compile(r"[a-z0-9]+")
# What sacrebleu's zh takes for a character of its own: with the ideographs also every symbol from U+2001 on.
_ALONE: Final = re.compile(
    "([\u2001-\u2a6d\u2e80-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef\u3200-\u4db5\u4e00-\u9fbb"
    "\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef])"
)
_MTEVAL: Final = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),  # a mark
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # a period or comma, unless behind a digit
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),  # or unless in front of one
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),  # a dash behind a digit
)
"""NIST's mteval 13a: how words are cut between the Chinese characters."""


def fold(text: str) -> str:
    """Case and white space folded: texts that differ in nothing else are the same."""
    return " ".join(text.lower().split())


def words(text: str, language: Language) -> list[str]:
    """Tokens in lower case.

    English: words and whole numbers ("1.5" is one), without marks, as captions are scored. Chinese: every
    character alone, marks too, what stands between them cut by mteval's rules: sacrebleu's `zh`.
    """
    if language == "en":
        return _WORD.findall(text.lower())
    spaced = _ALONE.sub(r" \1 ", text.lower().strip())
    for pattern, cut in _MTEVAL:
        spaced = pattern.sub(cut, spaced)
    return spaced.split()


def rouge_words(text: str) -> list[str]:
    """English tokens as rouge-score cuts them, without stemming: runs of the letters a-z and digits."""
    return _ROUGE_WORD.findall(text.lower())
