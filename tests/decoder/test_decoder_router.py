import math

import pytest
import torch
from torch import nn

from mm.attention import Causal
from mm.batch import Tokens
from mm.decoder.balance import balance
from mm.decoder.capacity import within_capacity
from mm.decoder.experts import MixtureOfExperts
from mm.decoder.groups import GroupLimit
from mm.decoder.layer import DecoderLayer
from mm.decoder.router import Router

WIDTH = 16
ALL_GATES = ("renormalised", "softmax", "sigmoid", "sigmoid_renormalised")


def router(experts=8, k=2, **options):
    torch.manual_seed(1)
    made = Router(WIDTH, num_experts=experts, experts_per_token=k, **options)
    nn.init.normal_(made.logits.weight)
    return made


def every_expert_is_called_and_learns(gates):
    torch.manual_seed(0)
    layer = MixtureOfExperts(
        WIDTH, num_experts=8, experts_per_token=2, expert_width=8, shared_expert_width=0, gates=gates
    )
    layer.router.init_weights()
    layer.experts.init_weights(output_scale=1.0)
    out, routing = layer(torch.randn(400, WIDTH))
    assert (routing.load > 0).all()
    out.square().sum().backward()
    for stacked in layer.experts.parameters():
        assert (stacked.grad.flatten(1).norm(dim=1) > 0).all()
    assert (layer.router.logits.weight.grad.norm(dim=1) > 0).all()


@pytest.mark.parametrize("gates", ALL_GATES)
def test_every_expert_is_called_and_learns(gates):
    every_expert_is_called_and_learns(gates)


def test_every_expert_is_called_and_learns_not_where_the_choice_is_made_among_the_chosen(monkeypatch):
    """The printed router squeezed its choice through a mask of two: experts 0 and 1 were all it ever called."""
    monkeypatch.setattr(Router, "_choose", lambda self, scores: scores.topk(2).values.topk(2).indices)
    with pytest.raises(AssertionError):
        every_expert_is_called_and_learns("softmax")


@pytest.mark.parametrize("expert", range(8))
def test_a_token_can_be_sent_to_any_expert(expert):
    made = router(gates="softmax", k=1)
    x = made.logits.weight[expert].detach()[None] * 10
    with torch.no_grad():
        made.logits.weight.div_(made.logits.weight.norm(dim=1, keepdim=True))
    assert made(x).experts.item() == expert


def test_a_token_dropped_for_capacity_passes_through_the_residual():
    torch.manual_seed(0)
    experts = MixtureOfExperts(
        WIDTH, num_experts=4, experts_per_token=2, expert_width=8, shared_expert_width=0, capacity_factor=0.5
    )
    experts.experts.init_weights(output_scale=1.0)
    nn.init.zeros_(experts.router.logits.weight)  # all choose the same two experts, which have room for 4 each
    layer = DecoderLayer(WIDTH, 2, memory_width=WIDTH, experts=experts, dropout=0.0)
    for module in (layer.attention, layer.cross):
        nn.init.zeros_(module.out.weight)
    x = torch.randn(1, 16, WIDTH)
    memory = layer.cross.project(Tokens(torch.randn(1, 3, WIDTH), torch.ones(1, 3, dtype=torch.bool)), None)
    angles = layer.attention.rotary.angles(torch.arange(16)[None])
    out, routing = layer(x, real=torch.arange(16), mask=Causal(), memory=memory, angles=angles)
    assert routing.dropped.item() == pytest.approx(0.75)
    assert torch.equal(out[0, 4:], x[0, 4:])
    assert (out[0, :4] != x[0, :4]).any(-1).all()


@pytest.mark.parametrize("gates", ALL_GATES)
def test_gates_are_what_their_name_says(gates):
    made, x = router(k=3, gates=gates, scale=2.0), torch.randn(30, WIDTH)
    logits = x @ made.logits.weight.T
    for token, experts, values in zip(logits.tolist(), made(x).experts.tolist(), made(x).gates.tolist(), strict=True):
        assert experts == sorted(range(8), key=lambda e: -token[e])[:3]
        if gates.startswith("sigmoid"):
            scores = [1 / (1 + math.exp(-value)) for value in token]
        else:
            scores = [math.exp(value) / sum(map(math.exp, token)) for value in token]
        chosen = [scores[e] for e in experts]
        total = sum(chosen) if gates.endswith("renormalised") else 1.0
        assert values == pytest.approx([2 * value / total for value in chosen], rel=1e-4)


