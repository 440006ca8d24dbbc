"""A memory as the first tokens of every row that reads it: run once a study, its keys and values shared by its rows.

In a causal sequence what stands first never sees what follows, so that a prefix has the same keys and values in front
of whatever text. They are made once for all rows of a study and all steps of writing, in training too.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.attention import Mask
from mm.batch import Tokens
from mm.decoder.cache import MemoryKeys
from mm.decoder.paged import LayerPass, Pass, Table, visible


class Recorder:
    """Takes the place of a cache and keeps the keys and values that a layer makes of whole rows."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None

    def update(
        self, k: Float[Tensor, "M L H K"], v: Float[Tensor, "M L H W"]
    ) -> tuple[Float[Tensor, "M L H K"], Float[Tensor, "M L H W"]]:
        """Keeps them and gives them back."""
        self._kept = k, v
        return k, v

    def deal(self, memory: Tokens, rows: Int[Tensor, " M"] | None) -> MemoryKeys:
        """What was kept of each memory, dealt out to rows."""
        assert self._kept is not None, "no layer has run"
        parts = (*self._kept, memory.mask)
        k, v, mask = parts if rows is None else (part.index_select(0, rows) for part in parts)
        return MemoryKeys(k, v, mask)


@dataclass(frozen=True)
class Prefixed:
    """One layer's cache of rows that stand behind a memory: the memory's entries first, then the rows' own."""

    memory: MemoryKeys
    own: LayerPass | None

    def update(
        self, k: Float[Tensor, "M L H K"], v: Float[Tensor, "M L H W"]
    ) -> tuple[Float[Tensor, "M N H K"], Float[Tensor, "M N H W"]]:
        """Writes the new ones and returns the memory, then all up to the longest row."""
        if self.own is not None:
            layer, now = self.own.layer, self.own.now
            assert isinstance(now, Pass), "rows of one kind"
            layer.write(k, v, now.places)
            k, v = layer.gather(now.tables, now.extent)
        return torch.cat([self.memory.k.to(k.dtype), k], dim=1), torch.cat([self.memory.v.to(v.dtype), v], dim=1)


def gathered(memory: Tokens) -> Tokens:
    """Real tokens first, in their order, and no more places than the longest memory needs (at least one)."""
    order = (~memory.mask).to(torch.uint8).argsort(dim=1, stable=True)
    order = order[:, : max(int(memory.mask.sum(1).max()), 1)]
    values = memory.values.gather(1, order[:, :, None].expand(-1, -1, memory.values.shape[2]))
    return Tokens(values, memory.mask.gather(1, order))


def behind(memory: MemoryKeys, positions: Int[Tensor, "#M L"], extent: int, *, window: int | None) -> Mask:
    """What rows see through `Prefixed`.

    Args:
        memory: Gathered, so that its token j has position j.
        positions: Of the rows' new tokens, counted from behind the memory.
        extent: Keys of the rows' own.
        window: A token sees itself and `window - 1` tokens before it, the memory's among them; None: all.
    """
    seen = visible(positions, extent, window=window).seen
    kept = memory.mask[:, None].expand(-1, positions.shape[1], -1)
    if window is not None:
        before = torch.arange(memory.mask.shape[1], device=positions.device)
        here = positions + memory.mask.sum(1)[:, None]
        kept = kept & (before > here[:, :, None] - window)
    return Table(torch.cat([kept, seen.expand(len(kept), -1, -1)], dim=2))
