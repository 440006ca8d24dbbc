"""Small parts that several encoders use."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def init_weights(module: nn.Module) -> None:
    """Truncated normal (sd 0.02) for Linear and Embedding, zero bias; use as `network.apply(init_weights)`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.06, b=0.06)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def masked_mean(values: Float[Tensor, "*batch N D"], mask: Bool[Tensor, "*batch N"]) -> Float[Tensor, "*batch D"]:
    """Mean over the marked tokens; zeros where none is marked."""
    weight = mask.unsqueeze(-1).to(values.dtype)
    return (values.masked_fill(~mask.unsqueeze(-1), 0)).sum(-2) / weight.sum(-2).clamp(min=1)


def all_valid(values: Float[Tensor, "B N D"]) -> Bool[Tensor, "B N"]:
    """The mask of tokens without padding."""
    return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
