"""Questions on a phantom patient with short answers from a closed vocabulary, in English and Chinese.

Presence is asked in balance (as many that are answered yes as no), so that "always yes" scores a half.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from mm import ontology
from mm.batch import FindingTruth, Language, Question

T = TypeVar("T")
MAX_QUESTIONS: Final = 8
WORDS: Final[dict[Language, dict[str, str]]] = {
    "en": {word: word for word in ("yes", "no", "left", "right", "both", *ontology.CHANGES)},
    "zh": {
        "yes": "是", "no": "否", "left": "左", "right": "右", "both": "双侧", "unknown": "不明",
        "new": "新发", "larger": "增大", "stable": "稳定", "smaller": "缩小", "resolved": "消失",
    },
}  # fmt: skip
_PRESENT: Final[dict[Language, tuple[str, ...]]] = {
    "en": ("Is there {name}?", "Does this patient have {name}?", "Can {name} be found?"),
    "zh": ("有{name}吗？", "该患者是否有{name}？", "能否发现{name}？"),
}
_SIDE: Final[dict[Language, tuple[str, ...]]] = {
    "en": ("On which side is the {name}?", "Which side shows the {name}?"),
    "zh": ("{name}在哪一侧？", "哪一侧有{name}？"),
}
_CHANGE: Final[dict[Language, tuple[str, ...]]] = {
    "en": ("How has the {name} changed since the prior study?", "What is the course of the {name}?"),
    "zh": ("与前次相比，{name}有何变化？", "{name}的变化如何？"),
}
_COUNT: Final[dict[Language, tuple[str, ...]]] = {
    "en": ("How many nodules are there?", "What is the number of nodules?"),
    "zh": ("有几个结节？", "结节的数目是多少？"),
}
_CAUSE: Final[dict[Language, tuple[str, ...]]] = {
    "en": ("Is the lung opacity due to infection?",),
    "zh": ("肺部阴影是感染所致吗？",),
}


@dataclass(frozen=True)
class Pair:
    """One question in both languages, with its answer in both."""

    en: Question
    zh: Question


def questions(findings: Sequence[FindingTruth], *, rng: np.random.Generator) -> tuple[Pair, ...]:
    """Four to eight questions; the same in both languages.

    Args:
        findings: Of the current visit, resolved ones included.
        rng: Chooses findings and wordings.
    """
    present = {item.code for item in findings if item.present}
    asked = _presence(sorted(present, key=ontology.CODES.index), rng)
    others = []
    for code in _shuffled([code for code in ontology.CODES if code in present], rng)[:2]:
        sides = {item.side for item in findings if item.code == code and item.present} - {"none"}
        if sides:
            others.append(_pair(_SIDE, code, "both" if len(sides) == 2 else next(iter(sides)), rng, closed=False))
    followed = {item.code: item.change for item in findings if item.change != "unknown"}
    others += [_pair(_CHANGE, code, followed[code], rng, closed=False) for code in _shuffled(sorted(followed), rng)[:1]]
    if "nodule" in present:
        number = sum(item.code == "nodule" and item.present for item in findings)
        others.append(_pair(_COUNT, "nodule", str(number), rng, closed=False))
    if present & {"consolidation", "atelectasis"}:
        others.append(_pair(_CAUSE, "infection", "yes" if "infection" in present else "no", rng, closed=True))
    return (*asked, *_shuffled(others, rng)[: MAX_QUESTIONS - len(asked)])


def _presence(present: list[str], rng: np.random.Generator) -> list[Pair]:
    """Questions on presence, four or five a patient: up to four to be answered yes, the others (at least one) no.

    Over patients of the frozen prevalences yes and no are equally frequent within two percent.
    """
    absent = [code for code in ontology.CODES if code not in present]
    yes = _shuffled(present, rng)[:4]
    no = _shuffled(absent, rng)[: max(1, 4 - len(yes))]
    chosen = [(code, "yes") for code in yes] + [(code, "no") for code in no]
    return [_pair(_PRESENT, code, answer, rng, closed=True) for code, answer in _shuffled(chosen, rng)]


def _shuffled(items: list[T], rng: np.random.Generator) -> list[T]:
    return [items[index] for index in rng.permutation(len(items)).tolist()]


def _pair(
    wordings: dict[Language, tuple[str, ...]], code: str, answer: str, rng: np.random.Generator, *, closed: bool
) -> Pair:
    kind = ontology.finding(code)
    draw = int(rng.integers(len(wordings["en"])))
    en = wordings["en"][draw].format(name=kind.en)
    zh = wordings["zh"][draw].format(name=kind.zh)
    return Pair(
        Question(en, WORDS["en"].get(answer, answer), closed), Question(zh, WORDS["zh"].get(answer, answer), closed)
    )
