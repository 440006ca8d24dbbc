"""Which keys a query may see, as small frozen dataclasses; keys in pages have theirs in `mm.paged_masks`.

Each mask knows itself twice: `.dense()` is a plain boolean table, the oracle that tests compare with, and
`.bias()` is the xFormers object of the same meaning, which can be built without a GPU. Causal masks are aligned at
the bottom right: the last query sees the last key, so that a short query against a long cache is right.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Mask(ABC):
    """Which keys a query may see.

    Attributes:
        sighted: Whether every query is sure to see a key, so that nobody has to look.
    """

    sighted: ClassVar[bool] = False

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
        return xformers_biases().LowerTriangularFromBottomRightMask()


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
            return xformers_biases().LowerTriangularFromBottomRightLocalAttentionMask(self.left + 1)
        return xformers_biases().LocalAttentionFromBottomRightMask(window_left=self.left, window_right=self.right)


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
        return additive(self.dense(q_len, k_len), torch.float32)


@dataclass(frozen=True)
class Packed(Mask):
    """Sequences laid end to end in a batch of one; none sees another.

    Attributes:
        queries: Length of each sequence's queries.
        keys: Length of each sequence's keys; None for the same as `queries`.
        causal: Bottom-right aligned within each sequence, whose keys must be at least its queries.
        left: Where causal, a query sees so many keys before its place; None: all of them.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...] | None = None
    causal: bool = False
    left: int | None = None

    def __post_init__(self) -> None:
        if len(self.key_lengths) != len(self.queries):
            raise ValueError(f"keys must have {len(self.queries)} lengths as queries has, got {len(self.key_lengths)}")
        if self.causal and any(k < q for q, k in zip(self.queries, self.key_lengths, strict=True)):
            raise ValueError(f"causal sequences need keys >= queries, got {self.queries} and {self.key_lengths}")
        if self.left is not None and (self.left < 0 or not self.causal):
            raise ValueError(f"left must be 0 or more and needs causal, got left={self.left}, causal={self.causal}")

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Length of each sequence's keys."""
        return self.queries if self.keys is None else self.keys

    @property
    def within(self) -> Mask:
        """What holds within each sequence."""
        if not self.causal:
            return Full()
        return Causal() if self.left is None else Window(self.left)

    def dense(self, q_len: int, k_len: int) -> Bool[Tensor, "C M N"]:
        """Blocks on the diagonal."""
        assert (q_len, k_len) == (sum(self.queries), sum(self.key_lengths)), f"packed lengths are not {q_len}, {k_len}"
        seen = torch.zeros(q_len, k_len, dtype=torch.bool)
        rows = accumulate(self.queries, initial=0)
        columns = accumulate(self.key_lengths, initial=0)
        for row, column, height, width in zip(rows, columns, self.queries, self.key_lengths, strict=False):
            seen[row : row + height, column : column + width] = self.within.dense(height, width)[0]
        return seen[None]

    def bias(self, q_len: int, k_len: int, *, device: torch.device | str = "cpu") -> object:  # noqa: ARG002
        """BlockDiagonalMask, or BlockDiagonalCausalFromBottomRightMask, perhaps local; made once for all layers."""
        device = torch.device(device)
        if device not in self._made:
            name = "BlockDiagonalCausalFromBottomRightMask" if self.causal else "BlockDiagonalMask"
            lengths = [list(self.queries), list(self.key_lengths)]
            bias = getattr(xformers_biases(), name).from_seqlens(*lengths, device=device)
            self._made[device] = (
                bias if self.left is None else bias.make_local_attention_from_bottomright(self.left + 1)
            )
        return self._made[device]

    @cached_property
    def _made(self) -> dict[torch.device, object]:
        return {}


def additive(seen: Bool[Tensor, "C M N"], dtype: torch.dtype) -> Float[Tensor, "C 1 M N"]:
    """0 and -inf, stored with rows a multiple of 8 long: the kernels' alignment."""
    room = math.ceil(seen.shape[-1] / 8) * 8
    bias = torch.zeros(*seen.shape[:-1], room, dtype=dtype, device=seen.device)[..., : seen.shape[-1]]
    return bias.masked_fill_(~seen, -math.inf)[:, None]


@cache
def xformers_biases() -> Any:
    """xformers.ops.fmha.attn_bias."""
    import xformers.ops.fmha.attn_bias

    return xformers.ops.fmha.attn_bias
