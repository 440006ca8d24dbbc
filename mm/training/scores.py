"""Scores of the finding head while it trains: area under the ROC curve and best F1 of each finding."""

from jaxtyping import Bool, Float
from torch import Tensor

from mm import ontology
from mm.calibration import f1_of_cuts


def area_under_curve(scores: Float[Tensor, " N"], labels: Bool[Tensor, " N"]) -> float | None:
    """Probability that a positive outranks a negative, ties counting half (Hanley and McNeil 1982).

    None where there is no positive or no negative.
    """
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return None
    wins = (scores[labels][:, None] > scores[~labels]).double() + 0.5 * (scores[labels][:, None] == scores[~labels])
    return float(wins.mean())


def best_f1(scores: Float[Tensor, " N"], labels: Bool[Tensor, " N"]) -> float | None:
    """The greatest F1 of any threshold; None without positives. An upper bound: the threshold saw the labels."""
    positives = int(labels.sum())
    if positives == 0:
        return None
    _, f1 = f1_of_cuts(scores, labels, positives=positives)
    return float(f1.max())


def finding_scores(logits: Float[Tensor, "N K"], labels: Bool[Tensor, "N K"]) -> dict[str, float]:
    """`auroc_<code>`, `f1_<code>` and the means `auroc` and `f1` over the findings that occur."""
    scores: dict[str, float] = {}
    for name, score in (("auroc", area_under_curve), ("f1", best_f1)):
        each = {code: score(logits[:, k], labels[:, k]) for k, code in enumerate(ontology.CODES)}
        known = {code: value for code, value in each.items() if value is not None}
        scores |= {f"{name}_{code}": value for code, value in known.items()}
        if known:
            scores[name] = sum(known.values()) / len(known)
    return scores


def table(scores: dict[str, float]) -> str:
    """One line: each finding's area under the curve and F1."""
    cells = [
        f"{code} {scores.get(f'auroc_{code}', float('nan')):.2f}/{scores.get(f'f1_{code}', float('nan')):.2f}"
        for code in ontology.CODES
    ]
    mean = f"mean {scores.get('auroc', float('nan')):.3f}/{scores.get('f1', float('nan')):.3f}"
    return f"AUROC/F1: {mean}; {', '.join(cells)}"
