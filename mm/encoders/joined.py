"""Several image encoders look at the same picture, and their tokens stand side by side."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.batch import Tokens
from mm.encoders.base import ImageEncoder
from mm.encoders.shared import all_valid


class JoinedEncoder(ImageEncoder):
    """Networks that were trained on different things know different things of a picture.

    Args:
        encoders: Two or more, each with as many tokens as the others (give them one `token_grid`). The first one's
            grid is that of the joined feature map.
        mirrored: Shows them the picture and its mirror image and keeps the mean, which is steadier and takes twice
            the time. Not for pictures in which left and right matter.

    Raises:
        ValueError: Fewer than two, or no kind of image that all of them take.
    """

    def __init__(self, *, encoders: list[ImageEncoder], mirrored: bool = False) -> None:
        super().__init__()
        if len(encoders) < 2:
            raise ValueError(f"encoders must be two or more, got {len(encoders)}")
        self.channels = tuple(n for n in encoders[0].channels if all(n in other.channels for other in encoders))
        if not self.channels:
            raise ValueError(f"encoders must share a number of channels, got {[one.channels for one in encoders]}")
        self.encoders = nn.ModuleList(encoders)
        self.mirrored = mirrored
        self.width = sum(one.width for one in encoders)
        self.widths = (sum(one.widths[-1] for one in encoders),)
        self.stride = encoders[0].stride * 2 ** (len(encoders[0].widths) - 1)
        self._parts = [one.widths[-1] for one in encoders]

    def pyramid(self, x: Float[Tensor, "N C Y X"]) -> tuple[Float[Tensor, "N _ _ _"], ...]:
        """One level: the coarsest of each, resampled to the first one's grid."""
        maps = self._maps(x)
        if self.mirrored:
            maps = [(one + other.flip(-1)) / 2 for one, other in zip(maps, self._maps(x.flip(-1)), strict=True)]
        size = (maps[0].shape[-2], maps[0].shape[-1])
        return (torch.cat([F.adaptive_avg_pool2d(item, size) for item in maps], dim=1),)

    def _maps(self, x: Float[Tensor, "N C Y X"]) -> list[Tensor]:
        return [one.pyramid(x)[-1] for one in self.encoders]  # type: ignore[operator]  # a ModuleList forgets the type

    def tokens(self, grid: Float[Tensor, "N D y x"]) -> Tokens:
        """The tokens of each, side by side.

        Raises:
            ValueError: They differ in number.
        """
        parts = torch.split(grid, self._parts, dim=1)
        made = [one.tokens(part).values for one, part in zip(self.encoders, parts, strict=True)]  # type: ignore[operator]
        if len(numbers := {item.shape[1] for item in made}) > 1:
            raise ValueError(f"encoders must have as many tokens as each other, got {sorted(numbers)}")
        values = torch.cat(made, dim=-1)
        return Tokens(values, all_valid(values))

    def sealed(self) -> dict[str, Any]:
        """Nothing of its own: each of the encoders tells what it was made from."""
        return {}
