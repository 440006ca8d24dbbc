"""What generation remembers: keys and values of every row so far, and those of the memory it reads."""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm.attention import Full, Keys, attend


@runtime_checkable
class RowMemory(Protocol):
    """The memories of rows, as one layer's attention reads them."""

    def attend(self, q: Float[Tensor, "M L H K"], *, dropout: float = 0.0) -> Float[Tensor, "M L H W"]:
        """What each query reads of its row's memory."""
        ...


@dataclass(frozen=True)
class MemoryKeys:
    """The memory as one layer's attention sees it, projected once."""

    k: Float[Tensor, "M N H K"]
    v: Float[Tensor, "M N H W"]
    mask: Bool[Tensor, "M N"]

    @property
    def seen(self) -> Keys:
        """The attention mask over it."""
        return Keys(self.mask)

    def attend(
        self, q: Float[Tensor, "M L H K"], *, dropout: float = 0.0, whole: bool = False
    ) -> Float[Tensor, "M L H W"]:
        """What each row's queries read of the row's memory; `whole` where it is known that nothing of it is padding."""
        mask = Full() if whole else self.seen
        return attend(q, self.k.to(q.dtype), self.v.to(q.dtype), mask=mask, dropout=dropout)

    def select(self, rows: Int[Tensor, " R"]) -> "MemoryKeys":
        """Some of the rows."""
        return MemoryKeys(self.k[rows], self.v[rows], self.mask[rows])

    @property
    def row_bytes(self) -> int:
        """What one row takes."""
        return self.k[0].nbytes + self.v[0].nbytes

    def fork(self, number: int) -> "SharedKeys":
        """For `number` times the rows, those of one memory side by side; nothing is copied."""
        return SharedKeys(self, torch.arange(len(self.mask), device=self.mask.device).repeat_interleave(number))


@dataclass(frozen=True)
class SharedKeys:
    """Memories that several rows read each: a memory's rows ask it together, as queries of one batch element.

    Attributes:
        keys: Of each memory.
        rows: Which of them each row reads; ascending, none left out.
    """

    keys: MemoryKeys
    rows: Int[Tensor, " M"]

    def attend(self, q: Float[Tensor, "M L H K"], *, dropout: float = 0.0) -> Float[Tensor, "M L H W"]:
        """What each query reads of its row's memory."""
        counts = torch.bincount(self.rows, minlength=len(self.keys.mask))
        places = torch.arange(len(q), device=q.device) - (counts.cumsum(0) - counts)[self.rows]
        asked = q.new_zeros(len(counts), int(counts.max()), *q.shape[1:])
        asked[self.rows, places] = q
        read = self.keys.attend(asked.flatten(1, 2), dropout=dropout)
        out: Tensor = read.reshape(*asked.shape[:3], *read.shape[2:])[self.rows, places]
        return out

    def select(self, rows: Int[Tensor, " R"]) -> "SharedKeys":
        """Some of the rows, in their order."""
        dealt = self.rows[rows]
        read = torch.bincount(dealt, minlength=len(self.keys.mask)) > 0
        keys = self.keys if bool(read.all()) else self.keys.select(read.nonzero()[:, 0])
        return SharedKeys(keys, (read.cumsum(0) - 1)[dealt])

    @property
    def row_bytes(self) -> int:
        """What one row would take alone."""
        return self.keys.row_bytes

    def fork(self, number: int) -> "SharedKeys":
        """For `number` times the rows; nothing is copied."""
        return SharedKeys(self.keys, self.rows.repeat_interleave(number))


class LayerCache:
    """Keys and values of one layer in one preallocated block; rows may be of unequal length.

    New entries go behind each row's own `lengths`, over whatever padding a longer neighbour left there, so that
    entry i of a row is always its position i.
    """

    def __init__(self, lengths: Int[Tensor, " M"], *, capacity: int) -> None:
        self.lengths = lengths
        self.capacity = capacity
        self.extent = 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def update(
        self, k: Float[Tensor, "M L H K"], v: Float[Tensor, "M L H W"]
    ) -> tuple[Float[Tensor, "M N H K"], Float[Tensor, "M N H W"]]:
        """Writes L new entries a row and returns all up to the longest row; mask what lies behind a row's end."""
        if self._k is None or self._v is None:
            room = (k.shape[0], self.capacity)
            self._k, self._v = k.new_zeros(*room, *k.shape[2:]), v.new_zeros(*room, *v.shape[2:])
        self.extent += k.shape[1]
        assert self.extent <= self.capacity, f"{self.extent} entries, room for {self.capacity}"
        rows = torch.arange(len(k), device=k.device)[:, None]
        places = self.lengths[:, None] + torch.arange(k.shape[1], device=k.device)
        self._k[rows, places] = k
        self._v[rows, places] = v
        return self._k[:, : self.extent], self._v[:, : self.extent]

    def advance(self, lengths: Int[Tensor, " M"]) -> None:
        """From now on rows are this long."""
        self.lengths = lengths

    @property
    def row_bytes(self) -> int:
        """What one row takes."""
        return sum(part[0].nbytes for part in (self._k, self._v) if part is not None)

    def select(self, rows: Int[Tensor, " R"]) -> "LayerCache":
        """Some of the rows, in a cache of their own."""
        kept = LayerCache(self.lengths[rows], capacity=self.capacity)
        kept.extent = self.extent
        kept._k = None if self._k is None else self._k[rows]
        kept._v = None if self._v is None else self._v[rows]
        return kept


@dataclass(frozen=True)
class DecodingState:
    """Everything that the next step of generation needs."""

    layers: tuple[LayerCache, ...]
    memory: tuple[MemoryKeys | SharedKeys, ...]
    lengths: Int[Tensor, " M"]

    @property
    def row_bytes(self) -> int:
        """What one row takes: its own keys and values, and a copy of its memory's."""
        return sum(memory.row_bytes for memory in self.memory) + sum(layer.row_bytes for layer in self.layers)

    def select(self, rows: Int[Tensor, " R"]) -> "DecodingState":
        """Some of the rows; those that have ended need no more work."""
        return DecodingState(
            tuple(layer.select(rows) for layer in self.layers),
            tuple(memory.select(rows) for memory in self.memory),
            self.lengths[rows],
        )

    def fork(self, number: int) -> "DecodingState":
        """Every row `number` times, side by side, from here on apart; their memories are shared."""
        rows = torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(number)
        layers = tuple(layer.select(rows) for layer in self.layers)
        return DecodingState(layers, tuple(memory.fork(number) for memory in self.memory), self.lengths[rows])

    def advance(self, lengths: Int[Tensor, " M"]) -> "DecodingState":
        """After tokens were added: rows are now this long."""
        for layer in self.layers:
            layer.advance(lengths)
        return replace(self, lengths=lengths)
