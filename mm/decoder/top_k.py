"""Exact top-k attention: a query mixes the values of its k best keys and of no others."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mm.attention import Full, Mask, Paged

QUERIES_AT_ONCE = 256


def top_k_attention(
    q: Float[Tensor, "B M H K"],
    k: Float[Tensor, "B N H K"],
    v: Float[Tensor, "B N H W"],
    *,
    top_k: int,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B M H W"]:
    """Softmax over the `top_k` highest scores of each query and head (Gupta et al. 2021).

    Of equal scores the earlier key counts as higher, so that the result is the same everywhere. A query that sees
    fewer keys than `top_k` reads those; at `top_k` = N it is full attention.

    What it costs: every score is computed and sorted, so time is O(M N (K + log N)) and *more* than full attention's.
    What it saves is memory: 256 queries are scored at a time, and the backward pass keeps top_k weights and gathered
    values a query, O(M top_k W), where plain attention keeps O(M N). Against `attend`, whose kernels keep neither,
    it saves nothing: it is here for the sparse pattern, not for speed.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        top_k: Keys a query reads; above N is as N.
        mask: Which keys may be chosen, any but `Paged`; None for all.
        scale: Factor on the scores; None for 1 / sqrt(K).

    Returns:
        One vector a query and head; zeros where a query sees no key.

    Raises:
        ValueError: `top_k` is below 1, or the mask is paged.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if isinstance(mask, Paged):
        raise ValueError("mask must be any but Paged for top-k attention, got Paged")
    seen = (mask or Full()).dense(q.shape[1], k.shape[1]).to(q.device)[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    top_k = min(top_k, k.shape[2])
    rows = zip(torch.split(q, QUERIES_AT_ONCE, dim=2), torch.split(seen, QUERIES_AT_ONCE, dim=2), strict=True)
    return torch.cat([_rows(part, k, v, may, top_k) for part, may in rows], dim=2).transpose(1, 2)


def _rows(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, top_k: int) -> Float[Tensor, "B H M W"]:
    scores = (q @ k.transpose(-1, -2)).masked_fill(~seen, -math.inf)
    best = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    some = seen.any(-1, keepdim=True)
    # A query without keys gets finite scores, and what it reads is thrown away: no NaN, forward or backward.
    weights = scores.gather(-1, best).masked_fill(~some, 0).softmax(-1)
    batch, heads, queries, _ = best.shape
    values = v.gather(2, best.flatten(2)[..., None].expand(-1, -1, -1, v.shape[-1]))
    mixed = (weights[..., None, :] @ values.view(batch, heads, queries, top_k, -1))[..., 0, :]
    return mixed.masked_fill(~some, 0)
