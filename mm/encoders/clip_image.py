"""The image tower of any open_clip model: by name with local weights, or from a local folder.

Its embedding is open_clip's own to the bit; patches of its vision transformers can go along as tokens.
"""

import json
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import VisionTransformer
from torch import Tensor

from mm.batch import Tokens
from mm.encoders.base import ImageEncoder
from mm.encoders.clip import architecture as read_architecture
from mm.encoders.clip import tower
from mm.encoders.shared import all_valid, pooled


class ClipImageEncoder(ImageEncoder):
    """Images to open_clip's embedding as the first token and, where wanted, to patches in the same space.

    A patch goes through the projection that was trained for the embedding (Zhou et al., "Extract Free Dense Labels
    from CLIP", ECCV 2022).

    Args:
        name: Of an open_clip model; None where the folder or the architecture says it.
        weights: A file with the weights of `name` (safetensors, or torch.save of a state dict), or a folder with
            open_clip_config.json and weights. None for random weights.
        token_grid: Tokens along y and x, pooled from the patches of a vision transformer, behind the embedding. None
            for the embedding alone.
        mean: Of the pixels, from 0 to 1, that the weights were trained with. None: the folder's, else CLIP's.
        std: Standard deviation likewise.
        architecture: open_clip's configuration as JSON: what a checkpoint keeps of a folder.

    Raises:
        ValueError: See `mm.encoders.clip.architecture`; a token grid of a tower that has no patches.
    """

    channels = (1, 3)

    def __init__(
        self,
        *,
        name: str | None = None,
        weights: str | None = None,
        token_grid: tuple[int, int] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        architecture: str | None = None,
    ) -> None:
        super().__init__()
        config, prepared = read_architecture("visual", name=name, weights=weights, given=architecture)
        network: Any = tower("visual", config, weights=weights)
        if isinstance(network, VisionTransformer) and (network.attn_pool is not None or network.output_tokens):
            raise ValueError(f"the image tower of {name or weights!r} pools by attention, which isn't taken")
        if token_grid is not None and not isinstance(network, VisionTransformer):
            raise ValueError(f"token_grid needs a vision transformer of open_clip's own, got {token_grid}")
        size = config["vision_cfg"].get("image_size", 224)
        if not isinstance(size, int):
            raise ValueError(f"image_size must be one number for a square, got {size}")
        self.network, self.image_size, self.token_grid = network, size, token_grid
        self.mean = _three("mean", mean or prepared.get("mean") or OPENAI_DATASET_MEAN)
        self.std = _three("std", std or prepared.get("std") or OPENAI_DATASET_STD)
        self.architecture = architecture if name is not None else json.dumps(config, sort_keys=True)
        self.width = int(config["embed_dim"])
        self.widths = (self.width,)
        self.stride = size if token_grid is None else size // int(network.grid_size[0])

    def pixels(self, x: Float[Tensor, "N C Y X"]) -> Float[Tensor, "N 3 y x"]:
        """Images as the tower was trained on them."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x.expand(-1, 3, -1, -1) - mean) / std

    def look(self, x: Float[Tensor, "N C Y X"]) -> tuple[tuple[Float[Tensor, "N _ _ _"], ...], Tokens]:
        """Patches, or the embedding as a map of one cell; and tokens, the embedding first."""
        pixels = self.pixels(x)
        if self.token_grid is None:
            embedding = self.network(pixels)
            grid = embedding[:, :, None, None]
            return (grid,), Tokens(embedding[:, None], all_valid(embedding[:, None]))
        seen = self.network.forward_intermediates(pixels, indices=1, normalize_intermediates=True)
        grid = torch.einsum("ndyx,de->neyx", seen["image_intermediates"][0], self.network.proj)
        pooled = self.tokens(grid)
        values = torch.cat([seen["image_features"][:, None], pooled.values], dim=1)
        return (grid,), Tokens(values, all_valid(values))

    def pyramid(self, x: Float[Tensor, "N C Y X"]) -> tuple[Float[Tensor, "N _ _ _"], ...]:
        """Patches, or the embedding as a map of one cell."""
        return self.look(x)[0]

    def tokens(self, grid: Float[Tensor, "N D y x"]) -> Tokens:
        """Tokens pooled from patches, row by row, without the embedding."""
        return pooled(grid, self.token_grid or (1, 1))

    def sealed(self) -> dict[str, Any]:
        """Arguments that make the same tower without the file or folder."""
        return {"weights": None, "architecture": self.architecture, "mean": self.mean, "std": self.std}


def _three(name: str, values: Any) -> tuple[float, float, float]:
    if not (isinstance(values, list | tuple) and len(values) == 3 and all(type(v) in (int, float) for v in values)):
        raise ValueError(f"{name} must have three values, one a channel, got {str(values)[:60]}")
    if name == "std" and min(values) <= 0:
        raise ValueError(f"std must be above 0, got {values}")
    return float(values[0]), float(values[1]), float(values[2])
