"""A mixture from a dense feed-forward, and finer experts from coarse ones, both equal to their parent at first."""

from copy import deepcopy

import torch
from torch import Tensor

from mm.decoder.experts import ALIGNMENT, MixtureOfExperts
from mm.decoder.router import Gates
from mm.transformer import SwiGLU


@torch.no_grad()
def upcycle(
    dense: SwiGLU,
    *,
    num_experts: int,
    experts_per_token: int,
    gates: Gates = "renormalised",
    noise: float = 0.0,
    selection_bias: bool = False,
    capacity_factor: float | None = None,
) -> MixtureOfExperts:
    """Sparse upcycling (Komatsuzaki et al. 2022): every expert a copy of the dense feed-forward, the router fresh.

    With renormalised gates the mixture equals its parent until training starts; with others it doesn't, as the gates
    don't sum to 1.

    Args:
        dense: The parent; left as it is.
        num_experts: Copies.
        experts_per_token: See `Router`.
        gates: See `Router`.
        noise: Standard deviation of what is added to each copy, relative to that of the parent's weights; 0: nothing.
            Drawn from torch's global generator.
        selection_bias: See `Router`.
        capacity_factor: See `Router`.

    Raises:
        ValueError: Numbers that don't fit together.
    """
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}")
    hidden, width = dense.gate.weight.shape
    made = MixtureOfExperts(
        width,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert_width=hidden,
        shared_expert_width=0,
        gates=gates,
        selection_bias=selection_bias,
        capacity_factor=capacity_factor,
    ).to(device=dense.gate.weight.device, dtype=dense.gate.weight.dtype)
    made.router.init_weights()
    made.experts.gate_up.copy_(torch.cat([dense.gate.weight, dense.up.weight]).T.expand_as(made.experts.gate_up))
    made.experts.down.copy_(dense.down.weight.T.expand_as(made.experts.down))
    for stacked in made.experts.parameters() if noise else ():
        stacked.add_(torch.randn_like(stacked), alpha=noise * float(stacked[0].std()))
    return made.train(dense.training)


@torch.no_grad()
def split(coarse: MixtureOfExperts, parts: int) -> MixtureOfExperts:
    """Fine-grained experts (Dai et al. 2024): each expert cut along its hidden width; equal to the parent at first.

    The pieces of an expert share its row of the router ("virtual groups", He et al. 2024), so a token that chose the
    expert chooses all of its pieces; k grows with `parts` and active parameters stay. Training then tells them apart.

    Args:
        coarse: The parent; left as it is.
        parts: Pieces of each expert.

    Raises:
        ValueError: The width isn't cut evenly into multiples of 8, or the parent's groups are scored by "top2",
            which pieces can't reproduce.
    """
    hidden, width = coarse.experts.down.shape[1:]
    if parts < 1 or hidden % (parts * ALIGNMENT):
        raise ValueError(f"parts must cut expert_width {hidden} into multiples of {ALIGNMENT}, got {parts}")
    old = coarse.router
    # A softmax deals an expert's score out to its pieces; a sigmoid gives each of them the whole.
    sigmoid = old.normalisation in ("sigmoid", "sigmoid_renormalised")
    if old.groups is not None and old.groups.score == "top2" and parts > 1:
        raise ValueError("groups scored by 'top2' can't be split: two pieces of one expert would count; allowed: 'max'")
    made = MixtureOfExperts(
        width,
        num_experts=parts * old.num_experts,
        experts_per_token=parts * old.experts_per_token,
        expert_width=hidden // parts,
        shared_expert_width=0,
        gates=old.normalisation,
        scale=old.scale * (1 if old.normalisation == "sigmoid" else parts),
        groups=old.groups,
        selection_bias=old.selection_bias is not None,
        capacity_factor=old.capacity_factor,
        evaluation_capacity_factor=old.evaluation_capacity_factor,
    ).to(device=coarse.experts.down.device, dtype=coarse.experts.down.dtype)
    made.router.logits.weight.copy_(old.logits.weight.repeat_interleave(parts, 0))
    if made.router.selection_bias is not None and old.selection_bias is not None:
        made.router.selection_bias.copy_(old.selection_bias.repeat_interleave(parts) / (1 if sigmoid else parts))
    gate, up = (_cut(half, parts) for half in coarse.experts.gate_up.chunk(2, dim=-1))
    made.experts.gate_up.copy_(torch.cat([gate, up], dim=-1))
    made.experts.down.copy_(coarse.experts.down.reshape(-1, hidden // parts, width))
    made.shared, made.shared_gate = deepcopy(coarse.shared), deepcopy(coarse.shared_gate)
    return made.train(coarse.training)


def _cut(weights: Tensor, parts: int) -> Tensor:
    """(E, D, F) to (E * parts, D, F / parts), the pieces of an expert beside each other."""
    experts, width, hidden = weights.shape
    return weights.reshape(experts, width, parts, -1).transpose(1, 2).reshape(-1, width, hidden // parts)
