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
    if not torch.is_grad_enabled():  # the function below would still make gradients for whatever could take one
        hidden, weight = hidden.detach(), weight.detach()
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        kind = hidden.device.type
        # As autocast would, but once, not once a chunk and product.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        table = weight.to(dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            part, true = hidden[start : start + chunk].to(dtype), targets[start : start + chunk, None]
            scores = (part @ table.T).float().log_softmax(-1)
            loss -= scores.gather(1, true).sum()
            if not (need_hidden or need_weight):
                continue
            slope = scores.exp_().scatter_add_(1, true, scores.new_full((1, 1), -1.0).expand_as(true)).to(dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = slope @ table
            if not need_weight:
                continue
            if grad_weight is None:
                grad_weight = (slope.T @ part).float()
            elif dtype == torch.float32:
                grad_weight.addmm_(slope.T, part)
            else:
                grad_weight += slope.T @ part
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.tokens = len(hidden)
        return loss / len(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """The gradients that forward made, times the loss's own."""
        share = grad / ctx.tokens
        for_hidden, for_weight = (None if made is None else made * share.to(made.dtype) for made in ctx.saved_tensors)
        return for_hidden, for_weight, None, None
