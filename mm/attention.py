"""Attention behind one function; what may be seen is a `Mask` (`mm.masks`, `mm.paged_masks`; to be imported from here).

`attend` takes [B M H K] tensors. On CUDA it runs xFormers' memory-efficient kernels, elsewhere and where they have
none PyTorch's scaled dot-product attention on the dense mask. A query that may see no key yields zeros.

Keys and values may have fewer heads than queries: each is then read by a group of neighbouring query heads
(grouped-query attention, Ainslie et al. 2023). They are never copied where one query a row is decoded nor in
xFormers' forward; they are copied for each reader in training, for its kernels know no grouped backward.
"""

import importlib.util
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mm.masks import Causal, Full, Keys, Mask, Packed, Window, additive
from mm.paged_masks import Mixed, Paged, Visible

__all__ = [
    "Causal",
    "Full",
    "Keys",
    "Mask",
    "Mixed",
    "Packed",
    "Paged",
    "Visible",
    "Window",
    "additive",
    "attend",
]

SPLIT_K_WIDTHS = (16, 32, 64, 128, 256, 512)
"""Head widths that xFormers' paged kernel (Triton split-K) is written for."""
SPLIT_K_QUERIES = 16
SPLIT_K_CAPABILITY = (8, 0)
KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
SPLIT_K_PAGE = 64
WIDEST = 256
"""Head width up to which the half-precision kernel goes; wider heads are left to PyTorch."""
FEW_QUERIES = 16
"""Up to so many queries a key head, float32 attention on a CPU is two products, where keys lie head by head."""
WRITTEN_OUT_SCORES = 512 * 512
"""Up to so many scores a head, bfloat16 attention on a CPU is written out; beyond, memory matters more."""


def attend(
    q: Float[Tensor, "B M H K"],
    k: Float[Tensor, "C N G K"],
    v: Float[Tensor, "C N G W"],
    *,
    mask: Visible,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B M H W"]:
    """Scaled dot-product attention (Vaswani et al. 2017) under a mask.

    Args:
        q: Queries.
        k: Keys; C is B, or 1 for a pool of pages. Query head h reads their head h // (H / G).
        v: Values.
        mask: Which keys each query sees.
        scale: Factor on the scores; None for 1 / sqrt(K).
        dropout: Probability with which an attention weight is dropped. Pass 0 in evaluation.

    Returns:
        One vector a query and head; zeros where a query sees no key.

    Raises:
        ValueError: H is no multiple of G.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key heads, got {q.shape[2]} and {k.shape[2]}")
    if isinstance(mask, Mixed):
        options: dict[str, Any] = {"scale": scale, "dropout": dropout}
        rows = q.flatten(0, 1)[None]
        parts = [attend(*own_q, *kv, mask=own, **options) for own_q, kv, own in mask.parts([rows], [k, v])]
        return mask.joined(parts).view(*q.shape[:3], -1)
    if q.is_cuda and _ops() is not None:
        result = _attend_xformers(q, k, v, mask=mask, scale=scale, dropout=dropout)
        if result is not None:
            return result
    return _attend_dense(q, k, v, mask=mask, scale=scale, dropout=dropout)


def _attend_dense(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float | None, dropout: float
) -> Float[Tensor, "B M H W"]:
    """PyTorch's own attention on the dense mask; works on every device."""
    if isinstance(mask, Packed):
        # Sequence by sequence: the dense mask of all of them grows with the square of their total length.
        own, keys = list(mask.queries), list(mask.key_lengths)
        rows = zip(torch.split(q, own, 1), torch.split(k, keys, 1), torch.split(v, keys, 1), strict=True)
        parts = [_attend_dense(*row, mask=mask.within, scale=scale, dropout=dropout) for row in rows]
        return torch.cat(parts, dim=1)
    if isinstance(mask, Paged):
        return _attend_pages(q, k, v, mask=mask, scale=scale, dropout=dropout)
    seen = None
    written_out = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[1] * k.shape[1] <= WRITTEN_OUT_SCORES
    # A square needs no table, and what it hides is then not computed either.
    triangle = isinstance(mask, Causal) and 1 < q.shape[1] == k.shape[1] and not written_out
    if not isinstance(mask, Full) and not triangle:
        seen = mask.dense(q.shape[1], k.shape[1])[:, None].to(q.device)
    return _attend_grouped(q, k, v, seen=seen, sighted=mask.sighted, triangle=triangle, scale=scale, dropout=dropout)


def _attend_pages(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Paged, scale: float | None, dropout: float
) -> Float[Tensor, "B M H W"]:
    """Each row's pages are copied side by side; rows of like length together, so that little is copied for nothing."""
    pools = [pool.view(-1, mask.page_size, *pool.shape[2:]) for pool in (k, v)]
    alike, sighted = mask.alike(q.shape[1]), min(mask.counts) >= q.shape[1]
    plain = sighted and q.dtype == torch.float32
    out = None
    for some in alike:
        own = [pool.index_select(0, some.blocks).view(some.rows.shape[0], -1, *pool.shape[2:]) for pool in pools]
        seen = some.bias if plain else some.seen
        rows = q if len(alike) == 1 else q.index_select(0, some.rows)
        mixed = _attend_grouped(rows, *own, seen=seen, sighted=sighted, scale=scale, dropout=dropout)
        if len(alike) == 1:
            return mixed
        out = mixed.new_empty(q.shape[0], *mixed.shape[1:]) if out is None else out
        out.index_copy_(0, some.rows, mixed)
    assert out is not None, "no row"
    return out


def _attend_grouped(
    q: Tensor, k: Tensor, v: Tensor, *, seen: Tensor | None, sighted: bool, triangle: bool = False, **options: Any
) -> Float[Tensor, "B M H W"]:
    """As many heads of keys as of queries, or fewer."""
    heads, readers = k.shape[2], q.shape[2] // k.shape[2]
    if q.shape[1] == 1:
        # Queries that share a key stand below one another, and keys and values are read in place.
        together = q.reshape(len(q), heads, readers, -1)
        out = _attend_heads(together, k.transpose(1, 2), v.transpose(1, 2), seen=seen, sighted=sighted, **options)
        return out.reshape(len(q), 1, heads * readers, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, _repeated(k, readers), _repeated(v, readers)))
    return _attend_heads(q, k, v, seen=seen, sighted=sighted, triangle=triangle, **options).transpose(1, 2)


