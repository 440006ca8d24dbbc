"""Contrastive losses together with their slopes: the matrix of logits is made, read and overwritten once.

Left to autograd, every step over the matrix keeps a copy and is walked back by another; with a batch of thousands these
copies, not the products, are what a step costs. The slopes are known in closed form, so the forward pass takes them
along and nothing of the matrix's size is kept.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

FLOOR: Final = 1e-26
"""Sums of exponentials below it have lost digits to the smallest float32, and are taken anew with a shift each."""

Slopes = tuple[Tensor, Tensor, Tensor]


class SymmetricCrossEntropy(torch.autograd.Function):
    """Mean of cross-entropies along rows and along columns of scale * first @ second.T; see `symmetric`."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, scale: Tensor, share: Tensor | None) -> Tensor:
        """The loss; keeps its slopes."""
        number = len(first)
        # No logit is larger. One shift for all instead of one a row and one a column: one exponential instead of two.
        most = scale * first.norm(dim=1).max() * second.norm(dim=1).max()
        logits = torch.addmm(-most.expand(1, number), scale * first, second.T)
        wanted = logits.diagonal().sum() if share is None else (logits * share).sum()
        slope = logits.exp_()
        rows, columns = slope.sum(1), slope.sum(0)
        if bool(torch.minimum(rows, columns).min() > FLOOR):
            over = rows.log().sum() + columns.log().sum()
            slope.mul_((0.5 / rows)[:, None] + 0.5 / columns)
        else:
            logits = torch.addmm(-most.expand(1, number), scale * first, second.T)
            by_row, by_column = logits.logsumexp(1, keepdim=True), logits.logsumexp(0, keepdim=True)
            over = by_row.sum() + by_column.sum()
            slope = ((logits - by_row).exp() + (logits - by_column).exp()) / 2
        if share is None:
            slope.diagonal().sub_(1)
        else:
            slope.sub_(share)
        ctx.save_for_backward(*_slopes(slope, first, second, scale, number))
        return (over / 2 - wanted) / number

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The slopes, times what comes from behind."""
        return (*(gradients[0] * item for item in ctx.saved_tensors), None)


class PairwiseSigmoid(torch.autograd.Function):
    """Sum of -log sigmoid(+-(scale * first @ second.T + bias)), plus where a pair is; see `sigmoid_pairs`."""

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor,
        scale: Tensor,
        bias: Tensor,
        start: int,
        pairs: Tensor | None,
        counted: Tensor | None,
    ) -> Tensor:
        """The loss; keeps its slopes."""
        logits = torch.addmm(bias.expand(1, len(second)), scale * first, second.T)
        _turn(logits, pairs, start)
        each = F.softplus(logits)
        slope = _turn(logits.sigmoid_(), pairs, start)
        if counted is not None:
            each.mul_(counted)
            slope.mul_(counted)
        ctx.save_for_backward(*_slopes(slope, first, second, scale, 1), slope.sum())
        return each.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The slopes, times what comes from behind."""
        return (*(gradients[0] * item for item in ctx.saved_tensors), None, None, None)


def symmetric(
    first: Float[Tensor, "N E"],
    second: Float[Tensor, "N E"],
    *,
    scale: Float[Tensor, ""],
    share: Float[Tensor, "N N"] | None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of scaled cosines over both directions, at least one row.

    Args:
        first: Rows.
        second: Columns.
        scale: Factor on their products.
        share: Symmetric; the target's mass by row. None: all of it on the diagonal.
    """
    loss: Tensor = SymmetricCrossEntropy.apply(first, second, scale, share)
    return loss


def sigmoid_pairs(
    first: Float[Tensor, "N E"],
    second: Float[Tensor, "M E"],
    *,
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    start: int,
    pairs: Bool[Tensor, "N M"] | None,
    counted: Bool[Tensor, "N M"] | None,
) -> Float[Tensor, ""]:
    """Sum of every row's and column's own sigmoid loss.

    Args:
        first: Rows.
        second: Columns.
        scale: Factor on their products.
        bias: Added to each.
        start: The column of the first row's own partner.
        pairs: Which belong together; None: each row and its own partner.
        counted: Which are summed; None: all.
    """
    loss: Tensor = PairwiseSigmoid.apply(first, second, scale, bias, start, pairs, counted)
    return loss


def _slopes(slope: Tensor, first: Tensor, second: Tensor, scale: Tensor, number: int) -> Slopes:
    """Of the embeddings and the scale, from that of the logits."""
    along = slope @ second
    by_scale = (first * along).sum() / number
    return along.mul_(scale / number), (slope.T @ first).mul_(scale / number), by_scale


def _turn(values: Tensor, pairs: Tensor | None, start: int) -> Tensor:
    """Changes the sign where a pair is, in place."""
    if pairs is None:
        values.diagonal(start).neg_()
        return values
    return values.mul_(torch.where(pairs, -1.0, 1.0))
