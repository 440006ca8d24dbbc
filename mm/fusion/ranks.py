"""Rows of all processes of a run, with gradients: what a contrastive loss compares its own rows with."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def num_ranks() -> int:
    """Processes that train together; 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first_row(number: int) -> int:
    """Where this rank's rows begin among all ranks', each of which has `number`."""
    return 0 if num_ranks() == 1 else int(dist.get_rank()) * number


def gather_rows(rows: Shaped[Tensor, "N E"]) -> Shaped[Tensor, "M E"]:
    """The rows of all ranks, by rank; alone, the very tensor that was given.

    What the other ranks' losses say of this rank's rows comes back to it, so that the mean of the ranks' gradients
    is the gradient of the whole batch. Every rank must call it, forward and backward, with as many rows.
    """
    if num_ranks() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows.contiguous())
    return gathered


def gather_values(values: Shaped[Tensor, " N *more"]) -> Shaped[Tensor, " M *more"]:
    """Labels of all ranks' rows, by rank; no gradient."""
    if num_ranks() == 1:
        return values
    found = [torch.empty_like(values) for _ in range(num_ranks())]
    dist.all_gather(found, values.contiguous())
    return torch.cat(found)


def largest(values: Shaped[Tensor, " *any"]) -> Shaped[Tensor, " *any"]:
    """The largest over all ranks, place by place."""
    if num_ranks() == 1:
        return values
    found = values.clone()
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found


class _GatherRows(torch.autograd.Function):
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
        start = first_row(ctx.number)
        return total[start : start + ctx.number]
