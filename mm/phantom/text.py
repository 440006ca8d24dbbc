"""Report sentences of a phantom patient: composed templates with placeholders, in English and Chinese.

A finding's sentence is a frame (by change) times a noun (name or synonym) times the place of the side. The
last frame of every group of five, 20 %, occurs in the split "test" only, so that a score on it is one on
wordings never seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Final, Literal

import numpy as np

from mm import ontology
from mm.batch import FindingTruth, Language, Sentence, SlotKind
from mm.ontology import Change, Grade
from mm.phantom import phrases_en, phrases_zh
from mm.report.text import fill, join

Split = Literal["train", "test"]
_PHRASES: Final = {"en": phrases_en, "zh": phrases_zh}


@dataclass(frozen=True)
class Template:
    """A sentence with placeholders.

    Attributes:
        id: Stable: language, kind or finding and change, frame, noun, place of the side.
        text: The sentence; in English it starts lower case (`fill` capitalises).
        split: "test" where it may not be trained on.
    """

    id: str
    text: str
    split: Split


@cache
def finding_templates(
    language: Language, code: str, change: Change, grade: Grade, *, sided: bool
) -> tuple[Template, ...]:
    """All templates of one situation, in a fixed order.

    Args:
        language: Of the sentence.
        code: Of the finding.
        change: Against the last prior.
        grade: "none" where the size is unknown.
        sided: Whether the side is known.
    """
    phrases = _PHRASES[language]
    frames = phrases.FRAMES[change]
    return tuple(
        Template(
            f"{language}.{code}.{change}.{number}.{index}.{'ab'[leading]}",
            phrases.compose(frame, code=code, noun=noun, grade=grade, sided=sided, leading=leading),
            "test" if number == len(frames) - 1 else "train",
        )
        for number, frame in enumerate(frames)
        for index, noun in enumerate(phrases.NOUNS[code])
        for leading in ((False, True) if sided else (True,))
    )


@cache
def summary_templates(language: Language, kind: SlotKind) -> tuple[Template, ...]:
    """The templates of a kind that sums up: "comparison", "normal" or "impression"."""
    phrases = _PHRASES[language]
    groups = {"comparison": phrases.COMPARISONS, "normal": phrases.NORMALS, "impression": phrases.IMPRESSIONS}
    texts = groups[kind]
    return tuple(
        Template(f"{language}.{kind}.{number}", text, "test" if number == len(texts) - 1 else "train")
        for number, text in enumerate(texts)
    )


def report(
    findings: Sequence[FindingTruth],
    *,
    language: Language,
    days: float | None,
    split: Split,
    rng: np.random.Generator,
) -> tuple[Sentence, ...]:
    """The reference report: comparison, one sentence a finding, one a resolved finding, the rest, the impression.

    Args:
        findings: Of the current visit, resolved ones included.
        language: Of the report.
        days: How long ago the last prior was, or None without one.
        split: "train" leaves the held-out templates away; "test" draws from all.
        rng: Chooses the templates.

    Returns:
        Sentences with placeholders; `finding` indexes `findings`.
    """
    sentences = []
    if days is not None:
        sentences.append(Sentence("comparison", _choose(summary_templates(language, "comparison"), split, rng)))
    present = [index for index, item in enumerate(findings) if item.present]
    resolved = [index for index, item in enumerate(findings) if not item.present and item.change == "resolved"]
    sentences += [
        Sentence("finding", _choose(_situation(findings[index], language), split, rng), index)
        for index in present + resolved
    ]
    sentences.append(Sentence("normal", _choose(summary_templates(language, "normal"), split, rng)))
    sentences.append(Sentence("impression", _choose(summary_templates(language, "impression"), split, rng)))
    return tuple(sentences)


def unmeasured(
    sentences: Sequence[Sentence],
    findings: Sequence[FindingTruth],
    *,
    share: float,
    language: Language,
    split: Split,
    rng: np.random.Generator,
) -> tuple[Sentence, ...]:
    """The same report, some of its findings worded as if nobody knew their size.

    Truth knows every size; a finding head doesn't know that of a fracture which only the X-ray shows.

    Args:
        sentences: Of `report`.
        findings: As given to it.
        share: Of the finding sentences, drawn at random.
        language: Of the report.
        split: As in `report`.
        rng: Chooses sentences and templates.
    """
    told = []
    for sentence in sentences:
        if sentence.finding is not None and rng.random() < share:
            item = replace(findings[sentence.finding], size=None)
            sentence = replace(sentence, text=_choose(_situation(item, language), split, rng), measured=False)
        told.append(sentence)
    return tuple(told)


def filled(
    sentences: Sequence[Sentence], findings: Sequence[FindingTruth], *, days: float | None, language: Language
) -> str:
    """The whole report as running text, placeholders filled."""
    texts = [
        fill(
            sentence.text,
            finding=None if sentence.finding is None else findings[sentence.finding],
            findings=findings,
            days=days,
            language=language,
        )
        for sentence in sentences
    ]
    return join(texts, language)


def _situation(item: FindingTruth, language: Language) -> tuple[Template, ...]:
    change = ontology.CHANGES[ontology.CHANGES.index(item.change)]  # narrows str to Change
    return finding_templates(
        language, item.code, change, ontology.grade(item.code, item.size), sided=item.side in ("left", "right")
    )


def _choose(templates: tuple[Template, ...], split: Split, rng: np.random.Generator) -> str:
    allowed = [item.text for item in templates if split == "test" or item.split == "train"]
    return allowed[int(rng.integers(len(allowed)))]
