"""Texts through a text tower: those of about one length together, and those of a frozen tower once for all."""

from collections.abc import Callable
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mm.batch import Padded, Tokens
from mm.encoders.base import TextTower

MOST: Final = 80_000_000
"""Numbers that are kept, some 300 MB; what comes behind them is made anew each time."""
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
    """What a tower says of texts, by their ids, in main memory; for a tower whose weights and mode don't change."""

    def __init__(self) -> None:
        self._vectors: dict[tuple[int, ...], Tensor] = {}
        self._tokens: dict[tuple[int, ...], Tensor] = {}
        self._numbers = 0

    def __len__(self) -> int:
        """Number of texts kept."""
        return len(self._vectors) + len(self._tokens)

    @torch.no_grad()
    def __call__(self, tower: TextTower, text: Padded) -> Float[Tensor, "M D"]:
        """One vector a text, in float32 and without a gradient."""
        said = self._recall(self._vectors, text, lambda fresh: list(by_length(tower, fresh)))
        return torch.stack(said).to(text.values.device)

    @torch.no_grad()
    def tokens(self, tower: TextTower, text: Padded) -> Tokens:
        """The same for `tower.tokens`; padding is zeros."""

        def read(fresh: Padded) -> list[Tensor]:
            values = tower.tokens(fresh).values
            return [row[:length] for row, length in zip(values, fresh.lengths.tolist(), strict=True)]

        values = nn.utils.rnn.pad_sequence(self._recall(self._tokens, text, read), batch_first=True)
        return Tokens(values.to(text.values.device), text.mask[:, : values.shape[1]])

    def _recall(
        self, kept: dict[tuple[int, ...], Tensor], text: Padded, make: Callable[[Padded], list[Tensor]]
    ) -> list[Tensor]:
        """What is kept of each text, the others' made anew; equal texts are made once."""
        keys = [tuple(row) for row in text.rows()]
        made = {key: kept[key] for key in keys if key in kept}
        if fresh := sorted({*keys} - {*made}):
            said = make(Padded.of([list(key) for key in fresh]).to(text.values.device))
            new = {key: item.float().cpu().clone() for key, item in zip(fresh, said, strict=True)}
            if self._numbers < MOST:
                kept |= new
                self._numbers += sum(item.numel() for item in new.values())
            made |= new
        return [made[key] for key in keys]
