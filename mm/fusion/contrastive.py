"""Contrastive losses on unit vectors: symmetric InfoNCE, and InfoNCE with a squared distance beside it."""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class LogitScale(nn.Module):
    """A learnable inverse temperature that never exceeds a bound (Radford et al. 2021, CLIP: 100).

    Args:
        temperature: To start from.
        max_scale: The bound.
    """

    def __init__(self, *, temperature: float = 0.07, max_scale: float = 100.0) -> None:
        super().__init__()
        if temperature <= 0 or 1 / temperature > max_scale:
            raise ValueError(f"temperature must be at least 1 / max_scale = {1 / max_scale:g}, got {temperature}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.max_log_scale = math.log(max_scale)

    def forward(self) -> Float[Tensor, ""]:
        """The factor on cosines."""
        return self.log_scale.clamp(max=self.max_log_scale).exp()


def info_nce(
    first: Float[Tensor, "N E"],
    second: Float[Tensor, "N E"],
    *,
    scale: Float[Tensor, ""] | float,
    valid: Bool[Tensor, " N"] | None = None,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE (van den Oord et al. 2018; Radford et al. 2021): row i of one belongs to row i of the other.

    Rows of all ranks are each other's negatives; every rank must have the same N. The mean of the ranks' losses is
    the loss of the whole batch.

    Args:
        first: Unit vectors of this rank.
        second: Their partners.
        scale: Inverse temperature.
        valid: Pairs that exist; the others are neither positives nor negatives. None: all.

    Returns:
        Mean over the valid rows of both directions; 0 where there is none.
    """
    real = torch.ones(len(first), dtype=torch.bool, device=first.device) if valid is None else valid
    all_first, all_second, all_real, start = _gather(first, second, real)
    labels = torch.arange(len(first), device=first.device) + start
    losses = []
    for rows, columns in ((first, all_second), (second, all_first)):
        logits = scale * rows.float() @ columns.float().T
        # An invalid row keeps its own column, so that its (unused) softmax is finite.
        own = labels[:, None] == torch.arange(len(columns), device=rows.device)
        logits = logits.masked_fill(~all_real & ~own, -torch.inf)
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
    each = torch.stack(losses).mean(0) * real
    return each.sum() / (all_real.sum() * len(first) / len(all_first)).clamp(min=1e-9)


def contrastive_mse(
    first: Float[Tensor, "N E"],
    second: Float[Tensor, "N E"],
    *,
    scale: Float[Tensor, ""] | float,
    lambda1: float = 1.0,
    lambda2: float = 1.0,
    valid: Bool[Tensor, " N"] | None = None,
) -> Float[Tensor, ""]:
    """lambda1 * InfoNCE + lambda2 * mean squared difference of the partners' unit vectors.

    Args:
        first: Unit vectors.
        second: Their partners.
        scale: Inverse temperature of InfoNCE.
        lambda1: Weight of InfoNCE.
        lambda2: Weight of the squared difference (mean over dimensions and pairs).
        valid: As in `info_nce`.
    """
    real = torch.ones(len(first), dtype=torch.bool, device=first.device) if valid is None else valid
    squared = (first.float() - second.float()).square().mean(-1) * real
    distance = squared.sum() / real.sum().clamp(min=1)
    return lambda1 * info_nce(first, second, scale=scale, valid=valid) + lambda2 * distance


def _gather(first: Tensor, second: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """The rows of all ranks, with gradients, and where this rank's begin."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return first, second, real, 0
    flags = [torch.empty_like(real) for _ in range(dist.get_world_size())]
    dist.all_gather(flags, real)
    all_first, all_second = (_GatherRows.apply(item.contiguous()) for item in (first, second))
    return all_first, all_second, torch.cat(flags), dist.get_rank() * len(first)


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks; what the other ranks' losses say of this rank's rows comes back to it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.number = len(rows)
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.number
        return total[start : start + ctx.number]
