"""Which keys a query may see, as small frozen dataclasses.

Each mask knows itself twice: `.dense()` is a plain boolean table, the oracle that tests compare with, and
`.bias()` is the xFormers object of the same meaning, which can be built without a GPU. Causal masks are aligned at
the bottom right: the last query sees the last key, so that a short query against a long cache is right.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PAGES_WORTH_A_CALL = 40
"""So many pages of padding cost as much as one call of attention more (CPU, pages of 16 keys, 8 heads of 32)."""


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
            bias = getattr(_biases(), name).from_seqlens(*lengths, device=device)
            self._made[device] = (
                bias if self.left is None else bias.make_local_attention_from_bottomright(self.left + 1)
            )
        return self._made[device]

    @cached_property
    def _made(self) -> dict[torch.device, object]:
        return {}


@dataclass(frozen=True)
class Paged(Mask):
    """Keys lie in the pages of one pool; each sequence owns the pages of its row in a block table.

    Queries are [B M H K], keys and values [1 P*page_size H K]. The M queries are the last M positions of their
    sequence and see it causally (Kwon et al., PagedAttention, SOSP 2023).

    Attributes:
        block_tables: Page indices of each sequence, in order; entries past its length are never read.
        lengths: Keys of each sequence, the M newest included.
        page_size: Keys a page.
        left: A query sees so many keys before its place; None: all of them. The kernel on CUDA knows none.
    """

    block_tables: Int[Tensor, "B J"]
    lengths: Int[Tensor, " B"]
    page_size: int
    left: int | None = None

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The lengths as numbers; a device is waited for once, not in every layer."""
        return tuple(self.lengths.tolist())

    @cached_property
    def _made(self) -> dict[int, object]:
        return {}

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
        seen = position[None, None, :] <= last[:, :, None]
        return seen if self.left is None else seen & (position >= (last - self.left)[:, :, None])

    def alike(self, q_len: int) -> "list[LikePages]":
        """Rows of like length together, the longest first; made once for all layers."""
        if q_len not in self._sorted:
            pages = [max(-(-count // self.page_size), 1) for count in self.counts]
            order = sorted(range(len(pages)), key=pages.__getitem__, reverse=True)
            ends = _cuts([pages[row] for row in order], worth=PAGES_WORTH_A_CALL)
            order = order if len(ends) > 1 else sorted(order)
            seen, made = self.logical(q_len), []
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                rows, width = torch.tensor(order[start:end]), max(pages[row] for row in order[start:end])
                own = torch.arange(width) < torch.tensor(pages)[rows, None]
                rows, own = rows.to(seen.device), own.to(seen.device)
                tables = self.block_tables.index_select(0, rows)[:, :width]
                some = seen.index_select(0, rows)[:, None, :, : width * self.page_size]
                made.append(
                    LikePages(
                        rows=rows,
                        blocks=tables.where(own, tables[:, :1]).flatten(),  # past a row's end its own are read again
                        seen=some,
                        bias=torch.zeros(some.shape, device=some.device).masked_fill_(~some, -math.inf),
                    )
                )
            self._sorted[q_len] = made
        return self._sorted[q_len]

    @cached_property
    def _sorted(self) -> "dict[int, list[LikePages]]":
        return {}

    def dense(self, q_len: int, k_len: int) -> Bool[Tensor, "C M N"]:
        """Over the pool, in the order in which it lies in memory."""
        places, used = self.place()
        rows, columns = used.nonzero(as_tuple=True)
        seen = torch.zeros(len(places), q_len, k_len, dtype=torch.bool, device=places.device)
        seen[rows, :, places[rows, columns]] = self.logical(q_len)[rows, :, columns]
        return seen

    def bias(self, q_len: int, k_len: int) -> object:  # noqa: ARG002
        """PagedBlockDiagonalCausalWithOffsetPaddedKeysMask over queries [1 B*M H K]; made once for all layers."""
        if q_len not in self._made:
            kind = _biases().PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
            self._made[q_len] = kind.from_seqlens(
                q_seqlen=[q_len] * len(self.counts),
                kv_seqlen=list(self.counts),
                block_tables=self.block_tables.to(torch.int32),
                page_size=self.page_size,
                device=self.block_tables.device,
            )
        return self._made[q_len]


@dataclass(frozen=True)
class LikePages:
    """Some rows of a `Paged` mask whose pages are copied together.

    Attributes:
        rows: Which.
        blocks: Their pages, row by row, each padded to the longest.
        seen: Which of these keys each query sees.
        bias: The same as 0 and -inf.
    """

    rows: Int[Tensor, " R"]
    blocks: Int[Tensor, " P"]
    seen: Bool[Tensor, "R 1 M N"]
    bias: Float[Tensor, "R 1 M N"]


def _cuts(pages: list[int], *, worth: int) -> list[int]:
    """Where rows, sorted from long to short, end groups that are padded to their longest.

    Args:
        pages: Of each row.
        worth: A cut is made where it saves more pages than this.
    """
    saved, cut = max(((len(pages) - i) * (pages[0] - pages[i]), i) for i in range(len(pages)))
    if saved <= worth:
        return [len(pages)]
    return _cuts(pages[:cut], worth=worth) + [cut + end for end in _cuts(pages[cut:], worth=worth)]


@dataclass(frozen=True)
class Mixed(Mask):
    """One pass over one pool: rows that go on by a token each, and behind them rows of which more is read.

    Queries are T vectors, first one for each row of `steps`, then those of `reads`, one row behind the other.

    Attributes:
        steps: Of the rows that go on; None: there are none.
        reads: Of the others, over their own keys end to end; None: there are none.
        places: Where in the pool these keys lie.
    """

    steps: Paged | None
    reads: Packed | None
    places: Int[Tensor, " N"]

    def dense(self, q_len: int, k_len: int) -> Bool[Tensor, "C M N"]:
        """Over the pool, in the order in which it lies in memory."""
        seen = torch.zeros(1, q_len, k_len, dtype=torch.bool, device=self.places.device)
        first = 0 if self.steps is None else len(self.steps.lengths)
        if self.steps is not None:
            seen[0, :first] = self.steps.dense(1, k_len)[:, 0]
        if self.reads is not None:
            row, key = self.reads.dense(q_len - first, len(self.places))[0].to(seen.device).nonzero(as_tuple=True)
            seen[0, first + row, self.places[key]] = True
        return seen

    def bias(self, q_len: int, k_len: int) -> object:
        """Not to be had: no kernel takes both at once, see `parts`."""
        raise NotImplementedError

    def parts(
        self, queries: Sequence[Tensor], pools: Sequence[Tensor]
    ) -> Iterator[tuple[list[Tensor], list[Tensor], Mask]]:
        """The two, each as queries, keys and a mask that attention knows.

        Args:
            queries: [1 T ...] each.
            pools: [1 P ...] each.
        """
        first = 0 if self.steps is None else len(self.steps.lengths)
        if self.steps is not None:
            yield [item[0, :first, None] for item in queries], list(pools), self.steps
        if self.reads is not None:
            keys = [pool.index_select(1, self.places) for pool in pools]
            yield [item[:, first:] for item in queries], keys, self.reads

    @staticmethod
    def joined(parts: Sequence[Tensor]) -> Float[Tensor, "1 T *rest"]:
        """What was made of the parts, in their order."""
        rows = [part.flatten(0, 1) for part in parts]
        return (rows[0] if len(rows) == 1 else torch.cat(rows))[None]


def additive(seen: Bool[Tensor, "C M N"], dtype: torch.dtype) -> Float[Tensor, "C 1 M N"]:
    """0 and -inf, stored with rows a multiple of 8 long: the kernels' alignment."""
    room = math.ceil(seen.shape[-1] / 8) * 8
    bias = torch.zeros(*seen.shape[:-1], room, dtype=dtype, device=seen.device)[..., : seen.shape[-1]]
    return bias.masked_fill_(~seen, -math.inf)[:, None]


@cache
def _biases() -> Any:
    """xformers.ops.fmha.attn_bias."""
    import xformers.ops.fmha.attn_bias

    return xformers.ops.fmha.attn_bias
