"""Small parts that several encoders use."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mm.batch import Tokens
from mm.transformer import masked_mean as masked_mean


def init_weights(module: nn.Module) -> None:
    """Truncated normal (sd 0.02) for Linear and Embedding, zero bias; use as `network.apply(init_weights)`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.06, b=0.06)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def all_valid(values: Float[Tensor, "B N D"]) -> Bool[Tensor, "B N"]:
    """The mask of tokens without padding."""
    return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)


def pooled(grid: Float[Tensor, "N D y x"], token_grid: tuple[int, int]) -> Tokens:
    """Tokens of a map of features, so many along y and x, row by row: each the mean of its cells."""
    values = F.adaptive_avg_pool2d(grid, token_grid).flatten(2).transpose(1, 2)
    return Tokens(values, all_valid(values))
