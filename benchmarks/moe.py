"""Our mixture of experts against the dense floor of the same active FLOPs and transformers' Mixtral block.

python benchmarks/moe.py [--rounds 7] [--json FILE]      (needs transformers)

One thread, process time, interleaved; milliseconds are the best of the rounds, ratios the median of each round's own.
Results and gradients of all mixtures are asserted equal first. "oneDNN" is the scoped route of `mm.decoder.onednn`,
forward and backward; it is shown for the peers too.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from mm.decoder.counts import parameter_counts
from mm.decoder.experts import MixtureOfExperts
from mm.decoder.onednn import onednn_matmul
from mm.transformer import SwiGLU

WIDTH, HIDDEN, K = 512, 1024, 2
SHAPES = ((8, 2048), (64, 256))
SLOW_ROUNDS = 2
"""Of transformers' eager experts at E64, whose backward takes seconds."""
FLOOR, OURS, GROUPED, EAGER = "dense floor", "ours", "transformers grouped_mm", "transformers eager"
ROUTE = ", oneDNN"

Forward = Callable[[Tensor], Tensor]
Contender = tuple[nn.Module, Forward]


def theirs(ours: MixtureOfExperts, implementation: str) -> nn.Module:
    config = MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_local_experts=ours.experts.num_experts,
        num_experts_per_tok=K,
        experts_implementation=implementation,
    )
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(ours.router.logits.weight)
        block.experts.gate_up_proj.copy_(ours.experts.gate_up.transpose(1, 2))
        block.experts.down_proj.copy_(ours.experts.down.transpose(1, 2))
    return block


def contenders(num_experts: int) -> tuple[dict[str, Contender], MixtureOfExperts]:
    torch.manual_seed(0)
    ours = MixtureOfExperts(
        WIDTH, num_experts=num_experts, experts_per_token=K, expert_width=HIDDEN, shared_expert_width=0
    )
    ours.router.init_weights()
    ours.experts.init_weights(output_scale=1.0)
    grouped, eager = theirs(ours, "grouped_mm"), theirs(ours, "eager")
    floor = SwiGLU(WIDTH, K * HIDDEN)
    made: dict[str, Contender] = {
        FLOOR: (floor, floor),
        OURS: (ours, lambda x: ours(x)[0]),
        GROUPED: (grouped, lambda x: grouped(x[None])[0]),
        EAGER: (eager, lambda x: eager(x[None])[0]),
    }
    return made, ours


def gradient(forward: Forward, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = forward(x)
    (out * weight).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def assert_equal(made: dict[str, Contender], x: Tensor) -> None:
    weight = torch.randn_like(x)
    expected, slope = gradient(made[EAGER][1], x, weight)
    for name in (OURS, GROUPED):
        for route in (False, True):
            with onednn_matmul() if route else nullcontext():
                out, own = gradient(made[name][1], x, weight)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own, slope, rtol=1e-4, atol=1e-4)


def clock(module: nn.Module, forward: Forward, x: Tensor, route: bool) -> tuple[float, float]:
    """Milliseconds of process time: forward without gradient; forward and backward into fresh gradients."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    with onednn_matmul() if route else nullcontext():
        start = time.process_time()
        with torch.no_grad():
            forward(x)
        middle = time.process_time()
        out = forward(x)
        out.backward(torch.ones_like(out))
        end = time.process_time()
    return 1e3 * (middle - start), 1e3 * (end - middle)


def ratio(peer: list[tuple[float, float]], ours: list[tuple[float, float]]) -> float:
    """Median over rounds of the peer's forward and backward over ours: what slows a round slows both."""
    return statistics.median(theirs[1] / own[1] for theirs, own in zip(peer, ours, strict=False))


def measure(num_experts: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    made, ours = contenders(num_experts)
    x = torch.randn(tokens, WIDTH)
    assert_equal(made, x)
    times: dict[str, list[tuple[float, float]]] = {}
    for index in range(rounds):
        for name, (module, forward) in made.items():
            if name == EAGER and num_experts > 8 and index >= SLOW_ROUNDS:
                continue
            for route in (False, True) if name != EAGER else (False,):
                times.setdefault(name + ROUTE * route, []).append(clock(module, forward, x, route))
    counts = parameter_counts(ours)
    print(f"\nE{num_experts} T{tokens} d{WIDTH} f{HIDDEN} k{K}: {counts.total:,} parameters, {counts.active:,} active")
    print(f"{'':34}{'forward':>10}{'+backward':>11}   speed of ours, stock; with oneDNN")
    best = {name: tuple(min(column) for column in zip(*rows, strict=True)) for name, rows in times.items()}
    for name, (forward_ms, both_ms) in best.items():
        stock, fast = (ratio(times[name], times[own]) for own in (OURS, OURS + ROUTE))
        print(f"{name:34}{forward_ms:10.1f}{both_ms:11.1f}   {stock:13.2f}x {fast:12.2f}x")
    return {
        name: {
            "forward_ms": round(a, 2),
            "forward_backward_ms": round(b, 2),
            "over_ours": round(ratio(times[name], times[OURS]), 3),
            "over_ours_onednn": round(ratio(times[name], times[OURS + ROUTE]), 3),
        }
        for name, (a, b) in best.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()
    with onednn_matmul() as routed:
        print(f"torch {torch.__version__}, load {load[0]:.2f}, oneDNN route {'taken' if routed else 'refused here'}")
    result = {
        "torch": torch.__version__,
        "load_before": load[0],
        "onednn_route": routed,
        "rounds": options.rounds,
        "shapes": {f"E{experts} T{tokens}": measure(experts, tokens, options.rounds) for experts, tokens in SHAPES},
        "load_after": os.getloadavg()[0],
    }
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
