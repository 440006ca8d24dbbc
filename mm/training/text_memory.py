"""Texts through a text tower: those of about one length together, and those of a frozen tower once for all."""

from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from mm.batch import Padded
from mm.encoders.base import TextTower

MOST: Final = 200_000
"""Texts that are kept, some 300 MB at a width of 384; what comes behind them is made anew each time."""
AT_ONCE: Final = 64
"""Texts that the tower sees together."""


def by_length(tower: TextTower, text: Padded) -> Float[Tensor, "M D"]:
    """The tower's vectors, its texts sorted by length: captions of one batch differ threefold, and padding costs.

    Args:
        tower: Its vectors don't depend on what stands beside a text.
        text: In any order, which the vectors have too.
    """
    order = text.lengths.argsort()
    parts: list[Tensor] = []
    for rows in torch.split(order, AT_ONCE):
        longest = max(int(text.lengths[rows[-1]]), 1)
        parts.append(tower(Padded(text.values[rows, :longest], text.lengths[rows])))
    return torch.cat(parts)[order.argsort()]


class TextMemory:
    """Vectors of texts by their ids, in main memory; for a tower whose weights and mode don't change."""

    def __init__(self) -> None:
        self._vectors: dict[tuple[int, ...], Tensor] = {}

    def __len__(self) -> int:
        """Number of texts kept."""
        return len(self._vectors)

    @torch.no_grad()
    def __call__(self, tower: TextTower, text: Padded) -> Float[Tensor, "M D"]:
        """One vector a text, in float32 and without a gradient."""
        lengths = text.lengths.tolist()
        keys = [tuple(row[:length]) for row, length in zip(text.values.tolist(), lengths, strict=True)]
        made = {key: self._vectors[key] for key in keys if key in self._vectors}
        if fresh := sorted({*keys} - {*made}):
            asked = Padded.of([list(key) for key in fresh]).to(text.values.device)
            vectors = by_length(tower, asked).float().cpu()
            made |= {key: vector.clone() for key, vector in zip(fresh, vectors, strict=True)}
        if len(self._vectors) < MOST:
            self._vectors |= made
        return torch.stack([made[key] for key in keys]).to(text.values.device)
