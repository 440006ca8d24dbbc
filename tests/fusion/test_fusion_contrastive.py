"""InfoNCE against open_clip's loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from mm.batch import Tokens
from mm.fusion.adapters import Projection
from mm.fusion.contrastive import LogitScale, contrastive_mse, info_nce


def pairs(n: int = 7, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(F.normalize(torch.randn(n, width, generator=g), dim=-1).requires_grad_() for _ in range(2))


def test_equals_open_clip_with_gradients() -> None:
    first, second = pairs()
    scale = torch.tensor(13.0)
    ours, theirs = info_nce(first, second, scale=scale), ClipLoss()(first, second, scale)
    assert torch.allclose(ours, theirs, atol=1e-6)
    for mine, other in zip(
        torch.autograd.grad(ours, [first, second]), torch.autograd.grad(theirs, [first, second]), strict=True
    ):
        assert torch.allclose(mine, other, atol=1e-6)


def test_logits_far_apart_lose_no_digit() -> None:
    """At a scale of 100 a row may lie 200 below the largest logit, where one shift for all would leave it nothing."""
    first, second = (item.detach() for item in pairs())
    second = F.normalize(second[:1] + 0.05 * second, dim=-1).requires_grad_()
    first = torch.cat([-second[:1].detach(), second[1:2].detach(), first[2:]]).requires_grad_()
    scale = torch.tensor(100.0, requires_grad=True)
    assert (scale * first @ second.T).max(1).values.min() < -90
    ours, theirs = info_nce(first, second, scale=scale), ClipLoss()(first.double(), second.double(), scale.double())
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for mine, other in zip(
        torch.autograd.grad(ours, [first, second, scale]),
        torch.autograd.grad(theirs, [first, second, scale]),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)  # of slopes that are times 100


def test_half_precision_around_it_changes_nothing() -> None:
    first, second = pairs()
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(first, second, scale=50.0)
    assert torch.equal(inside, info_nce(first, second, scale=50.0))


def test_invalid_pairs_are_as_if_they_were_not_there() -> None:
    first, second = pairs()
    valid = torch.tensor([True, False, True, True, False, True, True])
    with_holes = info_nce(first, second, scale=10.0, valid=valid)
    assert torch.allclose(with_holes, info_nce(first[valid], second[valid], scale=10.0), atol=1e-6)
    nothing = info_nce(first, second, scale=10.0, valid=torch.zeros(7, dtype=torch.bool))
    assert nothing == 0
    (gradient,) = torch.autograd.grad(nothing, [first])
    assert torch.isfinite(gradient).all()


def test_contrastive_mse_is_the_weighted_sum() -> None:
    first, second = pairs()
    nce = info_nce(first, second, scale=10.0)
    both = contrastive_mse(first, second, scale=10.0, lambda1=0.5, lambda2=2.0)
    assert torch.allclose(both, 0.5 * nce + 2.0 * F.mse_loss(first, second), atol=1e-6)


def test_the_scale_is_learnt_and_never_passes_its_bound() -> None:
    scale = LogitScale(temperature=0.07)
    assert scale().item() == pytest.approx(1 / 0.07, rel=1e-5)
    scale().backward()
    assert scale.log_scale.grad is not None
    with torch.no_grad():
        scale.log_scale.fill_(math.log(1e4))
    assert scale().item() == pytest.approx(100.0, rel=1e-5)
    with pytest.raises(ValueError, match="temperature"):
        LogitScale(temperature=0.001)


def test_unrelated_pairs_retrieve_at_chance() -> None:
    torch.manual_seed(0)
    first, second = F.normalize(torch.randn(400, 32), dim=-1), F.normalize(torch.randn(400, 32), dim=-1)
    rank = ((first @ second.T) >= (first * second).sum(-1, keepdim=True)).sum(1)
    assert 150 < rank.float().median() < 250
    assert info_nce(first, second, scale=1.0) == pytest.approx(math.log(400), rel=0.02)


def longer_embeddings_leave_the_loss_as_it_is() -> None:
    g = torch.Generator().manual_seed(0)
    projections = [Projection(6, embedding_width=5) for _ in range(2)]
    inputs = [Tokens(torch.randn(7, 3, 6, generator=g), torch.ones(7, 3, dtype=torch.bool)) for _ in range(2)]
    losses = []
    for _ in range(2):
        first, second = (projection(tokens) for projection, tokens in zip(projections, inputs, strict=True))
        losses += [info_nce(first, second, scale=5.0), contrastive_mse(first, second, scale=5.0)]
        with torch.no_grad():
            for parameter in (item for projection in projections for item in projection.project[-1].parameters()):
                parameter.mul_(30)
    torch.testing.assert_close(losses[:2], losses[2:])


def test_longer_embeddings_leave_the_loss_as_it_is() -> None:
    longer_embeddings_leave_the_loss_as_it_is()


def test_longer_embeddings_leave_the_loss_as_it_is_not_where_nothing_is_normalised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The printed loss multiplied raw embeddings: how long they are, and no temperature, decided it."""
    monkeypatch.setattr(F, "normalize", lambda x, dim: x)
    with pytest.raises(AssertionError):
        longer_embeddings_leave_the_loss_as_it_is()
