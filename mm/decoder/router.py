"""Which tokens go to which experts, and the two losses that keep the choice healthy."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm.decoder.capacity import within_capacity
from mm.decoder.groups import GroupLimit
from mm.decoder.tally import tally

Gates = Literal["renormalised", "softmax", "sigmoid", "sigmoid_renormalised"]


@dataclass(frozen=True)
class Routing:
    """The router's choice for T real tokens, k experts each; losses are made when asked for, which writing never does.

    Attributes:
        experts: Chosen experts, the best first.
        gates: Weight of each choice, fp32; 0 where the expert was full.
        logits: Of every expert, fp32.
        probabilities: Of every expert, fp32.
        dropped: Share of the choices dropped for capacity; 0 without a capacity factor.
    """

    experts: Int[Tensor, "T k"]
    gates: Float[Tensor, "T k"]
    logits: Float[Tensor, "T E"]
    probabilities: Float[Tensor, "T E"]
    dropped: Float[Tensor, ""]

    @cached_property
    def load(self) -> Float[Tensor, " E"]:
        """Share of the T * k choices that each of the E experts got, before any was dropped."""
        return tally(self.experts.flatten(), self.logits.shape[1]).float() / max(self.experts.numel(), 1)

    @cached_property
    def load_balancing_loss(self) -> Float[Tensor, ""]:
        """E * sum(load * mean probability); 1 where the router is uniform."""
        tokens, experts = max(len(self.logits), 1), self.logits.shape[1]
        return experts * (self.load * (self.probabilities.sum(0) / tokens)).sum()

    @cached_property
    def z_loss(self) -> Float[Tensor, ""]:
        """Mean squared log-sum-exp of the router's logits."""
        return self.logits.logsumexp(-1).square().sum() / max(len(self.logits), 1)

    @cached_property
    def entropy(self) -> Float[Tensor, ""]:
        """Mean entropy of the router's probabilities, in nats, without gradient; log E where it is uniform."""
        total: Tensor = torch.special.entr(self.probabilities.detach()).sum()
        return total / max(len(self.logits), 1)


class Router(nn.Module):
    """A linear map and scores in fp32, whatever autocast says, then the best k experts.

    Losses: load balancing after Switch Transformer (Fedus 2021, eq. 4, over all k choices), z loss after ST-MoE
    (Zoph 2022, eq. 5). Sigmoid scores, made to sum to 1 over all experts, stand for the probabilities there.

    Attributes:
        selection_bias: Added to the scores to choose by, never to the gates; None: there is none. It has no gradient:
            `mm.decoder.balance.balance` moves it.
    """

    selection_bias: Tensor | None

    def __init__(
        self,
        width: int,
        *,
        num_experts: int,
        experts_per_token: int,
        gates: Gates = "renormalised",
        scale: float = 1.0,
        groups: GroupLimit | None = None,
        selection_bias: bool = False,
        capacity_factor: float | None = None,
        evaluation_capacity_factor: float | None = None,
    ) -> None:
        """Makes a router.

        Args:
            width: Of the tokens.
            num_experts: E.
            experts_per_token: k.
            gates: "renormalised": the k probabilities sum to 1 (Mixtral), so that a mixture of equal experts equals
                one of them; "softmax": they are used as they are (Switch, OLMoE, DeepSeek-V2); "sigmoid": each expert
                is scored by itself; "sigmoid_renormalised": these made to sum to 1 (DeepSeek-V3).
            scale: Times the gates, at last (DeepSeek's routed scaling factor).
            groups: Limits a token's choice to a few groups of experts; None: all experts.
            selection_bias: Whether balance is kept by a bias on the choice (DeepSeek-V3), starting at 0.
            capacity_factor: In training an expert takes at most ceil(factor * T * k / E) tokens; None: all of them.
            evaluation_capacity_factor: The same in evaluation. None, as nearly always: a token's result then doesn't
                depend on the other tokens.

        Raises:
            ValueError: The numbers don't fit together, or the gates could not learn: one renormalised gate is
                always 1, so the router would get no gradient.
        """
        super().__init__()
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(f"experts_per_token must be 1..{num_experts} (num_experts), got {experts_per_token}")
        if experts_per_token == 1 and gates in ("renormalised", "sigmoid_renormalised"):
            raise ValueError(
                f"experts_per_token 1 with gates {gates!r} gives the router no gradient; "
                "allowed: experts_per_token >= 2, or gates 'softmax' or 'sigmoid'"
            )
        factors = {"capacity_factor": capacity_factor, "evaluation_capacity_factor": evaluation_capacity_factor}
        for name, factor in factors.items():
            if factor is not None and factor <= 0:
                raise ValueError(f"{name} must be positive or null, got {factor}")
        if scale <= 0:
            raise ValueError(f"scale must be positive, got {scale}")
        if groups is not None:
            groups.check(num_experts=num_experts, experts_per_token=experts_per_token)
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.normalisation: Gates = gates
        self.scale, self.groups = scale, groups
        self.capacity_factor, self.evaluation_capacity_factor = capacity_factor, evaluation_capacity_factor
        self.logits = nn.Linear(width, num_experts, bias=False)
        self.register_buffer("selection_bias", torch.zeros(num_experts) if selection_bias else None)

    def init_weights(self) -> None:
        """Small, so that training starts from a nearly uniform choice."""
        nn.init.normal_(self.logits.weight, std=0.02)

    def forward(self, x: Float[Tensor, "T D"]) -> Routing:
        """Routes real tokens; the caller leaves padding out."""
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(x.float(), self.logits.weight.float())
            sigmoid = self.normalisation in ("sigmoid", "sigmoid_renormalised")
            scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
            experts = self._choose(scores.detach())
            gates = scores.gather(-1, experts)
            if self.normalisation in ("renormalised", "sigmoid_renormalised"):
                # The addend is far below rounding; it only keeps a row of vanished sigmoids from 0 / 0.
                gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
            gates = gates if self.scale == 1 else gates * self.scale
            probabilities = scores / (scores.sum(-1, keepdim=True) + 1e-20) if sigmoid else scores
            factor = self.capacity_factor if self.training else self.evaluation_capacity_factor
            dropped = gates.new_zeros(())
            if factor is not None:
                kept = within_capacity(experts, num_experts=self.num_experts, factor=factor)
                gates = gates * kept
                dropped = 1 - kept.float().mean() if len(x) else dropped
            return Routing(experts=experts, gates=gates, logits=logits, probabilities=probabilities, dropped=dropped)

    def _choose(self, scores: Float[Tensor, "T E"]) -> Int[Tensor, "T k"]:
        if self.selection_bias is not None:
            scores = scores + self.selection_bias.float()
        if self.groups is not None:
            scores = self.groups.mask(scores)
        return scores.topk(self.experts_per_token, dim=-1).indices
