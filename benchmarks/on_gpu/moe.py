"""Our mixture against transformers' grouped_mm experts of the same weights, and the dense floor of the same FLOPs."""

from collections.abc import Callable
from functools import partial

import torch
from on_gpu.bench import Bench, assert_near, three
from torch import Tensor, nn
from transformers import MixtralConfig, OlmoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from mm.decoder.experts import MixtureOfExperts
from mm.transformer import SwiGLU

SECTION = "MoE block"
Forward = Callable[[Tensor], Tensor]


def run(bench: Bench) -> None:
    shapes = (
        ((32, 64, 8, 2, 64), (32, 16, 16, 4, 64))
        if bench.tiny
        else ((1024, 3584, 8, 2, 8192), (2048, 4096, 8, 2, 8192), (1024, 512, 64, 8, 8192), (2048, 1024, 64, 8, 8192))
    )
    for width, hidden, experts, k, tokens in shapes:
        case = f"{'Mixtral' if experts == 8 else 'OLMoE'} block, d{width} f{hidden} E{experts} k{k} T{tokens}"
        sizes = {"width": width, "hidden": hidden, "experts": experts, "k": k, "tokens": tokens}
        bench.attempt(SECTION, case, partial(measure, bench, case, **sizes))


def pair(bench: Bench, *, width: int, hidden: int, experts: int, k: int) -> tuple[MixtureOfExperts, nn.Module]:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": hidden, "num_experts_per_tok": k}
    with torch.device(bench.device):
        ours = MixtureOfExperts(
            width,
            num_experts=experts,
            experts_per_token=k,
            expert_width=hidden,
            shared_expert_width=0,
            gates="renormalised" if experts == 8 else "softmax",
        )
        config: MixtralConfig | OlmoeConfig
        if experts == 8:
            config = MixtralConfig(**sizes, num_local_experts=experts, experts_implementation="grouped_mm")
            theirs: nn.Module = MixtralSparseMoeBlock(config)
        else:
            config = OlmoeConfig(**sizes, num_experts=experts, experts_implementation="grouped_mm")
            theirs = OlmoeSparseMoeBlock(config)
    ours.router.init_weights()
    ours.experts.init_weights(output_scale=1.0)
    with torch.no_grad():
        ours.router.logits.weight.mul_(20)  # a trained router is not in doubt
        theirs.gate.weight.copy_(ours.router.logits.weight)
        theirs.experts.gate_up_proj.copy_(ours.experts.gate_up.transpose(1, 2))
        theirs.experts.down_proj.copy_(ours.experts.down.transpose(1, 2))
    return ours, theirs


def measure(bench: Bench, case: str, *, width: int, hidden: int, experts: int, k: int, tokens: int) -> None:
    ours, theirs = pair(bench, width=width, hidden=hidden, experts=experts, k=k)
    x = torch.randn(tokens, width, device=bench.device)
    weight = torch.randn_like(x)
    sides: dict[str, Forward] = {"ours": lambda x: ours(x)[0], "grouped": lambda x: theirs(x[None])[0]}

    def both(forward: Forward, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = forward(x)
        out.backward(weight)
        assert x.grad is not None
        return out.detach(), x.grad

    some = slice(0, min(tokens, 1024))
    (mine, slope), (other, other_slope) = (both(side, x[some], weight[some]) for side in sides.values())
    assert_near(mine, other, within=1e-4, what="fp32 outputs of our mixture and transformers' grouped_mm")
    assert_near(slope, other_slope, within=1e-3, what="fp32 gradients of our mixture and transformers' grouped_mm")
    assert ours.experts.down.grad is not None
    assert_near(
        ours.experts.down.grad,
        theirs.experts.down_proj.grad.transpose(1, 2),  # type: ignore[union-attr, operator]
        within=1e-3,
        what="fp32 gradients of the experts' weights",
    )
    for module in (ours, theirs):
        module.zero_grad()
        module.to(torch.bfloat16)
    x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
    with torch.device(bench.device):
        floor = SwiGLU(width, k * hidden).to(torch.bfloat16)
    sides["floor"] = floor

    def forward_only(forward: Forward) -> None:
        with torch.no_grad():
            forward(x)

    def step(name: str) -> None:
        {"ours": ours, "grouped": theirs, "floor": floor}[name].zero_grad()
        both(sides[name], x, weight)

    once = bench.times({name: (lambda side=side: forward_only(side)) for name, side in sides.items()})
    twice = bench.times({name: (lambda name=name: step(name)) for name in sides})
    flops = 6 * tokens * k * width * hidden
    bench.row(
        SECTION,
        case,
        ours_ms=three(once["ours"]),
        transformers_ms=three(once["grouped"]),
        speedup=three(once["grouped"] / once["ours"]),
        ours_both_ways_ms=three(twice["ours"]),
        transformers_both_ways_ms=three(twice["grouped"]),
        speedup_both_ways=three(twice["grouped"] / twice["ours"]),
        of_dense_floor=three(twice["floor"] / twice["ours"]),
        ours_both_ways_tflops=three(3 * flops / twice["ours"] / 1e9),
    )
