"""Norms, rotary positions, attention with a cache, padding, gradients."""

import math

import pytest
import torch
from torch import Tensor

from mm.attention import Causal, Full, Keys
from mm.transformer import Block, CrossAttention, RMSNorm, Rotary, SelfAttention, SwiGLU, masked_mean


class ListCache:
    """The simplest cache: concatenates."""

    def __init__(self) -> None:
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k.append(k)
        self.v.append(v)
        return torch.cat(self.k, 1), torch.cat(self.v, 1)


def test_rms_norm_is_the_formula_and_matches_torch() -> None:
    x = torch.randn(2, 3, 8) * 5
    ours, theirs = RMSNorm(8, eps=1e-6), torch.nn.RMSNorm(8, eps=1e-6)
    torch.nn.init.uniform_(ours.weight)
    theirs.weight.data.copy_(ours.weight)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * ours.weight)
    assert ours(x.bfloat16()).dtype == torch.bfloat16


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    rotary = Rotary(16)
    q, k = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 2, 16)

    def score(at: int, other: int) -> Tensor:
        return (rotary(q, torch.tensor([[at]])) * rotary(k, torch.tensor([[other]]))).sum(-1)

    torch.testing.assert_close(score(3, 1), score(103, 101), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(score(0, 7), score(50, 57), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(score(3, 1), score(3, 2))


def test_rotary_keeps_length_and_leaves_position_zero_alone() -> None:
    rotary, x = Rotary(8), torch.randn(2, 5, 3, 8)
    turned = rotary(x, torch.arange(5)[None])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0])


def test_cache_equals_no_cache() -> None:
    torch.manual_seed(0)
    block, x = Block(16, 2, rotary_base=10000.0).eval(), torch.randn(2, 6, 16)
    whole = block(x, mask=Causal())
    cache, parts = ListCache(), []
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        positions = torch.arange(start, stop)[None]
        parts.append(block(x[:, start:stop], mask=Causal(), positions=positions, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_padding_never_changes_real_tokens() -> None:
    torch.manual_seed(0)
    block = Block(16, 2, memory_width=8, rotary_base=10000.0).eval()
    x, memory = torch.randn(2, 4, 16), torch.randn(2, 3, 8)
    expected = block(x, mask=Full(), memory=memory)
    longer, wider = torch.cat([x, torch.randn(2, 5, 16)], 1), torch.cat([memory, torch.randn(2, 2, 8)], 1)
    real, known = torch.arange(9).expand(2, 9) < 4, torch.arange(5).expand(2, 5) < 3
    got = block(longer, mask=Keys(real), memory=wider, memory_mask=Keys(known))
    torch.testing.assert_close(got[:, :4], expected)


def test_a_memory_without_a_valid_key_adds_nothing() -> None:
    torch.manual_seed(0)
    cross = CrossAttention(16, 2, memory_width=8)
    out = cross(torch.randn(2, 4, 16), torch.randn(2, 3, 8), mask=Keys(torch.tensor([[False] * 3, [True] * 3])))
    assert (out[0] == 0).all()
    assert (out[1] != 0).any()


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    block = Block(16, 2, memory_width=8, rotary_base=10000.0, dropout=0.1)
    block(torch.randn(2, 5, 16), mask=Causal(), memory=torch.randn(2, 3, 8)).square().sum().backward()
    missing = [name for name, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_a_block_takes_another_feed_forward() -> None:
    block = Block(8, 2, feed_forward=SwiGLU(8, 4))
    assert block.feed_forward.gate.weight.shape == (4, 8)
    assert block(torch.randn(1, 2, 8), mask=Full()).shape == (1, 2, 8)


def test_bad_sizes_name_the_argument() -> None:
    with pytest.raises(ValueError, match="width=10, heads=4"):
        SelfAttention(10, 4)
    with pytest.raises(ValueError, match="head_width must be even"):
        Rotary(5)


def test_masked_mean_reads_only_marked_tokens() -> None:
    values = torch.tensor([[[1.0], [3.0], [math.nan]], [[5.0], [7.0], [9.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_mean(values, mask).tolist() == [[2.0], [0.0]]
