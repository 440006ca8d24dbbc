"""A mixture of SwiGLU experts, their weights stacked, beside one expert that every token visits."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm.decoder.groups import GroupLimit
from mm.decoder.router import Gates, Router, Routing
from mm.decoder.tally import tally
from mm.transformer import SwiGLU

ALIGNMENT = 8
"""Elements: grouped GEMMs want rows of 16 bytes, also in bfloat16."""


class Experts(nn.Module):
    """E SwiGLU feed-forwards (Shazeer 2020); one grouped GEMM serves all of them.

    Two grouped GEMMs a layer, always. A loop over weights unbound once was never faster (one core, forward and
    backward: E8 with 4096 rows 565 against 570 ms, E64 with 512 rows 220 against 260, E8 with 128 rows 33 against
    37), and it waits for the counts on a GPU. The backward of either is O(E); that of `weights[e]` in a loop, which
    makes a gradient of all experts for each of them, is O(E^2).
    """

    def __init__(self, width: int, *, num_experts: int, expert_width: int) -> None:
        super().__init__()
        for name, value in (("width", width), ("expert_width", expert_width)):
            if value < ALIGNMENT or value % ALIGNMENT:
                raise ValueError(f"{name} must be a multiple of {ALIGNMENT}, got {value}")
        self.num_experts = num_experts
        self.gate_up = nn.Parameter(torch.empty(num_experts, width, 2 * expert_width))
        self.down = nn.Parameter(torch.empty(num_experts, expert_width, width))

    def init_weights(self, *, output_scale: float) -> None:
        """Variance-preserving; the output times `output_scale`."""
        nn.init.normal_(self.gate_up, std=self.gate_up.shape[1] ** -0.5)
        nn.init.normal_(self.down, std=output_scale * self.down.shape[1] ** -0.5)

    def forward(self, x: Float[Tensor, "A D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "A D"]:
        """Applies expert e to its `counts[e]` rows; rows lie sorted by expert."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.down.dtype
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x.to(dtype), self.gate_up.to(dtype), offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, self.down.to(dtype), offs=ends)


class MixtureOfExperts(nn.Module):
    """Router, experts and a shared expert (Dai et al. 2024, DeepSeekMoE) in the place of a feed-forward."""

    def __init__(
        self,
        width: int,
        *,
        num_experts: int,
        experts_per_token: int,
        expert_width: int,
        shared_expert_width: int,
        gates: Gates = "renormalised",
        scale: float = 1.0,
        groups: GroupLimit | None = None,
        selection_bias: bool = False,
        capacity_factor: float | None = None,
        evaluation_capacity_factor: float | None = None,
        shared_gate: bool = False,
    ) -> None:
        """Makes the layer.

        Args:
            width: Of the tokens.
            num_experts: Routed experts.
            experts_per_token: How many of them a token visits.
            expert_width: Hidden width of a routed expert.
            shared_expert_width: Hidden width of the shared expert; 0: there is none.
            gates: See `Router`.
            scale: See `Router`.
            groups: See `Router`.
            selection_bias: See `Router`.
            capacity_factor: See `Router`.
            evaluation_capacity_factor: See `Router`.
            shared_gate: Whether a sigmoid of the token weighs the shared expert (Qwen2-MoE).

        Raises:
            ValueError: Numbers that don't fit together; the message names the argument.
        """
        super().__init__()
        if shared_gate and not shared_expert_width:
            raise ValueError("shared_gate needs a shared expert, got shared_expert_width 0")
        self.router = Router(
            width,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            gates=gates,
            scale=scale,
            groups=groups,
            selection_bias=selection_bias,
            capacity_factor=capacity_factor,
            evaluation_capacity_factor=evaluation_capacity_factor,
        )
        self.experts = Experts(width, num_experts=num_experts, expert_width=expert_width)
        self.shared = SwiGLU(width, shared_expert_width) if shared_expert_width else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if shared_gate else None

    def forward(self, x: Float[Tensor, "T D"]) -> tuple[Float[Tensor, "T D"], Routing]:
        """Mixes for real tokens; the caller leaves padding out.

        A choice dropped for capacity adds nothing: the token keeps its shared expert and its residual.
        """
        routing = self.router(x)
        order = routing.experts.flatten().argsort(stable=True)
        token = order // self.router.experts_per_token
        counts = tally(routing.experts.flatten(), self.experts.num_experts)
        out = self.experts(x.index_select(0, token), counts)
        out = out * routing.gates.flatten()[order, None].to(out.dtype)
        start = torch.zeros_like(x, dtype=out.dtype) if self.shared is None else self._share(x).to(out.dtype)
        return start.index_add(0, token, out), routing

    def _share(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        assert self.shared is not None
        out: Tensor = self.shared(x)
        return out if self.shared_gate is None else out * self.shared_gate(x).sigmoid()
