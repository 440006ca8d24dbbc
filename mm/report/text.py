"""Fills the placeholders of a sentence: numbers and sides are copied from the findings, never written by a model."""

from collections.abc import Sequence
from typing import Final, assert_never

from mm import ontology
from mm.batch import DetectedFinding, FindingTruth, Language

SIDE_WORDS: Final[dict[Language, dict[str, str]]] = {
    "en": {"left": "left", "right": "right"},
    "zh": {"left": "左", "right": "右"},
}
UNMEASURED: Final[dict[Language, str]] = {"en": "unmeasured size", "zh": "大小未测"}
UNDATED: Final[dict[Language, str]] = {"en": "an unknown time", "zh": "不明时间"}
NOTHING: Final[dict[Language, str]] = {"en": "no abnormality", "zh": "未见异常"}


def fill(
    sentence: str,
    *,
    finding: FindingTruth | DetectedFinding | None,
    findings: Sequence[FindingTruth | DetectedFinding],
    days: float | None,
    language: Language,
) -> str:
    """A sentence with `<size>`, `<side>`, `<days>` and `<findings>` replaced.

    A placeholder that the facts can't fill is worded as such (`unmeasured size`) or, for a side, dropped:
    a number is never made up.

    Args:
        sentence: Text with placeholders, as a template holds it or a decoder writes it.
        finding: What the sentence is about, or None for a sentence that sums up.
        findings: All findings of the report, for the impression.
        days: How long before the current study the last prior was made, or None without one.
        language: Of the sentence.

    Returns:
        The text; in English it starts with a capital.
    """
    text = sentence
    if "<size>" in text:
        known = finding is not None and finding.size is not None and ontology.finding(finding.code).measure is not None
        size = ontology.format_size(finding.code, finding.size) if known else UNMEASURED[language]  # type: ignore[union-attr, arg-type]
        text = text.replace("<size>", size)
    if "<side>" in text:
        word = SIDE_WORDS[language].get(finding.side if finding else "none")
        text = _without_side(text, language) if word is None else text.replace("<side>", word)
    if "<days>" in text:
        text = text.replace("<days>", _interval(days, language))
    if "<findings>" in text:
        text = text.replace("<findings>", impression(findings, language))
    if language == "en":
        text = text[:1].upper() + text[1:]
    return text


def impression(findings: Sequence[FindingTruth | DetectedFinding], language: Language) -> str:
    """The names of the findings present, each once, in the order of the ontology, joined for a sentence."""
    codes = {item.code for item in findings if item.present}
    names = [kind.en if language == "en" else kind.zh for kind in ontology.FINDINGS if kind.code in codes]
    if not names:
        return NOTHING[language]
    if language == "zh":
        return "、".join(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def join(sentences: Sequence[str], language: Language) -> str:
    """Filled sentences as one running text."""
    return (" " if language == "en" else "").join(sentences)


def _interval(days: float | None, language: Language) -> str:
    if days is None:
        return UNDATED[language]
    number = round(days)
    match language:
        case "en":
            return f"{number} day" if number == 1 else f"{number} days"
        case "zh":
            return f"{number}天"
        case _:
            assert_never(language)


def _without_side(text: str, language: Language) -> str:
    """Drops the side together with the words that only carry it."""
    if language == "zh":
        return text.replace("<side>侧", "").replace("<side>", "")
    for carrier in (" in the <side> lung", " on the <side>", "<side> ", "<side>"):
        text = text.replace(carrier, "")
    return text
