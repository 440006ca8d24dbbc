"""Soft targets: what they give to whom, and InfoNCE with them against torch's own cross-entropy."""

import torch
import torch.nn.functional as F

from mm.fusion.contrastive import info_nce
from mm.fusion.soft import TEMPERATURE, soft_targets


def made(n: int = 6, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_the_rest_goes_to_the_likeliest() -> None:
    texts = made()
    texts[4] = 3 * texts[1]  # the same direction: as alike as can be
    found = soft_targets(texts, share=0.3)
    torch.testing.assert_close(found.sum(1), torch.ones(6))
    torch.testing.assert_close(found.diagonal(), torch.full((6,), 0.7))
    assert found[1].argsort(descending=True)[:2].tolist() == [1, 4]
    cosines = F.normalize(texts, dim=-1) @ F.normalize(texts, dim=-1).T
    expected = ((cosines[0, 1] - cosines[0, 2]) / TEMPERATURE).exp()
    torch.testing.assert_close(found[0, 1] / found[0, 2], expected)
    assert torch.equal(soft_targets(texts, share=0.0), torch.eye(6))


def test_what_is_not_there_gets_nothing() -> None:
    valid = torch.tensor([True, False, True, True, False, True])
    found = soft_targets(made(), share=0.3, valid=valid)
    torch.testing.assert_close(found[valid][:, valid], soft_targets(made()[valid], share=0.3))
    assert found[valid][:, ~valid].eq(0).all()
    alone = torch.tensor([True, False, False, False, False, False])
    assert soft_targets(made(), share=0.3, valid=alone)[0].tolist() == [1, 0, 0, 0, 0, 0]


def test_info_nce_is_cross_entropy_with_these_targets() -> None:
    first, second = (F.normalize(made(seed=seed), dim=-1).requires_grad_() for seed in (1, 2))
    valid = torch.tensor([True, True, False, True, True, True])
    targets = soft_targets(made(), share=0.4, valid=valid)
    ours = info_nce(first, second, scale=9.0, valid=valid, targets=targets)
    logits, wanted = 9.0 * first[valid] @ second[valid].T, targets[valid][:, valid]
    theirs = (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2
    torch.testing.assert_close(ours, theirs)
    slopes = [torch.autograd.grad(loss, (first, second)) for loss in (ours, theirs)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
