"""Findings that nobody should overlook: the frozen cut-offs, and scores that leave what lies below them out.

A phantom's smallest findings can't be seen on its own pictures, so that a score over all sizes is in part one of the
table of difficulty. The cut-offs are frozen here, beside the score: they are never chosen by a model's results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float

from mm import ontology
from mm.batch import FindingTruth
from mm.evaluation.bootstrap import Score, bootstrap
from mm.evaluation.evaluate import table
from mm.evaluation.reports import Agreement

CUT_OFFS: Final[dict[str, float]] = {
    "nodule": 8.0,
    "consolidation": 30.0,
    "effusion": 100.0,
    "pneumothorax": 5.0,
    "cardiomegaly": 0.55,
    "emphysema": 12.0,
    "rib_fracture": 3.0,
    "calcification": 50.0,
}
"""From which size on, in the finding's own unit (mm, ml, ml, %, ratio, % of the lung, mm, mm3), a finding is
conspicuous. Cardiomegaly and emphysema are clear where the generator's cardiothoracic ratio and its share of the lung
below -950 HU reach what `mm.ontology` calls moderate: .05 above the ratio of .50, and twice the share of 6 %, that make
them present at all."""
COLUMNS: Final = tuple(ontology.INDEX[code] for code in CUT_OFFS)


def largest(studies: Sequence[Sequence[FindingTruth]]) -> Float[np.ndarray, "N K"]:
    """The size of the largest instance of each finding in each study; nan where it is absent or has no size."""
    sizes = np.full((len(studies), len(ontology.CODES)), np.nan)
    for row, findings in enumerate(studies):
        for item in findings:
            if item.present and item.size is not None:
                column = ontology.INDEX[item.code]
                sizes[row, column] = np.fmax(sizes[row, column], item.size)
    return sizes


def counted(truth: Bool[np.ndarray, "N K"], sizes: Float[np.ndarray, "N K"]) -> Bool[np.ndarray, "N K"]:
    """Which studies count for each finding: those without it, and those whose largest instance reaches the cut-off.

    Only findings of `CUT_OFFS` have any.
    """
    kept = np.zeros_like(truth)
    for code, least in CUT_OFFS.items():
        column = ontology.INDEX[code]
        kept[:, column] = ~truth[:, column] | (sizes[:, column] >= least)
    return kept


def conspicuous_f1(
    found: Bool[np.ndarray, "N K"], truth: Bool[np.ndarray, "N K"], kept: Bool[np.ndarray, "N K"]
) -> float:
    """Mean F1 over the findings of `CUT_OFFS` that the counted studies have at all; nan where they have none."""
    scores = [
        Agreement.of(found[kept[:, k], k], truth[kept[:, k], k]).f1 for k in COLUMNS if truth[kept[:, k], k].any()
    ]
    return float(np.mean(scores)) if scores else float("nan")


@dataclass(frozen=True)
class Conspicuous:
    """Macro-F1 over the findings that have a cut-off: of conspicuous ones, and of the same findings at all sizes."""

    conspicuous: Score
    all_sizes: Score

    @classmethod
    def of(
        cls, found: Bool[np.ndarray, "N K"], truth: Bool[np.ndarray, "N K"], kept: Bool[np.ndarray, "N K"]
    ) -> "Conspicuous":
        """Both with bootstrap intervals over studies."""
        every = np.ones_like(kept)

        def score(counts: Bool[np.ndarray, "N K"]) -> Score:
            return bootstrap(lambda drawn: conspicuous_f1(found[drawn], truth[drawn], counts[drawn]), len(truth),
                             rounds=500)  # fmt: skip

        return cls(score(kept), score(every))


def recall_by_grade(
    found: Bool[np.ndarray, " N"], sizes: Float[np.ndarray, " N"], code: str
) -> dict[str, tuple[float, int]]:
    """Share found and number of the studies that have a finding, by the grade of its largest instance."""
    grades = np.array([ontology.grade(code, None if np.isnan(size) else float(size)) for size in sizes])
    return {grade: _share(found, grades == grade) for grade in ("small", "moderate", "large")}


def _share(found: Bool[np.ndarray, " N"], of: Bool[np.ndarray, " N"]) -> tuple[float, int]:
    return (float(found[of].mean()) if of.any() else float("nan")), int(of.sum())


def size_table(found: Bool[np.ndarray, "N K"], truth: Bool[np.ndarray, "N K"], sizes: Float[np.ndarray, "N K"]) -> str:
    """Every finding that has a size: its scores where it is conspicuous, and its recall by size."""
    kept = counted(truth, sizes)
    rows = []
    for k, item in enumerate(ontology.FINDINGS):
        if item.measure is None:
            continue
        grades = recall_by_grade(found[:, k], sizes[:, k], item.code)
        first = ("-",) * 4
        if item.code in CUT_OFFS:
            least = CUT_OFFS[item.code]
            clear = Agreement.of(found[kept[:, k], k], truth[kept[:, k], k])
            first = (
                f">= {ontology.format_size(item.code, least)}",
                f"{clear.positives}",
                f"{clear.precision:.2f} / {clear.recall:.2f} / **{clear.f1:.2f}**",
                _said(_share(found[:, k], sizes[:, k] < least)),
            )
        every = f"{Agreement.of(found[:, k], truth[:, k]).f1:.2f}"
        rows.append((item.code, *first, every, *(_said(grades[name]) for name in ("small", "moderate", "large"))))
    head = ("finding", "conspicuous", "positives", "P / R / F1", "recall below the cut-off", "F1 at all sizes",
            "recall, small", "moderate", "large")  # fmt: skip
    return table(head, rows)


def _said(share: tuple[float, int]) -> str:
    return f"{share[0]:.2f} of {share[1]}" if share[1] else "-"


def macro_table(rows: dict[str, Conspicuous]) -> str:
    """Who scores what, as Markdown."""
    head = ("who", "conspicuous, macro-F1 [95 %]", "the same findings at all sizes")
    return table(head, [(name, str(row.conspicuous), str(row.all_sizes)) for name, row in rows.items()])
