"""Keys and values in pages: one tensor a layer for all sequences, and what one pass of the decoder sees of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm.attention import SPLIT_K_PAGE, Mask, Mixed, Packed, Paged, additive
from mm.decoder.blocks import BlockTable

ALIGNMENT = 64
"""Bytes: a line of a CPU's cache."""
PAGE = 16
"""Tokens a block where no kernel wants more: little is wasted at a row's end."""


def checked_page_size(page_size: int | None, *, device: torch.device, window: int | None = None) -> int:
    """A page size that the paged kernel of that device can read.

    Args:
        page_size: Tokens a block; None: 64 on CUDA, 16 elsewhere.
        device: Of the cache.
        window: Of self-attention.

    Raises:
        ValueError: On CUDA the page size is no multiple of 64, or there is a sliding window.
    """
    if device.type != "cuda":
        return PAGE if page_size is None else page_size
    page_size = SPLIT_K_PAGE if page_size is None else page_size
    if page_size % SPLIT_K_PAGE:
        raise ValueError(f"page_size must be a multiple of {SPLIT_K_PAGE} on CUDA, got {page_size}")
    if window is not None:
        raise ValueError(f"window must be null for pages on CUDA, got {window}")
    return page_size


@dataclass(frozen=True)
class Table(Mask):
    """Every query's own list of keys, written out; none of them is empty."""

    sighted = True
    seen: Bool[Tensor, "B M N"]

    def dense(self, q_len: int, k_len: int) -> Bool[Tensor, "C M N"]:
        """The table."""
        assert self.seen.shape[1:] == (q_len, k_len), f"table {tuple(self.seen.shape)}, asked for {q_len}, {k_len}"
        return self.seen

    def bias(self, q_len: int, k_len: int) -> Float[Tensor, "B 1 M N"]:
        """0 where seen and -inf where not."""
        return additive(self.dense(q_len, k_len), torch.float32)


def visible(positions: Int[Tensor, "#M L"], extent: int, *, window: int | None) -> Table:
    """Tokens at these positions see their own past and themselves, where key i is a row's position i.

    Args:
        positions: Of the tokens.
        extent: Keys of the longest row.
        window: A token sees itself and `window - 1` tokens before it; None: all.
    """
    keys, here = torch.arange(extent, device=positions.device), positions[:, :, None]
    seen = keys <= here
    return Table(seen if window is None else seen & (keys > here - window))


