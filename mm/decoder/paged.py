"""Keys and values in pages: one tensor a layer for all sequences, and what one pass of the decoder sees of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm.attention import SPLIT_K_PAGE, Mask, Packed, Paged, additive
from mm.decoder.blocks import BlockTable


def check_pages(page_size: int, *, device: torch.device, window: int | None = None) -> None:
    """Whether the paged kernel of that device can read such pages.

    Raises:
        ValueError: On CUDA its page size is no multiple of 64, or there is a sliding window.
    """
    if device.type != "cuda":
        return
    if page_size % SPLIT_K_PAGE:
        raise ValueError(f"page_size must be a multiple of {SPLIT_K_PAGE} on CUDA, got {page_size}")
    if window is not None:
        raise ValueError(f"window must be null for pages on CUDA, got {window}")


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
        """Each new token sees its own past and itself: over the pool on CUDA, elsewhere over gathered rows.

        Args:
            window: A token sees itself and `window - 1` tokens before it; None: all. Not on CUDA.
        """
        if self.tables.is_cuda:
            assert window is None, "the paged kernel knows no window"
            # Padding counts as if it were written: queries are then the last ones of every row, as the kernel wants.
            return Paged(self.tables, self.starts + self.positions.shape[1], self.page_size)
        return visible(self.positions, self.extent, window=window)

    def packed(self, *, window: int | None = None) -> "PackedPass":
        """The same without padding: the new tokens of all rows, one row behind the other.

        Args:
            window: A token sees itself and `window - 1` tokens before it; None: all.
        """
        device = self.tables.device
        real = torch.arange(self.positions.shape[1], device=device) < self.counts[:, None]
        ends = self.starts + self.counts
        keys = torch.arange(self.extent, device=device)
        inside = self.tables.gather(1, (keys // self.page_size).expand(len(ends), -1)) * self.page_size
        past = (inside + keys % self.page_size)[keys < ends[:, None]] if bool(self.starts.any()) else None
        queries, lengths = tuple(self.counts.tolist()), tuple(ends.tolist())
        return PackedPass(
            new=real.flatten().nonzero()[:, 0],
            positions=self.positions[real],
            places=self.places[real.flatten()],
            past=past,
            last=self.counts.cumsum(0) - 1,
            mask=Packed(queries, lengths, causal=True, left=None if window is None else window - 1),
        )


@dataclass(frozen=True)
class PackedPass:
    """T new tokens of some rows, one row behind the other.

    Attributes:
        new: Where they lie among the flattened padded rows.
        positions: Of each in its row.
        places: Where each goes, in a pool of flattened blocks.
        past: Where the N keys lie that the rows see, the new ones included; None: rows have no past.
        last: Index of each row's last new token.
        mask: Over the keys.
    """

    new: Int[Tensor, " T"]
    positions: Int[Tensor, " T"]
    places: Int[Tensor, " T"]
    past: Int[Tensor, " N"] | None
    last: Int[Tensor, " M"]
    mask: Packed


class PagedLayer:
    """Keys and values of one layer, [blocks page heads width] each, made when the first ones arrive."""

    def __init__(self, num_blocks: int, *, page_size: int) -> None:
        self.num_blocks, self.page_size = num_blocks, page_size
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def write(self, k: Float[Tensor, "M L H K"], v: Float[Tensor, "M L H W"], places: Int[Tensor, " P"]) -> None:
        """Puts every token in its place."""
        if self.k is None or self.v is None:
            # One block more than can be owned: padding is written there.
            shape = (self.num_blocks + 1, self.page_size)
            self.k, self.v = k.new_zeros(*shape, *k.shape[2:]), v.new_zeros(*shape, *v.shape[2:])
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

    def pick(self, places: Int[Tensor, " N"]) -> tuple[Float[Tensor, "1 N H K"], Float[Tensor, "1 N H W"]]:
        """Keys and values that lie in these places, end to end."""
        k, v = self.pool()
        return k.index_select(1, places), v.index_select(1, places)

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
    now: Pass

    def update(
        self, k: Float[Tensor, "M L H K"], v: Float[Tensor, "M L H W"]
    ) -> tuple[Float[Tensor, "C N H K"], Float[Tensor, "C N H W"]]:
        """Writes the new ones and returns what `Pass.mask` is about."""
        self.layer.write(k, v, self.now.places)
        return self.layer.pool() if k.is_cuda else self.layer.gather(self.now.tables, self.now.extent)


@dataclass(frozen=True)
class PackedLayerPass:
    """One layer of the cache during one packed pass."""

    layer: PagedLayer
    now: PackedPass

    def update(
        self, k: Float[Tensor, "1 T H K"], v: Float[Tensor, "1 T H W"]
    ) -> tuple[Float[Tensor, "1 N H K"], Float[Tensor, "1 N H W"]]:
        """Writes the new ones and returns all that the rows see, row behind row."""
        self.layer.write(k, v, self.now.places)
        return (k, v) if self.now.past is None else self.layer.pick(self.now.past)


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

    def bind(self, now: Pass) -> tuple[LayerPass, ...]:
        """Every layer, for one pass."""
        return tuple(LayerPass(layer, now) for layer in self.layers)

    def bind_packed(self, now: PackedPass) -> tuple[PackedLayerPass, ...]:
        """Every layer, for one packed pass."""
        return tuple(PackedLayerPass(layer, now) for layer in self.layers)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks in every layer, (from, to): what `BlockAllocator.extend` asks for."""
        for layer in self.layers:
            layer.copy(pairs)
