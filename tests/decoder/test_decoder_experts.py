import math

import pytest
import torch
import torch.nn.functional as F

from mm.decoder.experts import MixtureOfExperts
from mm.decoder.router import Router

WIDTH, EXPERTS = 16, 4


def mixture(k=2, *, shared=8, **options):
    torch.manual_seed(0)
    layer = MixtureOfExperts(
        WIDTH, num_experts=EXPERTS, experts_per_token=k, expert_width=24, shared_expert_width=shared, **options
    )
    layer.router.init_weights()
    layer.experts.init_weights(output_scale=1.0)
    torch.nn.init.normal_(layer.router.logits.weight)
    return layer


def one_expert(layer, x, index):
    gate, up = (x @ layer.experts.gate_up[index]).chunk(2, -1)
    return (F.silu(gate) * up) @ layer.experts.down[index]


@pytest.mark.parametrize("gates", ["renormalised", "softmax"])
def test_all_experts_equal_the_dense_mixture(gates):
    layer, x = mixture(EXPERTS, gates=gates), torch.randn(37, WIDTH)
    weights = layer.router.logits(x).softmax(-1)
    dense = sum(weights[:, [e]] * one_expert(layer, x, e) for e in range(EXPERTS)) + layer.shared(x)
    torch.testing.assert_close(layer(x)[0], dense, rtol=1e-5, atol=1e-5)


def test_two_experts_equal_a_loop_over_tokens_with_gradients():
    layer, x = mixture(shared=0), torch.randn(29, WIDTH)
    loop = []
    for token in x:
        values, experts = layer.router.logits(token).softmax(-1).topk(2)
        gates = values / values.sum()
        loop.append(sum(g * one_expert(layer, token, e) for g, e in zip(gates, experts, strict=True)))
    expected, got = torch.stack(loop), layer(x)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(x)
    for mine, theirs in zip(
        torch.autograd.grad((got * weight).sum(), list(layer.parameters())),
        torch.autograd.grad((expected * weight).sum(), list(layer.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_losses_equal_their_definitions():
    router = mixture().router
    x = torch.randn(50, WIDTH)
    routing = router(x)
    logits = x @ router.logits.weight.T
    probability = logits.softmax(-1)
    share = [0.0] * EXPERTS
    for token in probability:
        for expert in sorted(range(EXPERTS), key=lambda e: -token[e].item())[:2]:
            share[expert] += 1 / (50 * 2)
    expected = EXPERTS * sum(share[e] * probability[:, e].mean().item() for e in range(EXPERTS))
    assert routing.load_balancing_loss.item() == pytest.approx(expected, rel=1e-5)
    z_loss = sum(math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits.tolist()) / 50
    assert routing.z_loss.item() == pytest.approx(z_loss, rel=1e-5)
    assert routing.load.tolist() == pytest.approx(share)


def test_uniform_routing_has_load_balancing_loss_one_and_collapse_the_number_of_experts():
    router = Router(WIDTH, num_experts=EXPERTS, experts_per_token=2)
    torch.nn.init.zeros_(router.logits.weight)
    assert router(torch.randn(8, WIDTH)).load_balancing_loss.item() == pytest.approx(1.0)
    router = Router(WIDTH, num_experts=EXPERTS, experts_per_token=1, gates="softmax")
    with torch.no_grad():
        router.logits.weight.zero_()[0] = 50.0
    assert router(torch.ones(8, WIDTH)).load_balancing_loss.item() == pytest.approx(EXPERTS)


def test_capacity_drops_late_second_choices_in_training_only():
    layer, x = mixture(shared=0, capacity_factor=0.5), torch.randn(64, WIDTH)
    routing = layer.router(x)
    capacity = math.ceil(0.5 * 64 * 2 / EXPERTS)
    room, kept = dict.fromkeys(range(EXPERTS), capacity), torch.zeros(64, 2, dtype=torch.bool)
    for choice in range(2):
        for token in range(64):
            expert = routing.experts[token, choice].item()
            kept[token, choice] = room[expert] > 0
            room[expert] -= 1
    assert torch.equal(routing.gates > 0, kept)
    assert routing.dropped.item() == pytest.approx(1 - kept.float().mean().item())
    layer.eval()
    assert layer.router(x).dropped.item() == 0
    dropless = mixture(shared=0).eval()
    torch.testing.assert_close(layer(x)[0], dropless(x)[0])


def test_router_stays_in_fp32_under_autocast():
    layer, x = mixture().eval(), torch.randn(200, WIDTH)
    expected, plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, routing = layer(x)
    assert torch.equal(routing.gates, plain.gates)
    assert torch.equal(routing.experts, plain.experts)
    assert (got.float() - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens_and_idle_experts_are_fine(tokens):
    layer = mixture()
    out, routing = layer(torch.randn(tokens, WIDTH, requires_grad=True))
    assert out.shape == (tokens, WIDTH)
    (out.sum() + routing.load_balancing_loss + routing.z_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts_per_token": 1}, "experts_per_token 1 with gates 'renormalised'.*allowed.*softmax"),
        ({"experts_per_token": 5}, r"experts_per_token must be 1\.\.4.*got 5"),
        ({"experts_per_token": 0}, r"experts_per_token must be 1\.\.4.*got 0"),
        ({"experts_per_token": 2, "capacity_factor": 0.0}, "capacity_factor must be positive.*got 0"),
    ],
)
def test_impossible_routers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Router(WIDTH, num_experts=EXPERTS, **options)


def test_widths_that_grouped_gemms_cannot_take_are_refused():
    with pytest.raises(ValueError, match="expert_width must be a multiple of 8, got 20"):
        MixtureOfExperts(16, num_experts=4, experts_per_token=2, expert_width=20, shared_expert_width=0)
