"""Attention behind one function, and what may be seen as small frozen dataclasses.

`attend` takes [B M H K] tensors and a `Mask`. On CUDA it runs xFormers' memory-efficient kernels, elsewhere
PyTorch's scaled dot-product attention on the dense mask. Each mask knows itself twice: `.dense()` is a plain
boolean table, the oracle that tests compare with, and `.bias()` is the xFormers object of the same meaning,
which can be built without a GPU. Causal masks are aligned at the bottom right: the last query sees the last
key, so that a short query against a long cache is right. A query that may see no key yields zeros.

This is the only module that imports xFormers, and it does so when it is first needed.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

SPLIT_K_WIDTHS = (16, 32, 64, 128, 256, 512)
"""Head widths that xFormers' paged kernel (Triton split-K) is written for."""
SPLIT_K_QUERIES = 16
SPLIT_K_PAGE = 64
WRITTEN_OUT_SCORES = 512 * 512
"""Up to so many scores a head, bfloat16 attention on a CPU is written out; beyond, memory matters more."""


class Mask(ABC):
    """Which keys a query may see."""

    @abstractmethod
    def dense(self, q_len: int, k_len: int) -> Bool[Tensor, "C M N"]:
        """True where query m may see key n; C is 1 or the batch size."""

    @abstractmethod
    def bias(self, q_len: int, k_len: int) -> object:
        """The same as an xFormers bias: an AttentionBias, a float tensor [C 1 M N], or None for all.

        Raises:
            ImportError: xFormers isn't installed.
        """


def _causal(q_len: int, k_len: int, *, left: int | None = None, right: int = 0) -> Bool[Tensor, "M N"]:
    """Bottom-right aligned band: key n is seen from query position p where p - left <= n <= p + right."""
    place = torch.arange(q_len)[:, None] + (k_len - q_len)
    key = torch.arange(k_len)[None, :]
    seen = key <= place + right
    return seen if left is None else seen & (key >= place - left)


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def dense(self, q_len: int, k_len: int) -> Bool[Tensor, "C M N"]:
        """All True."""
        return torch.ones(1, q_len, k_len, dtype=torch.bool)

    def bias(self, q_len: int, k_len: int) -> object:  # noqa: ARG002
        """None: xFormers' word for no mask."""
        return None


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees no key nearer to the end than itself (bottom-right aligned)."""

    def dense(self, q_len: int, k_len: int) -> Bool[Tensor, "C M N"]:
        """Lower triangle that ends in the bottom right corner."""
        return _causal(q_len, k_len)[None]

    def bias(self, q_len: int, k_len: int) -> object:  # noqa: ARG002
        """LowerTriangularFromBottomRightMask."""
        return _biases().LowerTriangularFromBottomRightMask()


@dataclass(frozen=True)
class Window(Mask):
    """A query sees `left` keys before its place, its place, and `right` keys after (bottom-right aligned)."""

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        if self.left < 0 or self.right < 0:
            raise ValueError(f"left and right must be 0 or more, got left={self.left}, right={self.right}")

    def dense(self, q_len: int, k_len: int) -> Bool[Tensor, "C M N"]:
        """A band."""
        return _causal(q_len, k_len, left=self.left, right=self.right)[None]

    def bias(self, q_len: int, k_len: int) -> object:  # noqa: ARG002
        """The causal local bias where nothing is seen ahead (more kernels know it), else the two-sided one."""
        if self.right == 0:
            return _biases().LowerTriangularFromBottomRightLocalAttentionMask(self.left + 1)
        return _biases().LocalAttentionFromBottomRightMask(window_left=self.left, window_right=self.right)


@dataclass(frozen=True)
class Keys(Mask):
    """Only the keys that are marked: padding of any shape, one row a batch element.

    Attributes:
        valid: True where a key is real.
        causal: Also hide keys after the query's place (bottom-right aligned over all keys, valid or not).
    """

    valid: Bool[Tensor, "B N"]
    causal: bool = False

    def dense(self, q_len: int, k_len: int) -> Bool[Tensor, "C M N"]:
        """The rows of `valid`, repeated for each query."""
        assert self.valid.shape[1] == k_len, f"{k_len} keys, but the mask knows {self.valid.shape[1]}"
        seen = self.valid[:, None, :].expand(-1, q_len, -1)
        return seen & _causal(q_len, k_len).to(seen.device) if self.causal else seen

    def bias(self, q_len: int, k_len: int) -> Float[Tensor, "B 1 M N"]:
        """0 where seen and -inf where not; rows lie 8 apart as the kernels want them."""
        return _additive(self.dense(q_len, k_len), torch.float32)


@dataclass(frozen=True)
class Packed(Mask):
    """Sequences laid end to end in a batch of one; none sees another.

    Attributes:
        queries: Length of each sequence's queries.
        keys: Length of each sequence's keys; None for the same as `queries`.
        causal: Bottom-right aligned within each sequence, whose keys must be at least its queries.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...] | None = None
    causal: bool = False

    def __post_init__(self) -> None:
        if len(self.key_lengths) != len(self.queries):
            raise ValueError(f"keys must have {len(self.queries)} lengths as queries has, got {len(self.key_lengths)}")
        if self.causal and any(k < q for q, k in zip(self.queries, self.key_lengths, strict=True)):
            raise ValueError(f"causal sequences need keys >= queries, got {self.queries} and {self.key_lengths}")

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Length of each sequence's keys."""
        return self.queries if self.keys is None else self.keys

    def dense(self, q_len: int, k_len: int) -> Bool[Tensor, "C M N"]:
        """Blocks on the diagonal."""
        assert (q_len, k_len) == (sum(self.queries), sum(self.key_lengths)), f"packed lengths are not {q_len}, {k_len}"
        seen = torch.zeros(q_len, k_len, dtype=torch.bool)
        rows = accumulate(self.queries, initial=0)
        columns = accumulate(self.key_lengths, initial=0)
        for row, column, height, width in zip(rows, columns, self.queries, self.key_lengths, strict=False):
            block = _causal(height, width) if self.causal else torch.ones(height, width, dtype=torch.bool)
            seen[row : row + height, column : column + width] = block
        return seen[None]

    def bias(self, q_len: int, k_len: int, *, device: torch.device | str = "cpu") -> object:  # noqa: ARG002
        """BlockDiagonalMask, or BlockDiagonalCausalFromBottomRightMask."""
        name = "BlockDiagonalCausalFromBottomRightMask" if self.causal else "BlockDiagonalMask"
        kind = getattr(_biases(), name)
        return kind.from_seqlens(list(self.queries), list(self.key_lengths), device=torch.device(device))


