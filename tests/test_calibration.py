"""Thresholds: the greatest F1, where that is better than chance."""

import torch

from mm.calibration import best_instance_threshold, best_threshold


def called(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # As the head keeps it: in float32.
    return scores >= torch.tensor(best_threshold(scores, labels), dtype=torch.float32)


def test_separable_scores_are_cut_between() -> None:
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.9, 0.95])
    labels = scores > 0.5
    assert abs(best_threshold(scores, labels) - 0.5) < 1e-6
    assert torch.equal(called(scores, labels), labels)


def test_scores_that_tell_nothing_call_nobody() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores, labels = torch.rand(400, generator=generator), torch.rand(400, generator=generator) < 0.25
        assert not called(scores, labels).any()
    # Places are no studies: there everything may be taken.
    assert best_instance_threshold(scores, labels, num_true=int(labels.sum())) < scores.quantile(0.1)


def test_scores_that_tell_a_little_are_used() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(400, generator=generator) < 0.25
    scores = (torch.randn(400, generator=generator) + 0.8 * labels).sigmoid()
    found = called(scores, labels)
    assert labels[found].float().mean() > 1.3 * labels.float().mean()


def test_equal_scores_call_nobody() -> None:
    labels = torch.arange(20) < 5
    for value in (0.25, 1.0):
        assert not called(torch.full((20,), value), labels).any()


def test_too_few_examples_leave_the_default() -> None:
    assert best_threshold(torch.rand(9), torch.arange(9) < 2) == 0.5  # MIN_EXAMPLES
