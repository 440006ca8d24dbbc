"""SigLIP: every pair of the batch is a question of its own, do these two belong together?

Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (ICCV 2023).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mm.fusion.contrastive import num_valid, own_pairs, positives
from mm.fusion.ranks import first_row, gather_rows, gather_values
from mm.fusion.slopes import sigmoid_pairs


class LogitBias(nn.Module):
    """A learnable bias on logits. At -10 a fresh model says "no" to nearly everything, as most pairs deserve.

    The paper starts the temperature at 0.1 beside it.
    """

    def __init__(self, value: float = -10.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(value))

    def forward(self) -> Float[Tensor, ""]:
        """The bias."""
        return self.bias


def siglip(
    first: Float[Tensor, "N E"],
    second: Float[Tensor, "N E"],
    *,
    scale: Float[Tensor, ""] | float,
    bias: Float[Tensor, ""] | float,
    valid: Bool[Tensor, " N"] | None = None,
    same: Int[Tensor, " N"] | None = None,
) -> Float[Tensor, ""]:
    """Sigmoid loss: row i of one belongs to row i of the other, and to no other row of any rank.

    Args:
        first: Unit vectors of this rank; every rank must have the same N.
        second: Their partners.
        scale: Inverse temperature.
        bias: Added to every logit.
        valid: Pairs that exist; the others are neither positives nor negatives. None: all.
        same: Pairs of an equal number are positives of one another; see `text_numbers`. None: each is its own.

    Returns:
        Sum over all pairs of rows, divided by the number of valid rows; 0 where there is none.
    """
    pairs = None if same is None else own_pairs(first) | positives(same, valid)
    counted = None if valid is None else valid[:, None] & gather_values(valid)
    with torch.autocast(first.device.type, enabled=False):
        total = sigmoid_pairs(
            first.float(),
            gather_rows(second).float(),
            scale=torch.as_tensor(scale, dtype=torch.float32, device=first.device),
            bias=torch.as_tensor(bias, dtype=torch.float32, device=first.device),
            start=first_row(len(first)),
            pairs=pairs,
            counted=counted,
        )
    return total / num_valid(first, valid)