@dataclass(frozen=True)
class Paged(Mask):
    """Keys lie in the pages of one pool; each sequence owns the pages of its row in a block table.

    Queries are [B M H K], keys and values [1 P*page_size H K]. The M queries are the last M positions of their
    sequence and see it causally (Kwon et al., PagedAttention, SOSP 2023).

    Attributes:
        block_tables: Page indices of each sequence, in order; entries past its length are never read.
        lengths: Keys of each sequence, the M newest included.
        page_size: Keys a page.
    """

    block_tables: Int[Tensor, "B J"]
    lengths: Int[Tensor, " B"]
    page_size: int

    def place(self) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
        """Where in the pool each position of each sequence lies, and whether it is in use."""
        inside = torch.arange(self.page_size, device=self.block_tables.device)
        places = (self.block_tables[:, :, None] * self.page_size + inside).flatten(1)
        used = torch.arange(places.shape[1], device=places.device) < self.lengths[:, None].to(places.device)
        return places.masked_fill(~used, 0), used

    def logical(self, q_len: int) -> Bool[Tensor, "B M L"]:
        """Which position of its own sequence each query may see."""
        position = torch.arange(self.block_tables.shape[1] * self.page_size, device=self.block_tables.device)
        last = self.lengths.to(position.device)[:, None] - q_len + torch.arange(q_len, device=position.device)
        return position[None, None, :] <= last[:, :, None]

    def dense(self, q_len: int, k_len: int) -> Bool[Tensor, "C M N"]:
        """Over the pool, in the order in which it lies in memory."""
        places, used = self.place()
        rows, columns = used.nonzero(as_tuple=True)
        seen = torch.zeros(len(places), q_len, k_len, dtype=torch.bool, device=places.device)
        seen[rows, :, places[rows, columns]] = self.logical(q_len)[rows, :, columns]
        return seen

    def bias(self, q_len: int, k_len: int) -> object:  # noqa: ARG002
        """PagedBlockDiagonalCausalWithOffsetPaddedKeysMask over queries [1 B*M H K]."""
        return _biases().PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            q_seqlen=[q_len] * len(self.lengths),
            kv_seqlen=[int(length) for length in self.lengths.tolist()],
            block_tables=self.block_tables.to(torch.int32),
            page_size=self.page_size,
            device=self.block_tables.device,
        )


