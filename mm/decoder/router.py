"""Which tokens go to which experts, and the two losses that keep the choice healthy."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Gates = Literal["renormalised", "softmax"]


@dataclass(frozen=True)
class Routing:
    """The router's choice for T real tokens, k experts each.

    Attributes:
        experts: Chosen experts, the most probable first.
        gates: Weight of each choice, fp32; 0 where the expert was full.
        load: Share of the T * k choices that each of the E experts got, before any was dropped.
        load_balancing_loss: E * sum(load * mean probability); 1 where the router is uniform.
        z_loss: Mean squared log-sum-exp of the router's logits.
        dropped: Share of the choices dropped for capacity; 0 without a capacity factor and in evaluation.
    """

    experts: Int[Tensor, "T k"]
    gates: Float[Tensor, "T k"]
    load: Float[Tensor, " E"]
    load_balancing_loss: Float[Tensor, ""]
    z_loss: Float[Tensor, ""]
    dropped: Float[Tensor, ""]


class Router(nn.Module):
    """A linear map and a softmax in fp32, whatever autocast says, then the best k experts.

    Losses: load balancing after Switch Transformer (Fedus 2021, eq. 4, over all k choices), z loss after ST-MoE
    (Zoph 2022, eq. 5).
    """

    def __init__(
        self,
        width: int,
        *,
        num_experts: int,
        experts_per_token: int,
        gates: Gates = "renormalised",
        capacity_factor: float | None = None,
    ) -> None:
        """Makes a router.

        Args:
            width: Of the tokens.
            num_experts: E.
            experts_per_token: k.
            gates: "renormalised": the k probabilities sum to 1 (Mixtral), so that a mixture of equal experts equals
                one of them; "softmax": they are used as they are (Switch, OLMoE).
            capacity_factor: In training an expert takes at most ceil(factor * T * k / E) tokens; None: all of them.
                Evaluation never drops.

        Raises:
            ValueError: The numbers don't fit together, or the gates could not learn: one renormalised gate is
                always 1, so the router would get no gradient.
        """
        super().__init__()
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(f"experts_per_token must be 1..{num_experts} (num_experts), got {experts_per_token}")
        if experts_per_token == 1 and gates == "renormalised":
            raise ValueError(
                "experts_per_token 1 with gates 'renormalised' gives the router no gradient; "
                "allowed: experts_per_token >= 2, or gates 'softmax'"
            )
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"capacity_factor must be positive or null, got {capacity_factor}")
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.normalisation: Gates = gates
        self.capacity_factor = capacity_factor
        self.logits = nn.Linear(width, num_experts, bias=False)

    def init_weights(self) -> None:
        """Small, so that training starts from a nearly uniform choice."""
        nn.init.normal_(self.logits.weight, std=0.02)

    def forward(self, x: Float[Tensor, "T D"]) -> Routing:
        """Routes real tokens; the caller leaves padding out."""
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(x.float(), self.logits.weight.float())
            probabilities = logits.softmax(-1)
            gates, experts = probabilities.topk(self.experts_per_token, dim=-1)
            if self.normalisation == "renormalised":
                gates = gates / gates.sum(-1, keepdim=True)
            choices = max(experts.numel(), 1)
            load = torch.bincount(experts.flatten(), minlength=self.num_experts).float() / choices
            tokens = max(len(x), 1)
            balance = self.num_experts * (load * (probabilities.sum(0) / tokens)).sum()
            z_loss = logits.logsumexp(-1).square().sum() / tokens
            dropped = load.new_zeros(())
            if self.training and self.capacity_factor is not None:
                kept = self._within_capacity(experts)
                gates = gates * kept
                dropped = 1 - kept.float().mean()
        return Routing(experts, gates, load, balance, z_loss, dropped)

    def _within_capacity(self, experts: Int[Tensor, "T k"]) -> Tensor:
        """True where the expert still had room. First choices go before second ones, early tokens before late."""
        assert self.capacity_factor is not None
        capacity = math.ceil(self.capacity_factor * experts.numel() / self.num_experts)
        queue = experts.T.flatten()
        chosen = nn.functional.one_hot(queue, self.num_experts)
        place = (chosen.cumsum(0) * chosen).sum(-1)
        return (place <= capacity).view(self.experts_per_token, -1).T
