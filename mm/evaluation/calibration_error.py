"""Expected calibration error (Naeini et al., AAAI 2015): does a probability of .3 come true three times in ten?"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float

from mm import ontology
from mm.evaluation.bootstrap import Score, bootstrap
from mm.evaluation.evaluate import table

BINS: Final = 15
"""As many as Guo et al. (ICML 2017) take, of equal width."""
DRAWS: Final = 200


def calibration_error(
    probability: Float[np.ndarray, " N"], truth: Bool[np.ndarray, " N"], *, bins: int = BINS
) -> float:
    """Mean distance between probability and share of positives over bins of equal width, weighted by their numbers."""
    place = np.minimum((probability * bins).astype(int), bins - 1)
    off = np.bincount(place, weights=probability - truth, minlength=bins)
    return float(np.abs(off).sum() / len(truth))


def by_chance(probability: Float[np.ndarray, " N"], *, seed: int = 0) -> float:
    """The mean error of probabilities that are exactly right, for as few studies: labels drawn from themselves."""
    rng = np.random.default_rng(seed)
    drawn = [calibration_error(probability, rng.random(len(probability)) < probability) for _ in range(DRAWS)]
    return float(np.mean(drawn))


@dataclass(frozen=True)
class Calibration:
    """Error of all findings pooled, of each alone, and what exact probabilities would show of each (`chance`)."""

    pooled: Score
    pooled_chance: float
    mean: float
    mean_chance: float
    findings: dict[str, tuple[float, float]]


def calibration(probability: Float[np.ndarray, "N K"], truth: Bool[np.ndarray, "N K"]) -> Calibration:
    """Of the calibrated probability of each finding in each study; the interval resamples studies."""
    each = {
        code: (calibration_error(probability[:, k], truth[:, k]), by_chance(probability[:, k]))
        for k, code in enumerate(ontology.CODES)
    }
    pooled = bootstrap(
        lambda drawn: calibration_error(probability[drawn].ravel(), truth[drawn].ravel()), len(truth), rounds=500
    )
    means = np.array(list(each.values())).mean(axis=0)
    return Calibration(pooled, by_chance(probability.ravel()), float(means[0]), float(means[1]), each)


def calibration_table(found: Calibration) -> str:
    """As Markdown."""
    rows = [
        ("all findings pooled", str(found.pooled), f"{found.pooled_chance:.3f}"),
        ("mean over findings", f"{found.mean:.3f}", f"{found.mean_chance:.3f}"),
    ]
    rows += [(code, f"{error:.3f}", f"{chance:.3f}") for code, (error, chance) in found.findings.items()]
    return table(("finding", f"ECE, {BINS} bins", "of exact probabilities"), rows)