def attend(
    q: Float[Tensor, "B M H K"],
    k: Float[Tensor, "C N H K"],
    v: Float[Tensor, "C N H W"],
    *,
    mask: Mask,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B M H W"]:
    """Scaled dot-product attention (Vaswani et al. 2017) under a mask.

    Args:
        q: Queries.
        k: Keys; C is B, or 1 for a `Paged` pool.
        v: Values.
        mask: Which keys each query sees.
        scale: Factor on the scores; None for 1 / sqrt(K).
        dropout: Probability with which an attention weight is dropped. Pass 0 in evaluation.

    Returns:
        One vector a query and head; zeros where a query sees no key.
    """
    if q.is_cuda and _ops() is not None:
        result = _attend_xformers(q, k, v, mask=mask, scale=scale, dropout=dropout)
        if result is not None:
            return result
    return _attend_dense(q, k, v, mask=mask, scale=scale, dropout=dropout)


def _attend_dense(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float | None, dropout: float
) -> Float[Tensor, "B M H W"]:
    """PyTorch's own attention on the dense mask; works on every device."""
    seen = None
    if isinstance(mask, Paged):
        places, _ = mask.place()
        k, v = k[0, places], v[0, places]
        seen = mask.logical(q.shape[1])[:, None]
    elif not isinstance(mask, Full):
        seen = mask.dense(q.shape[1], k.shape[1])[:, None].to(q.device)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    some = None
    if seen is not None:
        some = seen.any(-1, keepdim=True)
        # A query without keys is shown them all, and what it reads is thrown away: no NaN, forward or backward.
        seen = seen | ~some
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] * k.shape[2] <= WRITTEN_OUT_SCORES:
        out = _attend_written_out(q, k, v, seen=seen, scale=scale, dropout=dropout)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, scale=scale)
    return (out if some is None else out.masked_fill(~some, 0)).transpose(1, 2)


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
    run: Callable[..., Tensor] = _ops().memory_efficient_attention
    options = {"scale": scale, "p": dropout}
    q_len, k_len = q.shape[1], k.shape[1]
    if isinstance(mask, Full):
        return run(q, k, v, **options)
    if isinstance(mask, Keys):
        seen = mask.dense(q_len, k_len).to(q.device)
        some = seen.any(-1, keepdim=True)
        bias = _additive(seen | ~some, q.dtype).expand(len(q), q.shape[2], -1, -1)
        return run(q, k, v, attn_bias=bias, **options).masked_fill(~some[:, :, None], 0)
    if isinstance(mask, Packed):
        if any(height > 0 and width == 0 for height, width in zip(mask.queries, mask.key_lengths, strict=True)):
            return None
        return run(q, k, v, attn_bias=mask.bias(q_len, k_len, device=q.device), **options)
    if isinstance(mask, Paged):
        return _attend_paged(q, k, v, mask=mask, scale=scale) if dropout == 0 else None
    assert isinstance(mask, Causal | Window), f"no kernel is chosen for {type(mask).__name__}"
    ahead = mask.right if isinstance(mask, Window) else 0
    if ahead > 0 and q.dtype == torch.float32:
        return None  # only the half-precision kernel knows a two-sided window
    # The first queries of a long one stand before every key; they are left out and come back as zeros.
    early = max(0, q_len - k_len - ahead)
    out = run(q[:, early:], k, v, attn_bias=mask.bias(q_len - early, k_len), **options)
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
        and q.dtype != torch.float32
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        and int(mask.lengths.min()) >= q.shape[1]
    )
    if not fits:
        return None
    from xformers.ops.fmha import triton_splitk

    # Named outright: the automatic choice misses this kernel for large batches.
    out: Tensor = _ops().memory_efficient_attention(
        q.flatten(0, 1)[None],
        k,
        v,
        attn_bias=mask.bias(q.shape[1], k.shape[1]),
        scale=scale,
        op=(triton_splitk.FwOp, None),
    )
    return out[0].view(q.shape)


def _additive(seen: Bool[Tensor, "C M N"], dtype: torch.dtype) -> Float[Tensor, "C 1 M N"]:
    """0 and -inf, stored with rows a multiple of 8 long: the kernels' alignment."""
    room = math.ceil(seen.shape[-1] / 8) * 8
    bias = torch.zeros(*seen.shape[:-1], room, dtype=dtype, device=seen.device)[..., : seen.shape[-1]]
    return bias.masked_fill_(~seen, -math.inf)[:, None]


@cache
def _ops() -> Any:
    """xformers.ops, or None where it isn't installed (it has no wheels for macOS and arm64)."""
    try:
        import xformers.ops
    except ImportError:
        return None
    return xformers.ops


@cache
def _biases() -> Any:
    """xformers.ops.fmha.attn_bias."""
    import xformers.ops.fmha.attn_bias

    return xformers.ops.fmha.attn_bias
