"""How often each of a few numbers occurs, without waiting for a device."""

import torch
from jaxtyping import Int
from torch import Tensor


def tally(numbers: Int[Tensor, " A"], size: int) -> Int[Tensor, " E"]:
    """How often each of 0..size - 1 occurs; there must be no others.

    What `torch.bincount` gives, which on CUDA asks for the least and the greatest number first: the host would wait
    twice in every layer, and no CUDA graph could be made of a step.
    """
    return numbers.new_zeros(size).scatter_add_(0, numbers, torch.ones_like(numbers))
