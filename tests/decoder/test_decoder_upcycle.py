import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mm.decoder.counts import parameter_counts
from mm.decoder.experts import Experts, MixtureOfExperts
from mm.decoder.groups import GroupLimit
from mm.decoder.onednn import onednn_matmul, route_is_exact
from mm.decoder.upcycle import split, upcycle
from mm.transformer import SwiGLU

WIDTH, HIDDEN = 16, 48


def dense():
    torch.manual_seed(0)
    made = SwiGLU(WIDTH, HIDDEN)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("gates", ["renormalised", "sigmoid_renormalised"])
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_an_upcycled_mixture_equals_its_dense_parent(gates, k, parts):
    parent, x = dense(), torch.randn(60, WIDTH)
    made = split(upcycle(parent, num_experts=4, experts_per_token=k, gates=gates), parts)
    got, routing = made(x)
    torch.testing.assert_close(got, parent(x), rtol=1e-5, atol=1e-5)
    assert routing.experts.shape == (60, k * parts)
    before = [p.clone() for p in parent.parameters()]
    nn.init.zeros_(made.experts.down)
    assert all(torch.equal(a, b) for a, b in zip(before, parent.parameters(), strict=True))


def test_noise_moves_the_copies_apart_by_its_size():
    parent, x = dense(), torch.randn(60, WIDTH)
    made = upcycle(parent, num_experts=4, experts_per_token=2, noise=0.1)
    clean = upcycle(parent, num_experts=4, experts_per_token=2)
    moved = made.experts.down - clean.experts.down
    assert moved.std().item() == pytest.approx(0.1 * parent.down.weight.std().item(), rel=0.1)
    assert not torch.equal(made.experts.down[0], made.experts.down[1])
    assert 0 < (made(x)[0] - parent(x)).norm() / parent(x).norm() < 0.5
    assert torch.equal(clean.experts.down[0], clean.experts.down[1])


@pytest.mark.parametrize("gates", ["renormalised", "softmax", "sigmoid", "sigmoid_renormalised"])
@pytest.mark.parametrize("groups", [None, GroupLimit(2, 1)])
def test_fine_grained_experts_equal_the_coarse_ones(gates, groups):
    torch.manual_seed(0)
    coarse = MixtureOfExperts(
        WIDTH,
        num_experts=6,
        experts_per_token=2,
        expert_width=HIDDEN,
        shared_expert_width=8,
        gates=gates,
        scale=1.5,
        groups=groups,
        selection_bias=True,
        shared_gate=True,
    )
    for parameter in coarse.parameters():
        nn.init.normal_(parameter, std=0.3)
    coarse.router.selection_bias.normal_(std=0.1)
    fine, x = split(coarse, 3), torch.randn(80, WIDTH)
    torch.testing.assert_close(fine(x)[0], coarse(x)[0], rtol=1e-5, atol=1e-5)
    old, new = parameter_counts(coarse), parameter_counts(fine)
    assert new.total - old.total == 12 * WIDTH  # the router's rows; the experts are the same, cut
    assert new.active - old.active == 12 * WIDTH


def test_the_pieces_of_an_expert_learn_different_things():
    made, x = split(upcycle(dense(), num_experts=4, experts_per_token=2), 2), torch.randn(60, WIDTH)
    made(x)[0].square().sum().backward()
    rows = made.router.logits.weight.grad
    assert (rows[0::2] - rows[1::2]).norm(dim=1).min() > 0


def test_parameters_are_counted_from_the_module():
    layer = MixtureOfExperts(
        WIDTH, num_experts=8, experts_per_token=2, expert_width=HIDDEN, shared_expert_width=24, shared_gate=True
    )
    one, always = 3 * WIDTH * HIDDEN, 3 * WIDTH * 24 + 8 * WIDTH + WIDTH
    counts = parameter_counts(nn.ModuleList([layer, nn.Linear(3, 4)]))
    assert counts.total == 8 * one + always + 16
    assert counts.active == 2 * one + always + 16
    assert parameter_counts(nn.Linear(3, 4)).active == 16


def test_the_experts_backward_makes_no_gradient_of_all_experts_for_each():
    """Indexing stacked weights in a loop does: its backward is O(E^2)."""
    experts = Experts(8, num_experts=64, expert_width=8)
    experts.init_weights(output_scale=1.0)
    out, weight = experts(torch.randn(128, 8), torch.full((64,), 2)), torch.randn(128, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out.backward(weight)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    stacked = sum(parameter.numel() * 4 for parameter in experts.parameters())
    assert allocated < 6 * stacked


def test_the_onednn_route_is_scoped_and_still_float32():
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    a, b = torch.randn(300, 300), torch.randn(300, 300)
    exact = a.double() @ b.double()
    with onednn_matmul() as routed:
        assert routed == route_is_exact()
        assert ((a @ b).double() - exact).norm() / exact.norm() < 1e-5
    assert setting.fp32_precision == before
    with pytest.raises(KeyError), onednn_matmul():
        raise KeyError
    assert setting.fp32_precision == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: upcycle(dense(), num_experts=4, experts_per_token=2, noise=-1.0),
            "noise must not be negative, got -1",
        ),
        (lambda: upcycle(dense(), num_experts=4, experts_per_token=1), "no gradient"),
        (lambda: split(upcycle(dense(), num_experts=4, experts_per_token=2), 4), "48 into multiples of 8, got 4"),
        (
            lambda: split(
                MixtureOfExperts(
                    WIDTH,
                    num_experts=4,
                    experts_per_token=2,
                    expert_width=16,
                    shared_expert_width=0,
                    groups=GroupLimit(2, 1, "top2"),
                ),
                2,
            ),
            "'top2' can't be split",
        ),
        (
            lambda: MixtureOfExperts(
                WIDTH, num_experts=4, experts_per_token=2, expert_width=8, shared_expert_width=0, shared_gate=True
            ),
            "shared_gate needs a shared expert, got shared_expert_width 0",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_copy_is_the_dense_feed_forward_transposed():
    parent = dense()
    made = upcycle(parent, num_experts=2, experts_per_token=2)
    x = torch.randn(5, WIDTH)
    gate, up = (x @ made.experts.gate_up[1]).chunk(2, -1)
    torch.testing.assert_close((F.silu(gate) * up) @ made.experts.down[1], parent(x), rtol=1e-5, atol=1e-5)
