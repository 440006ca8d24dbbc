"""Our mixture against transformers' own blocks with the same weights, on random tiny configurations."""

import pytest
import torch

from mm.decoder.experts import MixtureOfExperts
from mm.decoder.groups import GroupLimit

transformers = pytest.importorskip("transformers")

WIDTH, HIDDEN, EXPERTS = 16, 24, 8


def block(family, cls, **options):
    module = getattr(transformers.models, family)
    config_class = next(
        getattr(module, name) for name in dir(module) if name.endswith("Config") and "PreTrained" not in name
    )
    config = config_class(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        moe_intermediate_size=HIDDEN,
        num_local_experts=EXPERTS,
        num_experts=EXPERTS,
        n_routed_experts=EXPERTS,
        num_attention_heads=4,
        num_key_value_heads=4,
        **options,
    )
    config._experts_implementation = "eager"
    source = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=[cls])
    made = getattr(source, cls)(config)
    torch.manual_seed(3)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.train()


def pairs(theirs, ours):
    """Their parameters and ours, one for one; ours transposed where theirs are."""
    yield theirs.gate.weight, ours.router.logits.weight, False
    yield theirs.experts.gate_up_proj, ours.experts.gate_up, True
    yield theirs.experts.down_proj, ours.experts.down, True
    shared = getattr(theirs, "shared_experts", None) or getattr(theirs, "shared_expert", None)
    if shared is not None:
        yield shared.gate_proj.weight, ours.shared.gate.weight, False
        yield shared.up_proj.weight, ours.shared.up.weight, False
        yield shared.down_proj.weight, ours.shared.down.weight, False
    if hasattr(theirs, "shared_expert_gate"):
        yield theirs.shared_expert_gate.weight, ours.shared_gate.weight, False


V2 = {"n_shared_experts": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5}
V3 = {**V2, "n_group": 4, "topk_group": 2, "norm_topk_prob": True}
QWEN2 = {"num_experts_per_tok": 2, "norm_topk_prob": False, "shared_expert_intermediate_size": 40}
SHARED = {"shared_expert_width": 2 * HIDDEN, "scale": 2.5}
CASES = {
    "olmoe": (
        ("olmoe", "OlmoeSparseMoeBlock", {"num_experts_per_tok": 3, "norm_topk_prob": False}),
        {"gates": "softmax"},
    ),
    "olmoe renormalised": (
        ("olmoe", "OlmoeSparseMoeBlock", {"num_experts_per_tok": 3, "norm_topk_prob": True}),
        {"gates": "renormalised"},
    ),
    "olmoe top-1": (
        ("olmoe", "OlmoeSparseMoeBlock", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
        {"gates": "softmax"},
    ),
    "mixtral": (("mixtral", "MixtralSparseMoeBlock", {"num_experts_per_tok": 2}), {"gates": "renormalised"}),
    "qwen2": (
        ("qwen2_moe", "Qwen2MoeSparseMoeBlock", QWEN2),
        {"gates": "softmax", "shared_expert_width": 40, "shared_gate": True},
    ),
    "qwen3": (
        ("qwen3_moe", "Qwen3MoeSparseMoeBlock", {"num_experts_per_tok": 2, "norm_topk_prob": True}),
        {"gates": "renormalised"},
    ),
    "deepseek-v2 greedy": (
        ("deepseek_v2", "DeepseekV2Moe", {**V2, "topk_method": "greedy"}),
        {"gates": "softmax", **SHARED},
    ),
    "deepseek-v2 groups": (
        ("deepseek_v2", "DeepseekV2Moe", {**V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
        {"gates": "softmax", "groups": GroupLimit(4, 2, "max"), **SHARED},
    ),
    "deepseek-v3": (
        ("deepseek_v3", "DeepseekV3MoE", V3),
        {"gates": "sigmoid_renormalised", "groups": GroupLimit(4, 2, "top2"), "selection_bias": True, **SHARED},
    ),
    "deepseek-v3 as scored": (
        ("deepseek_v3", "DeepseekV3MoE", {**V3, "norm_topk_prob": False, "n_group": 1, "topk_group": 1}),
        {"gates": "sigmoid", "groups": GroupLimit(1, 1, "top2"), "selection_bias": True, **SHARED},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_transformers(case):
    (family, cls, options), ours_options = CASES[case]
    theirs = block(family, cls, **options)
    ours = MixtureOfExperts(
        WIDTH,
        num_experts=EXPERTS,
        experts_per_token=options["num_experts_per_tok"],
        expert_width=HIDDEN,
        **{"shared_expert_width": 0, **ours_options},
    )
    named = list(pairs(theirs, ours))
    assert len(named) == len(list(ours.parameters())) == len(list(theirs.parameters()))
    with torch.no_grad():
        for their, own, turned in named:
            own.copy_(their.transpose(-1, -2) if turned else their)
        if ours_options.get("selection_bias"):
            theirs.gate.e_score_correction_bias.normal_(std=0.2)
            ours.router.selection_bias.copy_(theirs.gate.e_score_correction_bias)
    x = torch.randn(53, WIDTH, requires_grad=True)
    expected, (got, routing) = theirs(x[None])[0], ours(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (routing.load > 0).sum() >= 6
    weight = torch.randn_like(x)
    their_gradients = torch.autograd.grad((expected * weight).sum(), [x, *(their for their, _, _ in named)])
    our_gradients = torch.autograd.grad((got * weight).sum(), [x, *(own for _, own, _ in named)])
    for their, own, turned in zip(their_gradients, our_gradients, [False, *(t for *_, t in named)], strict=True):
        torch.testing.assert_close(own, their.transpose(-1, -2) if turned else their, rtol=1e-4, atol=1e-4)


def test_load_balancing_loss_equals_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    ours = MixtureOfExperts(WIDTH, num_experts=EXPERTS, experts_per_token=2, expert_width=8, shared_expert_width=0)
    torch.nn.init.normal_(ours.router.logits.weight)
    x = torch.randn(60, WIDTH)
    # Theirs counts tokens an expert, k a token; ours is a share of the choices, so that uniform is 1 for every k.
    expected = load_balancing_loss_func((ours.router.logits(x),), EXPERTS, 2) / 2
    torch.testing.assert_close(ours.router(x).load_balancing_loss, expected, rtol=1e-5, atol=1e-6)