def _attend_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seen: Tensor | None,
    scale: float | None,
    dropout: float,
    sighted: bool,
    triangle: bool = False,
) -> Float[Tensor, "B H M W"]:
    """As many heads of keys as of queries, head by head.

    `seen` is [C 1 M N], or [C 1 1 N] for all queries alike: True where seen, or 0 there and -inf elsewhere (float32).
    """
    some = None
    if seen is not None and not sighted:
        some = seen.any(-1, keepdim=True)
        # A query without keys is shown them all, and what it reads is thrown away: no NaN, forward or backward.
        seen = seen | ~some
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] * k.shape[2] <= WRITTEN_OUT_SCORES:
        out = _attend_written_out(q, k, v, seen=seen, scale=scale, dropout=dropout)
    elif dropout == 0 and not triangle and q.is_cpu and q.shape[2] <= FEW_QUERIES and _in_one_piece(k, v):
        out = _attend_few(q, k, v, seen=seen, scale=scale)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=triangle, dropout_p=dropout, scale=scale
        )
    return out if some is None else out.masked_fill(~some, 0)


def _attend_few(
    q: Tensor, k: Tensor, v: Tensor, *, seen: Tensor | None, scale: float | None
) -> Float[Tensor, "B H M W"]:
    """Two batches of products: for few queries on a CPU in two thirds of the fused kernel's time."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(*q.shape[:3], -1)
    if seen is None:
        scores = scores * scale
    elif seen.dtype == torch.bool:
        scores = (scores * scale).masked_fill(~seen, -math.inf)
    else:
        scores = torch.add(seen, scores, alpha=scale)
    return torch.bmm(scores.softmax(-1).flatten(0, 1), v.flatten(0, 1)).view(*q.shape[:3], -1)


def _in_one_piece(*parts: Float[Tensor, "B H N _"]) -> bool:
    """Whether rows and heads are one batch of matrices, as `_attend_few` wants them."""
    return all(
        x.stride(3) == 1
        and x.stride(2) >= x.shape[3]
        and (x.shape[1] == 1 or len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1))
        for x in parts
    )


def _repeated(x: Tensor, readers: int) -> Float[Tensor, "C N H K"]:
    """Each head of keys or values once for every query head that reads it."""
    return x if readers == 1 else x.repeat_interleave(readers, dim=2)


def _attend_written_out(
    q: Tensor, k: Tensor, v: Tensor, *, seen: Tensor | None, scale: float | None, dropout: float
) -> Float[Tensor, "B H M W"]:
    """Two matrix products and a softmax.

    In bfloat16 on a CPU this trains 2 to 7 times faster than the fused kernel, whose backward pass is slow there.
    """
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if seen is not None:
        scores = scores + torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, -math.inf)
    return F.dropout(scores.softmax(-1), dropout, training=dropout > 0) @ v


def _attend_xformers(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float | None, dropout: float
) -> Float[Tensor, "B M H W"] | None:
    """XFormers' kernels on CUDA, or None where they have none for this case."""
    if isinstance(mask, Paged):
        return _attend_paged(q, k, v, mask=mask, scale=scale) if dropout == 0 else None
    if not _has_kernel(q, k, v, mask=mask):
        return None
    narrow = v.shape[3]
    if narrow < k.shape[3]:
        # The half-precision kernel wants equal widths (latent attention has narrower values): zeros are cut off again.
        v = F.pad(v, (0, k.shape[3] - narrow))
    try:
        out = _run_xformers(q, k, v, mask=mask, scale=scale, dropout=dropout)
    except NotImplementedError:
        # No kernel takes it after all: bfloat16 before Ampere, table biases and float32 after Hopper, widths that
        # don't fill 16 bytes, deterministic algorithms asked for.
        return None
    return out if out.shape[3] == narrow else out[..., :narrow]


