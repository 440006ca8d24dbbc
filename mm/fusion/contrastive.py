"""Contrastive losses on unit vectors: symmetric InfoNCE, and the squared distance that may stand beside it.

Texts that are the same word by word are no negatives of one another: see `text_numbers` and the argument `same`.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mm.batch import Padded
from mm.fusion.ranks import first_row, gather_rows, gather_values, largest, num_ranks
from mm.fusion.slopes import symmetric


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
    same: Int[Tensor, " N"] | None = None,
    targets: Float[Tensor, "N M"] | None = None,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE (van den Oord et al. 2018; Radford et al. 2021): row i of one belongs to row i of the other.

    Rows of all ranks are each other's negatives; every rank must have the same N. The mean of the ranks' losses is
    the loss of the whole batch. Where several pairs have the same partner, the target's mass is shared among them
    (Yang et al. 2022, UniCL). Where their vectors are the same as well, the sum over the rows is that of a target
    apiece: what one row gains by sharing, another loses.

    Args:
        first: Unit vectors of this rank.
        second: Their partners.
        scale: Inverse temperature.
        valid: Pairs that exist; the others are neither positives nor negatives. None: all.
        same: Pairs of an equal number are positives of one another; see `text_numbers`. None: each is its own.
        targets: In the place of `same`: each row's mass over all ranks' columns, see `mm.fusion.soft`.

    Returns:
        Mean over the valid rows of both directions; 0 where there is none.
    """
    # Half precision would round a logit of 50 by a quarter.
    with torch.autocast(first.device.type, enabled=False):
        first, second = first.float(), second.float()
        factor = torch.as_tensor(scale, dtype=torch.float32, device=first.device)
        if num_ranks() > 1:
            return _across_ranks(first, second, scale=factor, valid=valid, same=same, targets=targets)
        if valid is not None:
            first, second, same = first[valid], second[valid], None if same is None else same[valid]
            targets = None if targets is None else targets[valid][:, valid]
        if len(first) == 0:
            return 0.0 * (first.sum() + second.sum() + factor)
        if targets is not None:
            return symmetric(first, second, scale=factor, share=(targets + targets.T) / 2)
        return symmetric(first, second, scale=factor, share=None if same is None else _share(positives(same, None)))


def _across_ranks(
    first: Float[Tensor, "N E"],
    second: Float[Tensor, "N E"],
    *,
    scale: Float[Tensor, ""],
    valid: Bool[Tensor, " N"] | None,
    same: Int[Tensor, " N"] | None,
    targets: Float[Tensor, "N M"] | None,
) -> Float[Tensor, ""]:
    """This rank's rows against all ranks' columns, in both directions."""
    one = (scale * first) @ gather_rows(second).T
    other = (scale * second) @ gather_rows(first).T
    positive = own_pairs(first)
    if valid is not None:
        # An invalid row keeps its own column, so that its (unused) softmax is finite.
        out = ~gather_values(valid) & ~positive
        one, other = one.masked_fill(out, -torch.inf), other.masked_fill(out, -torch.inf)
    if same is not None:
        positive = positive | positives(same, valid)
    share = _share(positive) if targets is None else targets
    each = [logits.logsumexp(1) - (logits.masked_fill(share == 0, 0) * share).sum(1) for logits in (one, other)]
    return mean_of_valid(torch.stack(each).mean(0), valid)


def _share(positive: Bool[Tensor, "N M"]) -> Float[Tensor, "N M"]:
    """Each row's mass of 1 in equal parts."""
    return positive / positive.sum(1, keepdim=True)


def squared_distance(
    first: Float[Tensor, "N E"], second: Float[Tensor, "N E"], *, valid: Bool[Tensor, " N"] | None = None
) -> Float[Tensor, ""]:
    """Mean squared difference of partners, over dimensions and the valid pairs of all ranks."""
    return mean_of_valid((first.float() - second.float()).square().mean(-1), valid)


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
    distance = squared_distance(first, second, valid=valid)
    return lambda1 * info_nce(first, second, scale=scale, valid=valid) + lambda2 * distance


def text_numbers(text: Padded) -> Int[Tensor, " M"] | None:
    """A number for each text, equal where the token ids are, over all ranks; None where all texts differ."""
    ids = text.values.masked_fill(~text.mask, -1)
    longest = int(largest(torch.tensor(ids.shape[1], device=ids.device)))
    ids = F.pad(ids, (0, longest - ids.shape[1]), value=-1)
    distinct, numbers = torch.unique(gather_values(ids), dim=0, return_inverse=True)
    if len(distinct) == len(numbers):
        return None
    start = first_row(len(ids))
    own: Tensor = numbers[start : start + len(ids)]
    return own


def own_pairs(rows: Float[Tensor, "N E"]) -> Bool[Tensor, "N M"]:
    """Where this rank's rows meet their own partners among all ranks' columns."""
    columns = torch.arange(len(rows) * num_ranks(), device=rows.device)
    return columns == columns[first_row(len(rows)) :][: len(rows), None]


def positives(same: Int[Tensor, " N"], valid: Bool[Tensor, " N"] | None) -> Bool[Tensor, "N M"]:
    """Where this rank's valid rows meet valid columns of the same number."""
    found = same[:, None] == gather_values(same)
    return found if valid is None else found & valid[:, None] & gather_values(valid)


def num_valid(rows: Float[Tensor, "N E"], valid: Bool[Tensor, " N"] | None) -> Float[Tensor, ""]:
    """Valid rows of a rank in the mean over all ranks; hardly more than nothing where there is none."""
    if valid is None:
        return torch.tensor(float(len(rows)), device=rows.device)
    return (gather_values(valid).sum() / num_ranks()).clamp(min=1e-9)


def mean_of_valid(each: Float[Tensor, " N"], valid: Bool[Tensor, " N"] | None) -> Float[Tensor, ""]:
    """Mean over valid rows, such that the mean over ranks is that of all rows; 0 where there is none."""
    kept = each if valid is None else each * valid
    return kept.sum() / num_valid(each[:, None], valid)
