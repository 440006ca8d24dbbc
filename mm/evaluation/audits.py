"""Reports made wrong on purpose, and which scores notice.

Each alteration changes what a report tells a clinician and few of its words: a score that hardly moves does not
measure what matters. All are pure functions of a text; English and Chinese.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from mm import ontology
from mm.batch import Language
from mm.evaluation.bleu import bleu_counts, bleu_of
from mm.evaluation.bootstrap import Score, bootstrap
from mm.evaluation.cider import cider_d
from mm.evaluation.labels import labels, mentions
from mm.evaluation.meteor import meteor
from mm.evaluation.rouge import rouge_l_coco
from mm.evaluation.tokens import words

_UNITS: Final = r"(?:mm3|mm³|mm|cm|ml|毫米|厘米|毫升|%)"
_SIZE: Final = re.compile(rf"(?<![A-Za-z\d.])(\d+(?:\.\d+)?)(?=[\s-]?{_UNITS})")
_NUMBER: Final = re.compile(r"\d+(?:\.\d+)?")
_OTHER_SIDE: Final = {"left": "right", "right": "left", "左": "右", "右": "左"}
_SIDE: Final = re.compile(r"\b(?:left|right)\b|[左右]", re.IGNORECASE)
_DEGREES: Final = r"small|mild|moderate|large|severe|(?:slight|moderate|marked)ly displaced"
# What may stand between "no" and the finding's name: an article, a size, a side, a degree.
_BEFORE_NAME: Final = re.compile(
    rf"(?:\ban? |\bthe )?(?:(?:{_UNITS}|\d+(?:[.,]\d+)*|{_DEGREES}|new|stable|left|right|pleural|pulmonary)[ -])*$",
    re.IGNORECASE,
)
_SEEN: Final = re.compile(r"(?:可见|见|有|示)?$")
_SENTENCES: Final[dict[Language, re.Pattern[str]]] = {
    "en": re.compile(r".+?(?:[.!?](?=\s|$)\s*|\n+|$)", re.DOTALL),
    "zh": re.compile(r".+?(?:[。！？]\s*|\n+|$)", re.DOTALL),
}


def negate(text: str, language: Language) -> str:
    """Denies every finding that the text asserts."""
    for mention in reversed(mentions(text, language)):
        if mention.status != "present":
            continue
        start, behind = mention.start, text[mention.end :]
        if language == "zh":
            seen = _SEEN.search(text[:start])
            assert seen is not None
            text = f"{text[: seen.start()]}未见{text[start : mention.end]}{behind}"
            continue
        before = _BEFORE_NAME.search(text[:start])
        assert before is not None
        phrase = re.sub(r"^(?:an?|the) ", "", text[before.start() : mention.end], flags=re.IGNORECASE)
        first = not text[: before.start()].strip() or text[: before.start()].rstrip()[-1:] in ".!?"
        text = f"{text[: before.start()]}{'No' if first else 'no'} {phrase[:1].lower()}{phrase[1:]}{behind}"
    return text


def swap_side(text: str) -> str:
    """Left for right and right for left."""

    def other(match: re.Match[str]) -> str:
        word = _OTHER_SIDE[match.group().lower()]
        return word.capitalize() if match.group()[0].isupper() else word

    return _SIDE.sub(other, text)


def scale_size(text: str, factor: float = 2.0) -> str:
    """Every number in front of a unit of size multiplied, with as many decimals as it had."""

    def scaled(match: re.Match[str]) -> str:
        return f"{float(match.group()) * factor:.{len(match.group().partition('.')[2])}f}"

    return _SIZE.sub(scaled, text)


def drop_finding(text: str, language: Language) -> str:
    """Without the sentences that assert the first finding asserted; other findings they name go with them."""
    asserted = [mention for mention in mentions(text, language) if mention.status == "present"]
    if not asserted:
        return text
    sentences = _SENTENCES[language].findall(text)
    return "".join(part for part in sentences if labels(part, language)[asserted[0].code] != "present")


ALTERATIONS: Final[dict[str, Callable[[str, Language], str]]] = {
    "negate": negate,
    "swap side": lambda text, _: swap_side(text),
    "scale size": lambda text, _: scale_size(text),
    "drop finding": drop_finding,
}


@dataclass(frozen=True)
class Measure:
    """A score of a set of reports: a row of each, and one number of any rows, so that resampling is cheap."""

    rows: Callable[[Sequence[str], Sequence[str], Language], np.ndarray]
    total: Callable[[np.ndarray], float]


def _mean(rows: np.ndarray) -> float:
    return float(rows.mean())


def _f1(rows: np.ndarray) -> float:
    """Of rows (hits, said + true); nan where nothing is said and nothing true."""
    hits, number = rows.sum(axis=0)
    return float(2 * hits / number) if number else float("nan")


def _agreement(said: Callable[[str, Language], Counter[Hashable]]) -> Measure:
    def rows(texts: Sequence[str], references: Sequence[str], language: Language) -> np.ndarray:
        pairs = [(said(a, language), said(b, language)) for a, b in zip(texts, references, strict=True)]
        return np.array([((a & b).total(), a.total() + b.total()) for a, b in pairs])

    return Measure(rows, _f1)


def _overlap(measure: Callable[[list[list[str]], list[list[list[str]]]], np.ndarray]) -> Callable[..., np.ndarray]:
    def rows(texts: Sequence[str], references: Sequence[str], language: Language) -> np.ndarray:
        return measure([words(text, language) for text in texts], [[words(text, language)] for text in references])

    return rows


def findings_said(text: str, language: Language) -> Counter[Hashable]:
    """The findings that a text asserts, once each, as the rule labeler reads it."""
    found = labels(text, language)
    return Counter(code for code in ontology.CODES if found[code] == "present")


def sides_said(text: str, language: Language) -> Counter[Hashable]:
    """Each asserted finding with each side that its sentence names."""
    return Counter(
        (mention.code, side.lower())
        for sentence in _SENTENCES[language].findall(text)
        for mention in mentions(sentence, language)
        if mention.status == "present"
        for side in _SIDE.findall(sentence)
    )


def numbers_said(text: str, language: Language) -> Counter[Hashable]:  # noqa: ARG001  # numbers are written alike
    """The numbers of a text."""
    return Counter(_NUMBER.findall(text))


def _meteor_rows(texts: Sequence[str], references: Sequence[str], language: Language) -> np.ndarray:
    return meteor([words(text, language) for text in texts], [[words(text, language)] for text in references], language)


MEASURES: Final[dict[str, Measure]] = {
    "BLEU-4": Measure(_overlap(bleu_counts), lambda rows: float(bleu_of(rows)[3])),
    "ROUGE-L": Measure(_overlap(rouge_l_coco), _mean),
    "METEOR": Measure(_meteor_rows, _mean),
    "CIDEr-D": Measure(_overlap(cider_d), _mean),
    "finding F1": _agreement(findings_said),
    "side F1": _agreement(sides_said),
    "number F1": _agreement(numbers_said),
}
"""All are 0 to 1 but CIDEr-D, 0 to 10; an F1 is over all things said in all texts."""


@dataclass(frozen=True)
class Audit:
    """What one score makes of one alteration.

    Attributes:
        changed: Texts that the alteration changed at all; only these are scored.
        before: The score of those texts.
        after: The score of the altered texts.
        lost: Share of the score that is lost, with its bootstrap interval (nan where the score was 0).
        noticed: Whether at least a tenth of the score is lost for certain: the interval lies above.
    """

    changed: int
    before: float
    after: float
    lost: Score
    noticed: bool


def audit(
    texts: Sequence[str], references: Sequence[str], language: Language, *, rounds: int = 300
) -> dict[str, dict[str, Audit]]:
    """Every measure on every alteration: {alteration: {measure: what it made of it}}; none without a changed text.

    Args:
        texts: Reports to alter: a model's, or the references themselves for what the measures could see at best.
        references: Of the same studies, in the same order.
        language: Of both.
        rounds: Of the bootstrap over the changed texts.
    """
    result: dict[str, dict[str, Audit]] = {}
    for name, alter in ALTERATIONS.items():
        altered = [alter(text, language) for text in texts]
        kept = [index for index, text in enumerate(texts) if text != altered[index]]
        if kept:
            before, after, known = ([side[index] for index in kept] for side in (texts, altered, references))
            result[name] = {
                title: _audit(
                    measure.rows(before, known, language), measure.rows(after, known, language), measure.total, rounds
                )
                for title, measure in MEASURES.items()
            }
    return result


def _audit(before: np.ndarray, after: np.ndarray, total: Callable[[np.ndarray], float], rounds: int) -> Audit:
    def lost(drawn: np.ndarray) -> float:
        whole = total(before[drawn])
        return 1 - total(after[drawn]) / whole if whole > 0 else float("nan")

    share = bootstrap(lost, len(before), rounds=rounds)
    return Audit(len(before), total(before), total(after), share, share.low > 0.1)
