"""The memories that running sequences read, side by side, so that a step of the decoder copies none of them."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.decoder.cache import MemoryKeys, RowMemory
from mm.decoder.paged import Step


@dataclass(frozen=True)
class Memory:
    """One study as every layer's cross-attention sees it ([1 N H K] a layer), projected once for all its requests.

    Attributes:
        layers: Empty where the decoder reads no memory.
        name: Tells it from every other memory that an engine knows.
    """

    layers: tuple[MemoryKeys, ...]
    name: bytes

    @property
    def length(self) -> int:
        """Tokens, padding included."""
        return self.layers[0].mask.shape[1] if self.layers else 0


@dataclass(frozen=True)
class StepMemory:
    """The memories of all rows of a step, every layer's; empty where the decoder reads none.

    Attributes:
        writes: Of the rows that go on by a token.
        reads: Of the others.
    """

    writes: tuple[MemoryKeys, ...]
    reads: tuple[MemoryKeys, ...]

    def bind(self, now: Step) -> tuple[RowMemory, ...]:
        """As the tokens of one step read them."""
        layers = self.writes[:1]
        # Looked at once for all layers; a GPU is not waited for.
        whole = all(layer.mask.device.type == "cpu" and bool(layer.mask.all()) for layer in layers)
        if now.reads is None or not self.reads:
            return tuple(StepKeys(layer, None, None, None, whole) for layer in self.writes)
        real = now.reads.real
        padded = real.new_zeros(now.reads.positions.numel()).index_copy_(0, real, torch.arange(len(real)).to(real))
        grid = padded.view_as(now.reads.positions)
        writes = self.writes or (None,) * len(self.reads)
        return tuple(StepKeys(own, other, grid, real, whole) for own, other in zip(writes, self.reads, strict=True))


@dataclass(frozen=True)
class StepKeys:
    """The memories of all rows of a step, as one layer reads them. Queries are the step's tokens.

    Attributes:
        writes: Of the rows that go on, a token each.
        reads: Of the others.
        grid: Which of their tokens stands where in padded rows.
        real: Where in the flattened padded rows each of their tokens stands.
        whole: Whether nothing is padding in what `writes` holds.
    """

    writes: MemoryKeys | None
    reads: MemoryKeys | None
    grid: Int[Tensor, "R L"] | None
    real: Int[Tensor, " Q"] | None
    whole: bool

    def attend(self, q: Float[Tensor, "T 1 H K"], *, dropout: float = 0.0) -> Float[Tensor, "T 1 H W"]:
        """What each token reads of its row's memory."""
        if self.reads is None or self.grid is None or self.real is None:
            assert self.writes is not None, "a step without rows"
            return self.writes.attend(q, dropout=dropout, whole=self.whole)
        first = 0 if self.writes is None else len(self.writes.mask)
        padded = q[first:, 0].index_select(0, self.grid.flatten()).view(*self.grid.shape, *q.shape[2:])
        out = self.reads.attend(padded, dropout=dropout).flatten(0, 1).index_select(0, self.real)[:, None]
        if self.writes is None:
            return out
        return torch.cat([self.writes.attend(q[:first], dropout=dropout, whole=self.whole), out])


class MemoryBank:
    """Memories in lanes, lane m for row m; a sequence keeps its lane until it leaves or fills another's gap."""

    def __init__(self, lanes: int) -> None:
        self._capacity = lanes
        self._rows: list[Hashable] = []
        self._lengths: list[int] = []
        self._layers: tuple[MemoryKeys, ...] = ()

    def arrange(self, memories: dict[Hashable, Memory]) -> list[Hashable]:
        """Takes in who is new, lets go who isn't named any more.

        Returns:
            The order of rows that `rows` has from now on.
        """
        new = [name for name in memories if name not in set(self._rows)]
        gaps = [lane for lane, name in enumerate(self._rows) if name not in memories]
        for lane in reversed(gaps):
            if new:
                self._put(lane, new.pop(), memories)
            else:  # the last lane moves into the gap
                self._move(len(self._rows) - 1, lane)
        for name in new:
            self._rows.append(name)
            self._lengths.append(0)
            self._put(len(self._rows) - 1, name, memories)
        return list(self._rows)

    def rows(self) -> tuple[MemoryKeys, ...]:
        """Every layer's memory of all rows, up to the longest."""
        count, extent = len(self._rows), max(self._lengths, default=0)
        return tuple(
            MemoryKeys(layer.k[:count, :extent], layer.v[:count, :extent], layer.mask[:count, :extent])
            for layer in self._layers
        )

    def _put(self, lane: int, name: Hashable, memories: dict[Hashable, Memory]) -> None:
        memory = memories[name]
        self._rows[lane], self._lengths[lane] = name, memory.length
        self._make_room(memory)
        for own, layer in zip(self._layers, memory.layers, strict=True):
            own.k[lane, : memory.length] = layer.k[0]
            own.v[lane, : memory.length] = layer.v[0]
            own.mask[lane] = False
            own.mask[lane, : memory.length] = layer.mask[0]

    def _move(self, source: int, target: int) -> None:
        name, length = self._rows.pop(), self._lengths.pop()
        if source == target:
            return
        self._rows[target], self._lengths[target] = name, length
        for own in self._layers:
            own.k[target], own.v[target], own.mask[target] = own.k[source], own.v[source], own.mask[source]

    def _make_room(self, memory: Memory) -> None:
        if self._layers and self._layers[0].mask.shape[1] >= memory.length:
            return
        grown = []
        for index, layer in enumerate(memory.layers):
            shape = (self._capacity, memory.length)
            # Head by head in memory, as products read them.
            k, v = (
                part.new_zeros(self._capacity, part.shape[2], memory.length, part.shape[3]).transpose(1, 2)
                for part in (layer.k, layer.v)
            )
            mask = torch.zeros(shape, dtype=torch.bool, device=k.device)
            if self._layers:
                old = self._layers[index]
                extent = old.mask.shape[1]
                k[:, :extent], v[:, :extent], mask[:, :extent] = old.k, old.v, old.mask
            grown.append(MemoryKeys(k, v, mask))
        self._layers = tuple(grown)


def stacked(memories: list[Memory]) -> tuple[MemoryKeys, ...]:
    """Memories of a few rows that are read together once."""
    bank = MemoryBank(len(memories))
    bank.arrange(dict(enumerate(memories)))
    return bank.rows()
