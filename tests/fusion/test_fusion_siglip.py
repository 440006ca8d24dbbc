"""SigLIP against open_clip's loss, and texts that occur twice against sums written by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss

from mm.batch import Padded
from mm.fusion.contrastive import info_nce, squared_distance, text_numbers
from mm.fusion.siglip import LogitBias, siglip

SAME = torch.tensor([3, 1, 3, 0, 2, 1, 3])
VALID = torch.tensor([True, True, True, True, False, True, False])


def pairs(n: int = 7, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(F.normalize(torch.randn(n, width, generator=g), dim=-1).requires_grad_() for _ in range(2))


def test_equals_open_clip_with_all_gradients() -> None:
    first, second = pairs()
    scale, bias = torch.tensor(10.0, requires_grad=True), LogitBias()
    ours = siglip(first, second, scale=scale, bias=bias())
    theirs = SigLipLoss()(first, second, scale, bias())
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    wanted = [first, second, scale, bias.bias]
    for mine, other in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def by_hand(
    first: torch.Tensor, second: torch.Tensor, same: list[int], valid: list[bool], *, scale: float, bias: float
) -> tuple[float, float]:
    """InfoNCE and SigLIP term by term in Python's own double precision."""
    rows = [i for i, there in enumerate(valid) if there]
    logits = {(i, j): scale * math.fsum((first[i] * second[j]).tolist()) for i in rows for j in rows}
    nce, sigmoid = 0.0, 0.0
    for i in rows:
        alike = [j for j in rows if same[j] == same[i]]
        for turned in (False, True):
            row = {j: logits[(j, i) if turned else (i, j)] for j in rows}
            total = math.log(math.fsum(math.exp(value) for value in row.values()))
            nce += math.fsum((total - row[j]) / len(alike) for j in alike) / 2
        for j in rows:
            logit = logits[i, j] + bias
            sigmoid += math.log1p(math.exp(-logit if j in alike else logit))
    return nce / len(rows), sigmoid / len(rows)


def test_targets_of_equal_texts_are_shared() -> None:
    first, second = (item.detach().double() for item in pairs())
    nce, sigmoid = by_hand(first, second, SAME.tolist(), VALID.tolist(), scale=9.0, bias=-4.0)
    first, second = first.float(), second.float()
    assert info_nce(first, second, scale=9.0, valid=VALID, same=SAME).item() == pytest.approx(nce, abs=1e-6)
    ours = siglip(first, second, scale=9.0, bias=-4.0, valid=VALID, same=SAME)
    assert ours.item() == pytest.approx(sigmoid, abs=1e-6)
    hard = by_hand(first.double(), second.double(), list(range(7)), VALID.tolist(), scale=9.0, bias=-4.0)
    assert info_nce(first, second, scale=9.0, valid=VALID).item() == pytest.approx(hard[0], abs=1e-6)
    assert siglip(first, second, scale=9.0, bias=-4.0, valid=VALID).item() == pytest.approx(hard[1], abs=1e-6)


def test_equal_vectors_make_shared_infonce_that_of_a_target_each() -> None:
    """So that sharing can't hurt where the text tower has no dropout; SigLIP does gain."""
    first, second = (item.detach() for item in pairs())
    second = second[SAME].requires_grad_()
    first.requires_grad_()
    soft, hard = info_nce(first, second, scale=9.0, same=SAME), info_nce(first, second, scale=9.0)
    assert soft.item() == pytest.approx(hard.item(), abs=1e-6)
    (mine,), (other,) = (torch.autograd.grad(loss, [first]) for loss in (soft, hard))
    assert torch.allclose(mine, other, atol=1e-6)
    sharp = {"scale": 30.0, "bias": -15.0}
    assert siglip(second, second, same=SAME, **sharp) < siglip(second, second, **sharp) - 1


@pytest.mark.parametrize("same", [None, SAME])
def test_invalid_pairs_are_as_if_they_were_not_there(same: torch.Tensor | None) -> None:
    first, second = pairs()
    kept = None if same is None else same[VALID]
    with_holes = siglip(first, second, scale=9.0, bias=-4.0, valid=VALID, same=same)
    alone = siglip(first[VALID], second[VALID], scale=9.0, bias=-4.0, same=kept)
    assert torch.allclose(with_holes, alone, atol=1e-6)
    with_holes = info_nce(first, second, scale=9.0, valid=VALID, same=same)
    assert torch.allclose(with_holes, info_nce(first[VALID], second[VALID], scale=9.0, same=kept), atol=1e-6)
    nothing = siglip(first, second, scale=9.0, bias=-4.0, valid=torch.zeros(7, dtype=torch.bool), same=same)
    assert nothing == 0
    (gradient,) = torch.autograd.grad(nothing, [first])
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert squared_distance(first, second, valid=torch.zeros(7, dtype=torch.bool)) == 0


def test_texts_are_the_same_token_by_token_whatever_the_padding() -> None:
    rows = [[5, 6, 0], [5, 6], [5, 6, 0], [7], [], [5, 6]]
    numbers = text_numbers(Padded.of(rows))
    assert numbers is not None
    alike = numbers[:, None] == numbers
    assert alike.tolist() == [[one == other for other in rows] for one in rows]
    wide = Padded.of([*rows, [1] * 9])
    again = text_numbers(Padded(wide.values[:6], wide.lengths[:6]))
    assert torch.equal(again[:, None] == again, alike)
    assert text_numbers(Padded.of([[5], [6], [5, 6]])) is None
