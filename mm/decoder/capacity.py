"""Which choices an expert of limited room still takes."""

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mm.decoder.tally import tally


def within_capacity(experts: Int[Tensor, "T k"], *, num_experts: int, factor: float) -> Bool[Tensor, "T k"]:
    """True where the expert still had room: it takes ceil(factor * T * k / E) choices (Switch, Fedus et al. 2021).

    First choices go before second ones (GShard, Lepikhin et al. 2020), early tokens before late.
    """
    capacity = math.ceil(factor * experts.numel() / num_experts)
    queue = experts.T.flatten()
    order = queue.argsort(stable=True)
    counts = tally(queue, num_experts)
    first = counts.cumsum(0) - counts
    # How many stand before each in its expert's own queue; sorting finds it without a table of choices by experts.
    before = torch.empty_like(queue)
    before[order] = torch.arange(len(queue), device=queue.device) - first[queue[order]]
    return (before < capacity).view(experts.shape[1], -1).T
