"""Does the mirrored study get the mirrored report? What a model says of a side must come from the picture."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from mm import ontology
from mm.batch import Language
from mm.evaluation.audits import findings_said, sides_said, swap_side
from mm.evaluation.bootstrap import Score, bootstrap
from mm.evaluation.collapse import masked
from mm.evaluation.evaluate import table

_SIDED = frozenset(item.code for item in ontology.FINDINGS if item.sided)


@dataclass(frozen=True)
class Mirrored:
    """How far the reports of mirrored studies are the mirrored reports.

    Attributes:
        statements: Dice overlap of what the two reports state, sides exchanged: a sided finding with the side of its
            sentence, as often as it is said, any other finding once.
        sides: The share of findings named with one side in both reports whose side is exchanged.
        calls: The share of all findings of all studies that are present in both or absent in both.
        texts: The share of reports that are equal word for word, sides exchanged and numbers masked.
        findings: By finding, the share of studies in which it is present in both or absent in both.
        studies: How many.
    """

    statements: Score
    sides: Score
    calls: Score
    texts: Score
    findings: dict[str, float]
    studies: int


def mirror_consistency(reports: Sequence[str], mirrored: Sequence[str], language: Language) -> Mirrored:
    """Compares the reports of studies with those of the same studies, left and right exchanged.

    Args:
        reports: As written.
        mirrored: Of the mirrored studies, in the same order.
        language: Of both.

    Raises:
        ValueError: There are no reports, or not as many of both.
    """
    if not reports or len(reports) != len(mirrored):
        raise ValueError(f"mirrored must be of the {len(reports)} reports (one or more), got {len(mirrored)}")
    expected = [swap_side(text) for text in reports]
    pairs = list(zip(expected, mirrored, strict=True))
    called = [tuple(findings_said(text, language) for text in pair) for pair in pairs]
    counts = np.array([_counts(pair, said, language) for pair, said in zip(pairs, called, strict=True)], dtype=float)

    def share(hits: int, number: int) -> Score:
        def statistic(drawn: np.ndarray) -> float:
            whole = counts[drawn, number].sum()
            return float(counts[drawn, hits].sum() / whole) if whole else float("nan")

        return bootstrap(statistic, len(counts), rounds=500)

    findings = {code: float(np.mean([a[code] == b[code] for a, b in called])) for code in ontology.CODES}
    return Mirrored(share(0, 1), share(2, 3), share(4, 5), share(6, 7), findings, len(counts))


def _counts(texts: tuple[str, str], called: tuple[Counter[Hashable], ...], language: Language) -> list[int]:
    """Hits and number of statements, sides, calls and texts, of the expected report and the one that was written."""
    first, second = (_statements(text, said, language) for text, said in zip(texts, called, strict=True))
    one, other = _single(first), _single(second)
    both = one.keys() & other.keys()
    same = len(ontology.CODES) - len(called[0].keys() ^ called[1].keys())
    expected, got = map(masked, texts)
    return [
        2 * (first & second).total(), first.total() + second.total(),
        sum(one[code] == other[code] for code in both), len(both),
        same, len(ontology.CODES),
        int(expected == got), 1,
    ]  # fmt: skip


def _statements(text: str, called: Counter[Hashable], language: Language) -> Counter[Hashable]:
    return sides_said(text, language) + Counter({code: 1 for code in called if code not in _SIDED})


def _single(statements: Counter[Hashable]) -> dict[Hashable, Hashable]:
    """The side of each finding that is named with one side only."""
    sides: dict[Hashable, set[Hashable]] = {}
    for item in statements:
        if isinstance(item, tuple):
            sides.setdefault(item[0], set()).add(item[1])
    return {code: next(iter(found)) for code, found in sides.items() if len(found) == 1}


def mirror_table(found: Mirrored) -> str:
    """As Markdown."""
    return table(
        ("what", "share [95 %]"),
        [
            ("statements of finding and side that agree (Dice)", str(found.statements)),
            ("sides exchanged, of findings named with one side in both", str(found.sides)),
            ("findings present in both or absent in both", str(found.calls)),
            ("reports equal word for word, numbers masked", str(found.texts)),
            *((f"{code} present in both or absent in both", f"{value:.3f}") for code, value in found.findings.items()),
        ],
    )
