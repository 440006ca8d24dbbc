"""How many parameters a model has, and how many of them one token meets."""

from dataclasses import dataclass

from torch import nn

from mm.decoder.experts import MixtureOfExperts


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a module.

    Attributes:
        total: All of them; a shared tensor once.
        active: Those that one token meets: all but the routed experts that it doesn't visit. (A whole embedding table
            counts as met, as is usual.)
    """

    total: int
    active: int


def parameter_counts(module: nn.Module) -> ParameterCounts:
    """Counts, from the module itself."""
    total = sum(parameter.numel() for parameter in module.parameters())
    idle = 0
    for layer in module.modules():
        if isinstance(layer, MixtureOfExperts):
            one = sum(parameter[0].numel() for parameter in layer.experts.parameters())
            idle += (layer.experts.num_experts - layer.router.experts_per_token) * one
    return ParameterCounts(total, total - idle)