def _has_kernel(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask) -> bool:
    """Whether xFormers is asked at all."""
    if max(q.shape[3], v.shape[3]) > WIDEST or q.dtype not in KERNEL_TYPES:
        return False
    if isinstance(mask, Keys):
        # One query a row: PyTorch's attention reads grouped keys in place, these kernels would want copies.
        return q.shape[1] > 1 or q.shape[2] == k.shape[2]
    if isinstance(mask, Packed):
        return all(width > 0 for height, width in zip(mask.queries, mask.key_lengths, strict=True) if height > 0)
    if isinstance(mask, Window) and q.dtype == torch.float32:
        # Only the half-precision kernel knows a two-sided window, or the gradient of any.
        return mask.right == 0 and not _learns(q, k, v)
    return isinstance(mask, Full | Causal | Window)  # nobody knows a mask of another room, such as a written-out table


def _run_xformers(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float | None, dropout: float
) -> Float[Tensor, "B M H W"]:
    """Values as wide as keys, or wider."""
    readers = q.shape[2] // k.shape[2]
    grouped = readers > 1 and not isinstance(mask, Keys) and not _learns(q, k, v)
    if not grouped:
        k, v = _repeated(k, readers), _repeated(v, readers)
    options = {"scale": scale, "p": dropout}
    kernel: Callable[..., Tensor] = _ops().memory_efficient_attention

    def run(q: Tensor, attn_bias: object = None) -> Tensor:
        if not grouped:
            return kernel(q, k, v, attn_bias=attn_bias, **options)
        k5, v5 = (x[:, :, :, None].expand(-1, -1, -1, readers, -1) for x in (k, v))
        return kernel(_grouped(q, readers), k5, v5, attn_bias=attn_bias, **options).flatten(2, 3)

    q_len, k_len = q.shape[1], k.shape[1]
    if isinstance(mask, Full):
        return run(q)
    if isinstance(mask, Keys):
        seen = mask.dense(q_len, k_len).to(q.device)
        some = seen.any(-1, keepdim=True)
        bias = additive(seen | ~some, q.dtype).expand(len(q), q.shape[2], -1, -1)
        return run(q, bias).masked_fill(~some[:, :, None], 0)
    if isinstance(mask, Packed):
        return run(q, mask.bias(q_len, k_len, device=q.device))
    assert isinstance(mask, Causal | Window), f"no kernel is chosen for {type(mask).__name__}"
    ahead = mask.right if isinstance(mask, Window) else 0
    # The first queries of a long one stand before every key; they are left out and come back as zeros.
    early = max(0, q_len - k_len - ahead)
    out = run(q[:, early:], mask.bias(q_len - early, k_len))
    return F.pad(out, (0, 0, 0, 0, early, 0))


def _attend_paged(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Paged, scale: float | None
) -> Float[Tensor, "B M H W"] | None:
    """The paged kernel where it applies: forward only, few queries, its own head widths and page sizes."""
    fits = (
        q.shape[1] <= SPLIT_K_QUERIES
        and q.shape[3] in SPLIT_K_WIDTHS
        and v.shape[3] == q.shape[3]
        and mask.page_size % SPLIT_K_PAGE == 0
        and q.dtype in (torch.float16, torch.bfloat16)
        and not _learns(q, k, v)
        and min(mask.counts, default=0) >= q.shape[1]
        and _has_split_k(q.device)
    )
    if not fits:
        return None
    from xformers.ops.fmha import triton_splitk

    readers = q.shape[2] // k.shape[2]
    flat = q.flatten(0, 1)[None]
    if readers > 1:
        flat = _grouped(flat, readers)
        k, v = (x[:, :, :, None].expand(-1, -1, -1, readers, -1) for x in (k, v))
    # Named outright: the automatic choice misses this kernel for large batches.
    out: Tensor = _ops().memory_efficient_attention(
        flat,
        k,
        v,
        attn_bias=mask.bias(q.shape[1], k.shape[1]),
        scale=scale,
        op=(triton_splitk.FwOp, None),
    )
    return out[0].reshape(q.shape)


def _grouped(q: Tensor, readers: int) -> Float[Tensor, "B M G R K"]:
    """Query heads by the key head that they read."""
    return q.reshape(*q.shape[:2], -1, readers, q.shape[3])


@cache
def _has_split_k(device: torch.device) -> bool:
    """Whether the paged kernel runs there: it is written in Triton, which Windows lacks, for Ampere and newer."""
    return (
        importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= SPLIT_K_CAPABILITY
    )


def _learns(*tensors: Tensor) -> bool:
    """Whether a backward pass will follow."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@cache
def _ops() -> Any:
    """xformers.ops, or None where it isn't installed (it has no wheels for macOS and arm64)."""
    try:
        import xformers.ops
        import xformers.ops.fmha.common
    except ImportError:
        return None
    if torch.version.cuda is not None:
        # The extension in its wheel wants CUDA 12 and doesn't load beside PyTorch for CUDA 13. xFormers then refuses
        # every tensor on CUDA, though the kernels asked for here are PyTorch's own and Triton's and need none of it.
        xformers.ops.fmha.common._built_with_cuda = True  # noqa: SLF001
    return xformers.ops
