"""A rule labeler: which findings does a text assert, deny, doubt or call resolved?

Built on the ontology's synonyms, English and Chinese, with scopes for negation and uncertainty in the manner
of NegEx (Chapman et al., 2001, doi:10.1006/jbin.2001.1029): a cue rules the mentions of its clause, before or
behind it. It knows nothing of how our own sentences are made.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

from mm import ontology
from mm.batch import Language

Status = Literal["present", "absent", "uncertain", "resolved"]

# A clause ends a cue's scope. "and"/"or" do not: "no effusion or pneumothorax" denies both.
_CLAUSES: Final[dict[Language, re.Pattern[str]]] = {
    "en": re.compile(r"[.;:\n]|,? but | however | although | though | except | while | whereas "),
    "zh": re.compile(r"[。；：\n]|但|然而|除外了"),
}
_BEFORE: Final[dict[Language, dict[Status, tuple[str, ...]]]] = {
    "en": {
        "resolved": (
            r"resolution of", r"resolved", r"clearing of", r"no longer (?:any|see|shows?|has)?", r"interval removal of",
        ),
        "absent": (
            r"no\b", r"not\b", r"without", r"absence of", r"absent", r"free of", r"free from", r"negative for",
            r"neither", r"nor\b", r"denies", r"rather than", r"instead of", r"never", r"ruled? out", r"excludes?",
        ),
        "uncertain": (
            r"possibl[ey]", r"probabl[ey]", r"may be", r"may represent", r"might", r"could", r"suspicious for",
            r"suspected", r"suspicion of", r"cannot exclude", r"can not exclude", r"can't exclude", r"questionable",
            r"versus", r"\bvs\b", r"concern for", r"equivocal",
        ),
    },
    "zh": {
        "resolved": (r"原有", r"既往", r"原先"),
        "absent": (r"未见", r"无", r"没有", r"未发现", r"未显示", r"排除", r"不支持", r"而非", r"否认", r"并非"),
        "uncertain": (r"可能", r"疑似", r"怀疑", r"考虑", r"不能排除", r"不除外", r"待排"),
    },
}  # fmt: skip
_BEHIND: Final[dict[Language, dict[Status, tuple[str, ...]]]] = {
    "en": {
        "resolved": (
            r"(?:has|have|is|are|was|were)?\s*(?:now |since |completely |fully )*(?:resolved|cleared|disappeared|gone)",
            r"no longer", r"not seen any ?more", r"is not seen (?:today|now)",
        ),
        "absent": (
            r"(?:is|are|was|were) (?:not|absent)", r"not (?:seen|present|identified|demonstrated|evident)",
            r"ruled out", r"(?:is|are) excluded", r"unlikely", r"\babsent\b", r"none\b",
        ),
        "uncertain": (
            r"(?:cannot|can not|can't) be (?:excluded|ruled out)", r"not excluded",
            r"is (?:possible|suspected|questioned)", r"\?",
        ),
    },
    "zh": {
        "resolved": (
            r"已?(?:完全)?(?:吸收|消失|消退|消散|缓解|愈合)",
            r"不再(?:可见|显示|存在)", r"现已?未见", r"已不见",
        ),
        "absent": (r"未见", r"不存在", r"已排除", r"不支持", r"阴性"),
        "uncertain": (r"不除外", r"待排", r"可能", r"不能排除", r"？"),
    },
}  # fmt: skip
# Longer words that contain a synonym and mean something else.
_OTHER: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        r"pericardial effusions?", r"joint effusions?", r"thyroid nodules?", r"adrenal nodules?",
        r"nodal calcification", r"vertebral fractures?", r"vertebral collapse",
    ),
    "zh": (r"心包积液", r"腹腔积液", r"甲状腺结节", r"肾上腺结节", r"椎体骨折"),
}  # fmt: skip


@dataclass(frozen=True)
class Mention:
    """A finding named in a text: where, and what is said of it."""

    code: str
    status: Status
    start: int
    end: int


@cache
def _mention_pattern(language: Language) -> re.Pattern[str]:
    groups: list[tuple[str, str | None]] = [(other, None) for other in _OTHER[language]]
    for finding in ontology.FINDINGS:
        words = (finding.en, *finding.synonyms_en) if language == "en" else (finding.zh, *finding.synonyms_zh)
        for word in words:
            escaped = re.escape(word).replace(r"\ ", r"\s+")
            groups.append((rf"\b{escaped}(?:s|es)?\b" if language == "en" else escaped, finding.code))
    # The longest word wins where several begin at one place; alternation tries in order.
    groups.sort(key=lambda item: -len(item[0]))
    parts = [f"(?P<g{index}_{code or 'other'}>{word})" for index, (word, code) in enumerate(groups)]
    return re.compile("|".join(parts))


@cache
def _cue_pattern(cues: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{cue})" for cue in cues))


def _clauses(text: str, language: Language) -> list[tuple[int, int]]:
    bounds, start = [], 0
    for end in _CLAUSES[language].finditer(text):
        # A decimal point or a thousands separator ends nothing.
        inside = text[end.start()] == "." and text[end.end() : end.end() + 1].isdigit()
        if not inside:
            bounds.append((start, end.end() if text[end.start()] in "?？" else end.start()))
            start = end.end()
    bounds.append((start, len(text)))
    return bounds


def mentions(text: str, language: Language) -> list[Mention]:
    """Every finding that `text` names, in order, with what is said of it."""
    text = text.lower() if language == "en" else text
    found = []
    for start, end in _clauses(text, language):
        clause = text[start:end]
        for match in _mention_pattern(language).finditer(clause):
            code = (match.lastgroup or "_other").split("_", 1)[1]
            if code == "other":
                continue
            status = _status(clause[: match.start()], clause[match.end() :], language)
            found.append(Mention(code, status, start + match.start(), start + match.end()))
    return found


def _status(before: str, behind: str, language: Language) -> Status:
    # What stands behind a mention is nearer to it in meaning ("no longer seen") than a cue far in front.
    order: tuple[Status, ...] = ("resolved", "uncertain", "absent")
    for status in order:
        if _cue_pattern(_BEHIND[language][status]).search(behind) and not _other_subject(behind, status, language):
            return status
    for status in order:
        if status == "resolved" and language == "zh":
            continue  # "the earlier ..." alone says nothing; it must be followed by what became of it
        if _cue_pattern(_BEFORE[language][status]).search(before):
            return status
    return "present"


def _other_subject(behind: str, status: Status, language: Language) -> bool:
    """Whether another finding stands between the mention and the cue: then the cue is about that one."""
    cue = _cue_pattern(_BEHIND[language][status]).search(behind)
    assert cue is not None
    between = _mention_pattern(language).search(behind[: cue.start()])
    if between is None:
        return False
    joined = behind[: between.start()].strip(" ,、")
    return joined not in {"", "and", "or", "和", "及", "或", "与", "and a", "and an", "or a", "or an"}


def labels(text: str, language: Language) -> dict[str, Status]:
    """What a whole report says of each finding; a finding it doesn't name is absent.

    A finding asserted anywhere is present, else doubted, else resolved, else absent.
    """
    rank: dict[Status, int] = {"present": 3, "uncertain": 2, "resolved": 1, "absent": 0}
    result: dict[str, Status] = dict.fromkeys(ontology.CODES, "absent")
    for mention in mentions(text, language):
        if rank[mention.status] > rank[result[mention.code]]:
            result[mention.code] = mention.status
    return result
