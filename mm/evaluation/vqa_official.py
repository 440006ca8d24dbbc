"""Accuracy of VQAv2 (Antol et al., ICCV 2015; https://visualqa.org/evaluation.html), to the letter.

The published program does some things its page doesn't say, and scores in the literature have them in: a mark between
two words becomes a space, but one beside a space goes, and where a text has a comma between digits all marks go;
apostrophes and colons stay; only the first 32 periods of a text go; "none" is 0; "somebody'd" loses its apostrophe.
"""

import re
from collections.abc import Sequence
from typing import Final

_MARKS: Final = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS: Final = re.compile(r"\d,\d")
_PERIOD: Final = re.compile(r"\.(?!\d)")
_MOST_PERIODS: Final = 32
_NUMBERS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS: Final = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES: Final = frozenset({"a", "an", "the"})
_CONTRACTED: Final = (
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't", "don't", "hadn't",
    "hadn't've", "hasn't", "haven't", "he'd", "he'd've", "he's", "how'd", "how'll", "how's", "isn't", "it'd",
    "it'd've", "it'll", "ma'am", "mightn't", "mightn't've", "might've", "mustn't", "must've", "needn't",
    "not've", "o'clock", "oughtn't", "'ow's'at", "shan't", "she'd've", "should've", "shouldn't", "shouldn't've",
    "somebody'd've", "somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll", "someone's",
    "something'd", "something'd've", "something'll", "that's", "there'd", "there'd've", "there're", "there's",
    "they'd", "they'd've", "they'll", "they're", "they've", "'twas", "wasn't", "we'd've", "we've", "weren't",
    "what'll", "what're", "what's", "what've", "when's", "where'd", "where's", "where've", "who'd", "who'd've",
    "who'll", "who's", "who've", "why'll", "why're", "why's", "won't", "would've", "wouldn't", "wouldn't've",
    "y'all", "y'all'll", "y'all'd've", "you'd", "you'd've", "you'll", "you're", "you've",
)  # fmt: skip
# A word is known with one apostrophe missing, whichever; with all missing it isn't.
_CONTRACTIONS: Final = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTED for place, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def without_marks(text: str) -> str:
    """The first step: marks and periods."""
    result = text
    everywhere = _THOUSANDS.search(text) is not None
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if everywhere or beside_space else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def with_plain_words(text: str) -> str:
    """The second step: lower case, digits for number words, no articles, apostrophes where they are missing."""
    spelt = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in spelt if word not in _ARTICLES)


def official(answer: str) -> str:
    """An answer as the published evaluation compares it."""
    return with_plain_words(without_marks(answer.replace("\n", " ").replace("\t", " ").strip()))


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Accuracy of one answer against those of several people (ten in VQAv2): agreement with three is right.

    The mean over all ways to leave one person out of min(1, agreeing / 3). Where all people wrote the same, nothing is
    normalised, as published. Against the answer of one person alone it is 0 by
    definition.

    Raises:
        ValueError: There is nobody to agree with.
    """
    if not people:
        raise ValueError("people: an answer needs at least one to be compared with, got none")
    given, known = _line(answer), [_line(item) for item in people]
    if len(set(known)) > 1:
        given, known = official(given), [official(item) for item in known]
    agree = [item == given for item in known]
    return sum(min(1.0, (sum(agree) - left_out) / 3) for left_out in agree) / len(agree)


def _line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
