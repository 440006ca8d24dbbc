"""From raw logits to probabilities one can act on: Platt scaling and the threshold of the best F1."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

SURE = 2.5
"""Standard deviations: more than two, for the cut is the best of many."""
MIN_EXAMPLES = 3
"""With fewer positives or negatives than this nothing is fitted."""


def fit_scaling(logits: Float[Tensor, " N"], labels: Bool[Tensor, " N"]) -> tuple[float, float]:
    """Temperature t > 0 and bias b so that sigmoid(logit / t + b) has the least cross-entropy (Platt 1999).

    Labels are softened as Platt does, so that separable scores don't end in probabilities of 0 and 1.

    Returns:
        (1, 0) where there are too few examples to tell.
    """
    positives, total = int(labels.sum()), len(labels)
    if min(positives, total - positives) < MIN_EXAMPLES:
        return 1.0, 0.0
    x = logits.double()
    target = torch.where(labels, (positives + 1) / (positives + 2), 1 / (total - positives + 2)).double()
    log_scale = torch.zeros((), dtype=torch.double, requires_grad=True)
    bias = torch.zeros((), dtype=torch.double, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_scale, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x * log_scale.exp() + bias, target)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[no-untyped-call]
    return float((-log_scale.detach()).exp()), float(bias.detach())


def best_threshold(scores: Float[Tensor, " N"], labels: Bool[Tensor, " N"], *, default: float = 0.5) -> float:
    """The threshold (score >= threshold is positive) of the greatest F1, midway between two neighbouring scores.

    Scores that tell nothing reach their greatest F1 by calling everybody (Lipton et al., "Optimal thresholding of
    classifiers to maximize F1 measure", 2014), which nobody can use. So the cut must call better than chance, by
    `SURE` standard deviations of the hits among as many drawn at random; a finding without such a cut isn't learnt
    yet and is never called.

    Args:
        scores: Any increasing score.
        labels: Truth.
        default: Returned where there are too few examples of a kind to tell.

    Returns:
        The threshold, or infinity for never.
    """
    positives, total = int(labels.sum()), len(labels)
    if min(positives, total - positives) < MIN_EXAMPLES:
        return default
    threshold = _best_cut(scores, labels, positives)
    called = scores.double() >= threshold
    number, hits = int(called.sum()), int((called & labels).sum())
    share = positives / total
    # Hits among `number` drawn without replacement: the hypergeometric distribution's mean and variance.
    spread = math.sqrt(number * share * (1 - share) * (total - number) / (total - 1))
    return threshold if hits - number * share > SURE * spread else math.inf


def best_instance_threshold(
    scores: Float[Tensor, " N"], hits: Bool[Tensor, " N"], *, num_true: int, default: float = 0.5
) -> float:
    """The threshold of the greatest F1 of detected instances.

    Args:
        scores: Of the candidates.
        hits: Which of them are matched to a true instance, each of those at most once.
        num_true: True instances, those that no candidate is matched to included.
        default: Returned where there are too few to tell.
    """
    if int(hits.sum()) < MIN_EXAMPLES:
        return default
    return _best_cut(scores, hits, num_true)


def f1_of_cuts(
    scores: Float[Tensor, " N"], hits: Bool[Tensor, " N"], *, positives: int
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Scores from the greatest to the least, and the F1 of taking each of them and all above it.

    Args:
        scores: Any increasing score.
        hits: Which of them are right.
        positives: What there is to be found, hits included.

    Returns:
        In float64. The F1 is -1 where the next score is the same: equal scores stand or fall together.
    """
    ranked, order = scores.double().sort(descending=True)
    right = hits[order].double().cumsum(0)
    f1 = 2 * right / (torch.arange(1, len(ranked) + 1, device=right.device) + positives)
    cut = torch.cat([ranked[1:] < ranked[:-1], torch.ones(1, dtype=torch.bool, device=ranked.device)])
    return ranked, f1.masked_fill(~cut, -1)


def _best_cut(scores: Float[Tensor, " N"], hits: Bool[Tensor, " N"], positives: int) -> float:
    ranked, f1 = f1_of_cuts(scores, hits, positives=positives)
    best = int(f1.argmax())
    below = ranked[best + 1] if best + 1 < len(ranked) else ranked[best]
    return float((ranked[best] + below) / 2)
