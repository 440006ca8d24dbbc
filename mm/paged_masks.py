"""What queries may see of keys in pages, where every sequence owns the pages of its row in a block table."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm.masks import Mask, Packed, xformers_biases

PAGES_WORTH_A_CALL = 40
"""So many pages of padding cost as much as one call of attention more (CPU, pages of 16 keys, 8 heads of 32)."""


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
            kind = xformers_biases().PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
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
class Mixed:
    """One pass over one pool: rows that go on by a token each, and behind them rows of which more is read.

    No `Mask`, for no kernel takes both at once: attention takes the `parts`. Queries are T vectors, first one for each
    row of `steps`, then those of `reads`, one row behind the other.

    Attributes:
        steps: Of the rows that go on; None: there are none.
        reads: Of the others, over their own keys end to end; None: there are none.
        places: Where in the pool these keys lie.
    """

    steps: Paged | None
    reads: Packed | None
    places: Int[Tensor, " N"]

    def dense(self, q_len: int, k_len: int) -> Bool[Tensor, "1 M N"]:
        """Over the pool, in the order of its places."""
        seen = torch.zeros(1, q_len, k_len, dtype=torch.bool, device=self.places.device)
        first = 0 if self.steps is None else len(self.steps.lengths)
        if self.steps is not None:
            seen[0, :first] = self.steps.dense(1, k_len)[:, 0]
        if self.reads is not None:
            row, key = self.reads.dense(q_len - first, len(self.places))[0].to(seen.device).nonzero(as_tuple=True)
            seen[0, first + row, self.places[key]] = True
        return seen

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


Visible = Mask | Mixed
"""What attention can be told."""