@pytest.mark.parametrize("score", ["max", "top2"])
def test_groups_limit_the_choice_to_the_best_of_them(score):
    made, x = router(experts=12, k=3, gates="sigmoid", groups=GroupLimit(4, 2, score)), torch.randn(40, WIDTH)
    scores, routing = made.logits(x).sigmoid(), made(x)
    for token, experts in zip(scores.tolist(), routing.experts.tolist(), strict=True):
        best = [sorted(token[3 * g : 3 * g + 3], reverse=True) for g in range(4)]
        worth = [group[0] if score == "max" else group[0] + group[1] for group in best]
        kept = sorted(range(4), key=lambda g: -worth[g])[:2]
        allowed = [3 * g + place for g in kept for place in range(3)]
        assert experts == sorted(allowed, key=lambda e: -token[e])[:3]


def test_one_group_of_all_experts_limits_nothing():
    x = torch.randn(40, WIDTH)
    free, limited = router()(x), router(groups=GroupLimit(4, 4))(x)
    assert torch.equal(free.experts, limited.experts)
    assert torch.equal(free.gates, limited.gates)


def test_the_selection_bias_moves_the_choice_and_never_a_gate():
    made, x = router(k=2, gates="sigmoid", selection_bias=True), torch.randn(50, WIDTH)
    assert torch.equal(made(x).experts, router(k=2, gates="sigmoid")(x).experts)
    made.selection_bias[5] = 10.0
    routing = made(x)
    assert (routing.experts[:, 0] == 5).all()
    torch.testing.assert_close(routing.gates, made.logits(x).sigmoid().gather(-1, routing.experts))
    assert "selection_bias" in made.state_dict()
    assert not any(parameter is made.selection_bias for parameter in made.parameters())
    assert "selection_bias" not in router().state_dict()


def test_balancing_by_bias_evens_the_load_and_leaves_the_weights_alone():
    made, x = router(k=2, gates="sigmoid_renormalised", selection_bias=True), torch.randn(2000, WIDTH)
    with torch.no_grad():
        made.logits.weight[0] = 0
        x[:, 0] = 2.0
        made.logits.weight[3, 0] += 1.0  # everybody likes expert 3
    before, weight = made(x).load, made.logits.weight.clone()
    first = made.selection_bias.clone()
    balance(made, before, rate=0.01)
    assert torch.equal(made.selection_bias - first, 0.01 * (before.mean() - before).sign())
    for rate in (0.01, 0.001):
        for _ in range(200):
            balance(made, made(x).load, rate=rate)
    after = made(x).load
    assert before.max() > 0.2
    assert (after - 1 / 8).abs().max() < 0.02
    assert torch.equal(made.logits.weight, weight)
    with pytest.raises(ValueError, match="selection_bias=True"):
        balance(router(), after)


def test_capacity_is_kept_by_a_queue_of_first_choices():
    torch.manual_seed(0)
    experts = torch.rand(50, 6).argsort(-1)[:, :3]
    kept = within_capacity(experts, num_experts=6, factor=0.7)
    room = dict.fromkeys(range(6), math.ceil(0.7 * 150 / 6))
    for choice in range(3):
        for token in range(50):
            expert = experts[token, choice].item()
            assert kept[token, choice].item() == (room[expert] > 0)
            room[expert] -= 1


def test_evaluation_drops_only_where_it_was_asked_to():
    x = torch.randn(64, WIDTH)
    assert router(capacity_factor=0.5).eval()(x).dropped.item() == 0
    both = router(capacity_factor=4.0, evaluation_capacity_factor=0.5)
    assert both(x).dropped.item() == 0
    assert both.eval()(x).dropped.item() > 0.4
    assert both(x[:0]).dropped.item() == 0


def test_entropy_runs_from_nothing_to_log_e():
    made, x = router(), torch.randn(20, WIDTH)
    p = made.logits(x).softmax(-1)
    assert made(x).entropy.item() == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-4)
    nn.init.zeros_(made.logits.weight)
    assert made(x).entropy.item() == pytest.approx(math.log(8), rel=1e-5)
    assert not made(x).entropy.requires_grad


def test_sigmoids_that_all_vanish_give_no_nan():
    made = router(gates="sigmoid_renormalised")
    nn.init.constant_(made.logits.weight, -100.0)
    routing = made(torch.ones(3, WIDTH))
    (routing.gates.sum() + routing.load_balancing_loss).backward()
    assert routing.gates.isfinite().all()
    assert made.logits.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1, "gates": "sigmoid_renormalised"}, "experts_per_token 1.*allowed.*'sigmoid'"),
        ({"scale": 0.0}, "scale must be positive, got 0"),
        ({"evaluation_capacity_factor": -1.0}, "evaluation_capacity_factor must be positive or null, got -1"),
        ({"groups": GroupLimit(3, 1)}, "groups must divide num_experts 8, got 3"),
        ({"groups": GroupLimit(4, 5)}, r"kept must be 1\.\.4 \(groups\), got 5"),
        ({"groups": GroupLimit(8, 4, "top2")}, "'top2' needs groups of at least 2 experts, got 1.*allowed: 'max'"),
        ({"k": 3, "groups": GroupLimit(4, 1)}, "experts_per_token must be at most 2 .*got 3"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        router(**options)