@dataclass(frozen=True)
class Pass:
    """M rows get up to L new tokens each, behind what their pages hold; rows are padded on the right.

    Attributes:
        tables: Blocks of each row, new ones included; what lies past a row's end is block 0 and never seen.
        starts: Tokens that a row had before.
        counts: Tokens that it gets now.
        positions: Of the new tokens.
        places: Where the new tokens go, in a pool of flattened blocks; padding goes to a block that nobody owns.
        extent: Keys of the longest row, the new ones included.
        page_size: Tokens a block.
    """

    tables: Int[Tensor, "M J"]
    starts: Int[Tensor, " M"]
    counts: Int[Tensor, " M"]
    positions: Int[Tensor, "M L"]
    places: Int[Tensor, " P"]
    extent: int
    page_size: int

    def mask(self, *, window: int | None = None) -> Mask:
        """Each new token sees its own past and itself, in the pool.

        Args:
            window: A token sees itself and `window - 1` tokens before it; None: all. Not on CUDA.
        """
        # Padding counts as if it were written: queries are then the last ones of every row, as the kernel wants.
        lengths = self.starts + self.positions.shape[1]
        return Paged(self.tables, lengths, self.page_size, left=None if window is None else window - 1)

    @cached_property
    def real(self) -> Int[Tensor, " Q"]:
        """Where the new tokens lie among the flattened padded rows."""
        steps = torch.arange(self.positions.shape[1], device=self.tables.device)
        return (steps < self.counts[:, None]).flatten().nonzero()[:, 0]

    @property
    def keys(self) -> Int[Tensor, " N"]:
        """Where all that the rows see lies in the pool, row behind row, the new ones included."""
        ends, keys = (self.starts + self.counts)[:, None], torch.arange(self.extent, device=self.tables.device)
        inside = self.tables.gather(1, (keys // self.page_size).expand(len(ends), -1)) * self.page_size
        return (inside + keys % self.page_size)[keys < ends]


@dataclass(frozen=True)
class Step:
    """All that the decoder computes at once: rows that go on by one token, and rows of which more is read.

    The new tokens lie without padding: first one of each row that goes on, then those of the others, row behind row.

    Attributes:
        writes: Rows that go on; None: there are none.
        reads: The others; None: there are none.
    """

    writes: Pass | None
    reads: Pass | None

    @property
    def writing(self) -> int:
        """Number of rows that go on."""
        return 0 if self.writes is None else len(self.writes.starts)

    @cached_property
    def positions(self) -> Int[Tensor, " T"]:
        """Of each token in its row."""
        return self._both(lambda part: part.positions.flatten())

    @cached_property
    def places(self) -> Int[Tensor, " T"]:
        """Where each token goes, in a pool of flattened blocks."""
        return self._both(lambda part: part.places)

    @property
    def last(self) -> Int[Tensor, " M"]:
        """Index of each row's last token."""
        first = torch.arange(self.writing, device=self.positions.device)
        return first if self.reads is None else torch.cat([first, self.reads.counts.cumsum(0) + self.writing - 1])

    def mask(self, *, window: int | None = None) -> Mixed:
        """Each token sees its own past and itself, in the pool.

        Args:
            window: A token sees itself and `window - 1` tokens before it; None: all. Not on CUDA.
        """
        steps = None if self.writes is None else self.writes.mask(window=window)
        assert steps is None or isinstance(steps, Paged), "rows in pages"
        if self.reads is None:
            return Mixed(steps, None, self.positions[:0])
        queries, keys = self.reads.counts.tolist(), (self.reads.starts + self.reads.counts).tolist()
        packed = Packed(tuple(queries), tuple(keys), causal=True, left=None if window is None else window - 1)
        return Mixed(steps, packed, self.reads.keys)

    def _both(self, of: Callable[[Pass], Tensor]) -> Tensor:
        parts = [] if self.writes is None else [of(self.writes)]
        parts += [] if self.reads is None else [of(self.reads).index_select(0, self.reads.real)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class PagedLayer:
    """Keys and values of one layer, [blocks page heads width] each, made when the first ones arrive.

    On a CPU a block takes no memory before it is used.
    """

    def __init__(self, num_blocks: int, *, page_size: int) -> None:
        self.num_blocks, self.page_size = num_blocks, page_size
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def write(self, k: Float[Tensor, "M L H K"], v: Float[Tensor, "M L H W"], places: Int[Tensor, " P"]) -> None:
        """Puts every token in its place."""
        if self.k is None or self.v is None:
            # One block more than can be owned: padding is written there.
            shape = (self.num_blocks + 1, self.page_size)
            self.k, self.v = (zeros(*shape, *part.shape[2:], like=part) for part in (k, v))
        for pool, new in ((self.k, k), (self.v, v)):
            pool.flatten(0, 1).index_copy_(0, places, new.flatten(0, 1).to(pool.dtype))

    def gather(
        self, tables: Int[Tensor, "M J"], extent: int
    ) -> tuple[Float[Tensor, "M N H K"], Float[Tensor, "M N H W"]]:
        """The first `extent` keys and values of each row, copied page by page."""
        assert self.k is not None, "nothing was written yet"
        assert self.v is not None, "nothing was written yet"
        blocks = tables.flatten()
        k, v = (pool.index_select(0, blocks).view(len(tables), -1, *pool.shape[2:]) for pool in (self.k, self.v))
        return k[:, :extent], v[:, :extent]

    def pool(self) -> tuple[Float[Tensor, "1 N H K"], Float[Tensor, "1 N H W"]]:
        """All blocks end to end, as `mm.attention.Paged` wants them."""
        assert self.k is not None, "nothing was written yet"
        assert self.v is not None, "nothing was written yet"
        return self.k.flatten(0, 1)[None], self.v.flatten(0, 1)[None]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks, (from, to)."""
        for pool in (self.k, self.v):
            if pool is not None and pairs:
                source, target = zip(*pairs, strict=True)
                pool[list(target)] = pool[list(source)]


@dataclass(frozen=True)
class LayerPass:
    """One layer of the cache during one pass; self-attention takes it for its cache."""

    layer: PagedLayer
    now: Pass | Step

    def update(
        self, k: Float[Tensor, "M L H K"], v: Float[Tensor, "M L H W"]
    ) -> tuple[Float[Tensor, "1 N H K"], Float[Tensor, "1 N H W"]]:
        """Writes the new ones and returns the pool."""
        self.layer.write(k, v, self.now.places)
        return self.layer.pool()


class PagedCache:
    """All layers; block b of one is block b of all.

    Attributes:
        context: Most tokens of a row that the decoder is made for; None: any number.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_blocks: int,
        page_size: int,
        device: torch.device | str = "cpu",
        context: int | None = None,
    ) -> None:
        self.layers = tuple(PagedLayer(num_blocks, page_size=page_size) for _ in range(depth))
        self.num_blocks, self.page_size, self.device, self.context = num_blocks, page_size, device, context

    def plan(self, tables: Sequence[BlockTable], counts: Sequence[int]) -> Pass:
        """A pass over rows whose tables already hold room for `counts` new tokens."""
        width, page = max(counts), self.page_size
        before = [table.length - count for table, count in zip(tables, counts, strict=True)]
        extent = max(before) + width
        columns = -(-extent // page)
        blocks = torch.tensor([table.blocks + [0] * (columns - len(table.blocks)) for table in tables])
        new, starts = torch.tensor(counts), torch.tensor(before)
        if width == 1:
            positions = starts[:, None]
            places = torch.tensor([table.blocks[-1] * page + (table.length - 1) % page for table in tables])
        else:
            steps = torch.arange(width)
            positions = starts[:, None] + steps
            inside = blocks.gather(1, positions // page) * page + positions % page
            places = torch.where(steps < new[:, None], inside, self.num_blocks * page + positions % page).flatten()
        tensors = {"tables": blocks, "starts": starts, "counts": new, "positions": positions, "places": places}
        return Pass(**{name: item.to(self.device) for name, item in tensors.items()}, extent=extent, page_size=page)

    def bind(self, now: Pass | Step) -> tuple[LayerPass, ...]:
        """Every layer, for one pass."""
        return tuple(LayerPass(layer, now) for layer in self.layers)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks in every layer, (from, to): what `BlockAllocator.extend` asks for."""
        for layer in self.layers:
            layer.copy(pairs)


def zeros(*shape: int, like: Tensor) -> Tensor:
    """Zeros; on a CPU the system gives their memory when it is first written to."""
    if not like.is_cpu:
        return like.new_zeros(shape)
    size_in_bytes = math.prod(shape) * like.element_size()
    room = torch.from_numpy(np.zeros(size_in_bytes + ALIGNMENT, dtype=np.uint8))
    start = -room.data_ptr() % ALIGNMENT
    return room[start : start + size_in_bytes].view(like.dtype).view(shape)
