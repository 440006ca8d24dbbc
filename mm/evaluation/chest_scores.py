"""Finding F1 of reports against reports, both read by `mm.evaluation.chest_labels`.

A finding that neither names is absent from both. A doubted finding is absent, or present: papers do either, and the
two are not comparable, so both are given. Macro-F1 is the mean over the findings that the references have at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from mm.evaluation.bootstrap import Score, bootstrap
from mm.evaluation.chest_labels import KINDS, Kind, chest_labels, no_finding
from mm.evaluation.evaluate import table

NO_FINDING = "no_finding"


@dataclass(frozen=True)
class Labelled:
    """Findings of some reports; the last column is `no_finding`.

    Attributes:
        positive: Said to be there.
        doubted: Said to be there or doubted; a report with no more than a doubt has a finding.
    """

    positive: Bool[np.ndarray, "N K"]
    doubted: Bool[np.ndarray, "N K"]

    @classmethod
    def of(cls, reports: Sequence[str], kind: Kind) -> "Labelled":
        """Reads reports."""
        names = tuple(KINDS[kind])
        positive = np.zeros((len(reports), len(names) + 1), dtype=bool)
        doubted = positive.copy()
        for row, report in enumerate(reports):
            found = chest_labels(report, kind)
            said = [found.get(name, "absent") for name in names]
            normal = no_finding(found)
            positive[row] = [*(word == "present" for word in said), normal]
            doubted[row] = [*(word != "absent" for word in said), normal]
        return cls(positive, doubted)


@dataclass(frozen=True)
class ChestScores:
    """F1 of some reports.

    Attributes:
        macro: Over the findings of the list that occur, positives only.
        macro_no_finding: The same with `no_finding` as one more: CheXpert's fourteen.
        micro: Over all findings of the list, positives only.
        macro_doubted: As `macro`, a doubted finding counted as present.
        micro_doubted: As `micro`, a doubted finding counted as present.
        each: F1 of each finding, positives only; nan where the references have none.
        support: How many references have each.
    """

    macro: Score
    macro_no_finding: Score
    micro: Score
    macro_doubted: Score
    micro_doubted: Score
    each: dict[str, float]
    support: dict[str, int]


def chest_scores(written: Labelled, known: Labelled, kind: Kind, *, rounds: int = 1000) -> ChestScores:
    """Compares what reports say with what their references say."""
    names = (*KINDS[kind], NO_FINDING)

    def of(ours: np.ndarray, theirs: np.ndarray, *, average: str) -> Score:
        def statistic(drawn: np.ndarray) -> float:
            return _f1(ours[drawn], theirs[drawn], average=average)

        return bootstrap(statistic, len(ours), rounds=rounds)

    listed = slice(None, -1)
    return ChestScores(
        macro=of(written.positive[:, listed], known.positive[:, listed], average="macro"),
        macro_no_finding=of(written.positive, known.positive, average="macro"),
        micro=of(written.positive[:, listed], known.positive[:, listed], average="micro"),
        macro_doubted=of(written.doubted[:, listed], known.doubted[:, listed], average="macro"),
        micro_doubted=of(written.doubted[:, listed], known.doubted[:, listed], average="micro"),
        each={
            name: _f1(written.positive[:, [k]], known.positive[:, [k]], average="macro") for k, name in enumerate(names)
        },
        support={name: int(known.positive[:, k].sum()) for k, name in enumerate(names)},
    )


def _f1(ours: np.ndarray, theirs: np.ndarray, *, average: str) -> float:
    """Not a number where no reference has a finding."""
    hits, called, there = (ours & theirs).sum(0), ours.sum(0), theirs.sum(0)
    if not there.any():
        return float("nan")
    if average == "micro":
        return float(2 * hits.sum() / (called.sum() + there.sum()))
    kept = there > 0
    return float((2 * hits[kept] / (called[kept] + there[kept])).mean())


def chest_tables(scores: dict[str, ChestScores], kind: Kind) -> dict[str, str]:
    """As Markdown: by run, and by finding."""
    first = next(iter(scores.values()))
    number = len(KINDS[kind])
    occur = sum(count > 0 for name, count in first.support.items() if name != NO_FINDING)
    heading = f"Finding F1 by rule labeler, {number} findings, {occur} of which the references have [95 %]"
    overall = table(
        (
            "who",
            "macro, positives only",
            f"macro of {number + 1} (with no finding)",
            "micro, positives only",
            "macro, doubted as positive",
            "micro, doubted as positive",
        ),
        [
            (name, *map(str, (row.macro, row.macro_no_finding, row.micro, row.macro_doubted, row.micro_doubted)))
            for name, row in scores.items()
        ],
    )
    each = table(
        ("finding", "references with it", *scores),
        [
            (name, str(count), *(f"{row.each[name]:.2f}" if count else "-" for row in scores.values()))
            for name, count in first.support.items()
        ],
    )
    return {heading: overall, "F1 of each finding, positives only": each}
