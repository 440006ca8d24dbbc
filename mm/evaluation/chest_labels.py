"""A rule labeler for English chest reports: which of the 13 X-ray or 18 CT findings are said, denied or doubted?

Scopes after NegEx (Chapman et al. 2001, doi:10.1006/jbin.2001.1029): a cue rules what stands behind it in its clause.
Findings and cues are in `mm.evaluation.chest_terms`; the labeler of our own reports is `mm.evaluation.labels`.
"""

import re
from functools import cache
from typing import Final, Literal

from mm.evaluation import chest_terms as terms

Said = Literal["present", "uncertain", "absent"]
Kind = Literal["xray", "ct"]
KINDS: Final = {"xray": terms.XRAY, "ct": terms.CT}
_RANK: Final[dict[Said, int]] = {"present": 2, "uncertain": 1, "absent": 0}
_HEADING: Final = re.compile(r"(?:^|(?<=[.\s]))([A-Z][A-Za-z ]{2,30}):\s")
_READ: Final = ("finding", "impression", "conclusion", "opinion", "result", "lung", "heart", "pleura", "chest", "bone")
_SKIPPED: Final = (
    "indication",
    "history",
    "comparison",
    "technique",
    "clinical",
    "exam",
    "procedure",
    "reason",
    "date",
)
_DOT_IN_NUMBER: Final = re.compile(r"(?<=\d)\.(?=\d)")


@cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text)


def sections(report: str) -> str:
    """A report without what isn't the reader's: indication, history, comparison and technique by their headings.

    A heading is a few capitalised words with a colon; an unknown one continues what stands above it.
    """
    kept, reading, last = [], True, 0
    for match in _HEADING.finditer(report):
        name = match[1].strip().lower()
        if reading:
            kept.append(report[last : match.start()])
        if any(word in name for word in _READ):
            reading = True
        elif any(word in name for word in _SKIPPED):
            reading = False
        last = match.end()
    if reading:
        kept.append(report[last:])
    return "\n".join(part.strip() for part in kept if part.strip())


def chest_labels(report: str, kind: Kind) -> dict[str, Said]:
    """What a report says of each finding that it speaks of.

    Said anywhere it is present, else uncertain where it is doubted, else absent. What a report doesn't mention has no
    entry; a finding that has gone is absent.
    """
    text = _DOT_IN_NUMBER.sub(",", sections(report)).lower()
    found: dict[str, Said] = {}
    for clause in _pattern(terms.CLAUSE).split(_pattern(r"\?").sub("?.", text)):
        for name, said in _clause(clause, kind):
            if name not in found or _RANK[said] > _RANK[found[name]]:
                found[name] = said
    return found


def no_finding(labels: dict[str, Said]) -> bool:
    """CheXpert's fourteenth: nothing but devices is present or doubted."""
    return all(said == "absent" for name, said in labels.items() if name not in ("support_devices", "medical_material"))


def _clause(clause: str, kind: Kind) -> list[tuple[str, Said]]:
    """The findings of one clause; a segment behind a comma that has a verb of its own leaves the cues before it."""
    found: list[tuple[str, Said]] = []
    shaded = _pattern(terms.OTHER).sub(lambda match: "_" * len(match[0]), clause)
    starts = [0]
    for comma in re.finditer(",", shaded):
        segment = shaded[comma.end() :].split(",", 1)[0]
        joins = re.match(r"\s*(?:or|nor|and|which|that|with)\b", segment)
        lists = re.search(r"\b(?:or|nor)\b", shaded[comma.end() :])
        if _pattern(terms.VERB).search(segment) and not joins and not lists:
            starts.append(comma.end())
    for name, words in KINDS[kind].items():
        for match in _pattern(words).finditer(shaded):
            start = max(place for place in starts if place <= match.start())
            end = min((place for place in starts if place > match.start()), default=len(shaded))
            found.append((name, _said(shaded[start : match.start()], shaded[match.end() : end], KINDS[kind])))
        if name in terms.ORGANS and not any(known == name for known, _ in found):
            size = _size(shaded, terms.ORGANS[name])
            found += [] if size is None else [(name, size)]
    return found


def _said(before: str, behind: str, findings: dict[str, str]) -> Said:
    until = min(
        (match.start() for words in findings.values() if (match := _pattern(words).search(behind))), default=None
    )
    near = behind if until is None or _is_list(behind[:until]) else behind[:until]
    if _pattern(terms.UNCERTAIN_BEHIND).search(near):
        return "uncertain"
    if _pattern(terms.ABSENT_BEHIND).search(near):
        return "absent"
    cues = [("absent", match.end()) for match in _pattern(terms.ABSENT).finditer(before)]
    cues += [("uncertain", match.end()) for match in _pattern(terms.UNCERTAIN).finditer(before)]
    if cues:  # the nearest one rules
        return "absent" if max(cues, key=lambda cue: cue[1])[0] == "absent" else "uncertain"
    alternative = _pattern(rf"^\s*(?:{terms.ALTERNATIVE})\b").search(behind)
    if alternative or _pattern(rf"\b(?:{terms.ALTERNATIVE})\s+$").search(before):
        return "uncertain"
    return "present"


def _is_list(between: str) -> bool:
    return between.strip(" ,/") in ("", "and", "or", "and/or")


def _size(clause: str, organ: str) -> Said | None:
    """What is said of an organ's size: by the next word about size behind it, else by the last one before it."""
    match = _pattern(organ).search(clause)
    if match is None:
        return None
    sizes: tuple[tuple[str, Said], ...] = (
        (terms.BORDERLINE, "uncertain"),
        (terms.NORMAL, "absent"),
        (terms.LARGE, "present"),
    )
    behind = [(m.start(), said) for words, said in sizes for m in _pattern(words).finditer(clause, match.end())]
    if behind:
        return min(behind)[1]
    segment = clause.rfind(",", 0, match.start()) + 1
    before = [
        (m.end(), said) for words, said in sizes for m in _pattern(words).finditer(clause, segment, match.start())
    ]
    return max(before)[1] if before else None
