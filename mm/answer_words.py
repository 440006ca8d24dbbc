"""Answers as words: which spellings are one answer, and which answers a question's form allows."""

import re
import string
from collections.abc import Sequence
from typing import Final, Literal

Form = Literal["yes or no", "options", "open"]

_ARTICLES: Final = re.compile(r"\b(?:a|an|the)\b")
_NUMBERS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS: Final = {word: str(number) for number, word in enumerate(_NUMBERS)}
_ASKS: Final = re.compile(
    r"(?:is|are|was|were|do|does|did|can|could|has|have|had|will|would|should|any|isnt|arent|wasnt|doesnt)\b"
)
YES_NO: Final = ("yes", "no")
WELL: Final = (
    "normal",
    "unremarkable",
    "clear",
    "healthy",
    "intact",
    "unaltered",
    "midline",
    "symmetric",
    "symmetrical",
    "patent",
)
"""Words in which a question asks for what is well, so that "no" is the finding."""
_LONGEST: Final = 3
"""Words of an option."""


def normalise(answer: str) -> str:
    """Folds case, punctuation, articles and number words, so that "The right lung." is "right lung"."""
    words = _ARTICLES.sub(" ", answer.lower()).translate(str.maketrans("", "", string.punctuation)).split()
    return " ".join(_DIGITS.get(word, word) for word in words)


def form(question: str) -> Form:
    """What a question asks for, by its words alone: one of the options that it names, yes or no, or anything else."""
    words = normalise(question)
    asks = _ASKS.match(words) is not None
    if " or " in words and re.search(r" or (?:not|no)$", words) is None:
        return "options"
    return "yes or no" if asks else "open"


def options(question: str) -> tuple[str, ...]:
    """What may be meant by the options of "is it A or B": the words before and behind each "or", likeliest first.

    "left or right kidney" gives "left" and "right" first, then "right kidney" and "left kidney".
    """
    words = normalise(question).split()
    found: list[str] = []
    for place, word in enumerate(words):
        before, behind = words[:place], words[place + 1 :]
        if word != "or" or not before or not behind:
            continue
        for size in range(1, _LONGEST + 1):
            found += [" ".join(part) for part in (before[-size:], behind[:size]) if len(part) == size]
            if size > 1 and len(behind) >= size:
                found.append(" ".join((before[-1], *behind[1:size])))
    return tuple(dict.fromkeys(found))


def fitting(question: str, answers: Sequence[str]) -> list[int]:
    """Which of some answers fit the form of a question; all of them where none does.

    Args:
        question: As it was asked.
        answers: As `normalise` has them.
    """
    asked = form(question)
    if asked == "options":
        named = set(options(question))
        found = [place for place, answer in enumerate(answers) if answer in named]
        if not found:
            words = set(normalise(question).split())
            found = [place for place, item in enumerate(answers) if item and set(item.split()) <= words]
    else:
        found = [place for place, answer in enumerate(answers) if (answer in YES_NO) == (asked == "yes or no")]
    return found or list(range(len(answers)))
