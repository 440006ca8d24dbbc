"""How well a mixture uses its experts, in numbers that fit on one line of a log."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.decoder.router import Routing
from mm.decoder.tally import tally


@dataclass(frozen=True)
class RoutingHealth:
    """One step's routing in all layers. Nothing here has a gradient, and nothing waits for the device.

    Attributes:
        load_variation: Coefficient of variation of the experts' load (standard deviation over mean), mean over
            layers; 0: all busy alike.
        dropped: Share of the choices dropped for capacity, mean over layers.
        dead: How many experts of all layers no token chose.
        entropy: Mean entropy of the router's probabilities over log E, mean over layers; 1: it doesn't care, 0: it is
            always sure.
    """

    load_variation: Float[Tensor, ""]
    dropped: Float[Tensor, ""]
    dead: Float[Tensor, ""]
    entropy: Float[Tensor, ""]


@torch.no_grad()
def routing_health(routings: Sequence[Routing]) -> RoutingHealth:
    """The health of one step; of no tokens at all it is all zeros but `dead`."""
    load = torch.stack([routing.load for routing in routings])
    num_experts = load.shape[1]
    mean = load.mean(-1).clamp(min=torch.finfo(load.dtype).tiny)
    most = torch.tensor(float(max(num_experts, 2))).log().item()
    return RoutingHealth(
        load_variation=(load.std(-1, correction=0) / mean).mean(),
        dropped=torch.stack([routing.dropped for routing in routings]).mean(),
        dead=(load == 0).float().sum(),
        entropy=torch.stack([routing.entropy for routing in routings]).mean() / most,
    )


@torch.no_grad()
def visits(routing: Routing, groups: Int[Tensor, " T"], *, num_groups: int) -> Int[Tensor, "G E"]:
    """How often tokens of each group (a finding, a modality) chose each expert; counts add up over batches.

    Args:
        routing: Of T tokens.
        groups: The group of each token, 0 to num_groups - 1.
        num_groups: G.
    """
    num_experts = len(routing.load)
    cells = groups[:, None] * num_experts + routing.experts
    return tally(cells.flatten(), num_groups * num_experts).view(num_groups, num_experts)
