"""Cross-entropy over a large vocabulary without ever holding all the logits."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunked_cross_entropy(
    hidden: Float[Tensor, "T D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, " T"], *, chunk: int = 1024
) -> Float[Tensor, ""]:
    """`F.cross_entropy(hidden @ weight.T, targets)`, a few tokens at a time.

    Gradients are made on the way forward, chunk by chunk, so that backward only scales them: never more than
    chunk x V logits exist, and none is computed twice (as in Hsu et al. 2024, Liger Kernel).

    Args:
        hidden: What the output layer sees, one vector a token.
        weight: Of the output layer.
        targets: True tokens.
        chunk: Tokens whose logits exist at once.

    Raises:
        ValueError: `chunk` is below 1, or there is no token.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if len(targets) == 0:
        raise ValueError("targets must hold at least 1 token, got 0")
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            part, true = hidden[start : start + chunk], targets[start : start + chunk, None]
            scores = (part @ weight.T.to(part.dtype)).float()
            log_sum = scores.logsumexp(-1, keepdim=True)
            loss += (log_sum - scores.gather(1, true)).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            slope = scores.sub_(log_sum).exp_()
            slope.scatter_add_(1, true, torch.full_like(true, -1, dtype=slope.dtype))
            slope = slope.div_(len(hidden)).to(part.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = slope @ weight.to(part.dtype)
            if grad_weight is not None:
                grad_weight += slope.T @ part
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss / len(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """The gradients that forward made, times the loss's own."""
        for_hidden, for_weight = (None if made is None else made * grad for made in ctx.saved_tensors)
        return for_hidden, for_weight, None, None
