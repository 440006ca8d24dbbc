"""Routing limited to a few groups of experts, so that a token's experts live on few devices."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class GroupLimit:
    """A token chooses among the experts of its best groups only.

    Attributes:
        groups: Into how many equal groups the experts are cut, in their order.
        kept: How many groups a token may choose from.
        score: What a group is worth: "max": its best expert (DeepSeek-V2, 2024); "top2": the sum of its two best
            (DeepSeek-V3, 2024).
    """

    groups: int
    kept: int
    score: Literal["max", "top2"] = "max"

    def check(self, *, num_experts: int, experts_per_token: int) -> None:
        """Raises ValueError where a router of these numbers could not be limited so."""
        if self.groups < 1 or num_experts % self.groups:
            raise ValueError(f"groups must divide num_experts {num_experts}, got {self.groups}")
        if not 1 <= self.kept <= self.groups:
            raise ValueError(f"kept must be 1..{self.groups} (groups), got {self.kept}")
        size = num_experts // self.groups
        if self.score == "top2" and size < 2:
            raise ValueError(f"score 'top2' needs groups of at least 2 experts, got {size}; allowed: 'max'")
        if experts_per_token > self.kept * size:
            raise ValueError(
                f"experts_per_token must be at most {self.kept * size} (kept groups of {size}), got {experts_per_token}"
            )

    def mask(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """The scores, -inf for the experts of the other groups."""
        grouped = scores.view(len(scores), self.groups, scores.shape[1] // self.groups)
        worth = grouped.amax(-1) if self.score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
        best = worth.topk(self.kept, dim=-1).indices
        barred = worth.new_ones(worth.shape).scatter(-1, best, 0.0).bool()
        return grouped.masked_fill(barred[..., None], float("-inf")).view_as(scores)
