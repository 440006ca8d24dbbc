"""Vision transformer on radiographs: any of timm's by name, with a convolutional stem where it is ours.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021); stem after Xiao et al., "Early Convolutions Help
Transformers See Better" (NeurIPS 2021): a step of one pixel in a rib is lost in a flat projection of 16x16 patches.
"""

import math
from itertools import pairwise
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.batch import Tokens
from mm.encoders.base import ImageEncoder
from mm.encoders.shared import pooled

LOCAL = 9
"""Pixels across which local contrast is taken: 13 mm, as wide as a rib."""
LOCAL_GAIN = 8.0
"""A break in a rib is an eighth as deep as the step from lung to heart."""


class ConvStem(nn.Module):
    """Halves an image until a cell is a patch; each level but the last is looked at twice.

    Beside the image goes its local contrast. A break is a line of one pixel whose grey differs by a hundredth of the
    range: without it the break is found after several times as many patients.

    Args:
        patch: Pixels a patch.
        width: Of patches; the levels before have a half, a quarter ... of it, in steps of 16.
    """

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        steps = round(math.log2(patch))
        if 2**steps != patch or steps < 2:
            raise ValueError(f"patch must be a power of two from 4 on with a conv stem, got {patch}")
        halves = [math.ceil(width / 2 ** (steps - level) / 16) * 16 for level in range(1, steps)]
        layers: list[nn.Module] = []
        for before, after in pairwise([2, *halves]):
            layers += [*_convolution(before, after, stride=2), *_convolution(after, after, stride=1)]
        self.fine = nn.Sequential(*layers)
        self.coarse = nn.Sequential(*_convolution(halves[-1], width, stride=2), nn.Conv2d(width, width, 1))
        self.widths = (halves[-1], width)

    def forward(self, x: Float[Tensor, "N 1 Y X"]) -> tuple[Float[Tensor, "N E y2 x2"], Float[Tensor, "N D y x"]]:
        """Features of half a patch, and of each patch."""
        smooth = F.avg_pool2d(x, LOCAL, stride=1, padding=LOCAL // 2, count_include_pad=False)
        both = torch.cat([x, LOCAL_GAIN * (x - smooth)], dim=1).contiguous(memory_format=torch.channels_last)
        fine = self.fine(both)
        return fine, self.coarse(fine)


class Embedded(nn.Module):
    """Stands where timm embeds patches: what comes is embedded already."""

    def __init__(self, img_size: int, patch_size: int, **_: Any) -> None:
        super().__init__()
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward(self, patches: Float[Tensor, "N M D"]) -> Float[Tensor, "N M D"]:
        """The same."""
        return patches


class ViTEncoder(ImageEncoder):
    """Radiographs (0 black to 1 white) to a pyramid of features, and to tokens.

    Args:
        name: A timm vision transformer.
        image_size: Height and width in pixels.
        patch: Pixels a patch; None for the model's own, like the next three.
        width: Of tokens.
        depth: Number of blocks.
        heads: Number of heads.
        stem: "conv" for a convolutional stem, "patch" for timm's own projection, which pretrained weights need.
        token_grid: Tokens along y and x, pooled from the patches.
        pretrained: Load timm's weights (a download) into an unchanged model.
    """

    def __init__(
        self,
        *,
        name: str = "vit_tiny_patch16_224",
        image_size: int = 256,
        patch: int | None = 16,
        width: int | None = 160,
        depth: int | None = 5,
        heads: int | None = 2,
        stem: Literal["conv", "patch"] = "conv",
        token_grid: tuple[int, int] = (8, 8),
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        if patch is not None and image_size % patch:
            raise ValueError(f"image_size must be a multiple of patch, got {image_size} and {patch}")
        sizes = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
        options: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
        if stem == "conv":
            if pretrained:
                raise ValueError('pretrained weights have no conv stem: allowed is stem="patch", got stem="conv"')
            # No class token: 256 tokens instead of 257 go through the matrix kernels without a remainder.
            options |= {"embed_layer": Embedded, "class_token": False}
        network: Any = timm.create_model(
            name, pretrained=pretrained, img_size=image_size, in_chans=1, num_classes=0, global_pool="", **options
        )
        self.network = network
        self.width = int(network.num_features)
        self.patch_grid: tuple[int, int] = network.patch_embed.grid_size
        cell = image_size // self.patch_grid[0]
        self.stem = ConvStem(cell, self.width) if stem == "conv" else None
        self.widths = (self.width,) if self.stem is None else self.stem.widths
        self.stride = cell if self.stem is None else cell // 2
        self.token_grid = token_grid
        # timm's fused attention is several times slower than its plain one when training in bfloat16 on a CPU.
        self._attentions = [module for module in network.modules() if hasattr(module, "fused_attn")]

    def pyramid(self, x: Float[Tensor, "N 1 Y X"]) -> tuple[Float[Tensor, "N _ _ _"], ...]:
        """Features in their places, the finest level first: half patches (of a conv stem alone), then patches."""
        for module in self._attentions:
            module.fused_attn = x.is_cuda
        pixels = (x - 0.5) / 0.25
        if self.stem is None:
            return (self._grid(pixels.contiguous(memory_format=torch.channels_last)),)
        fine, patches = self.stem(pixels)
        return fine, self._grid(patches.flatten(2).transpose(1, 2))

    def _grid(self, x: Tensor) -> Float[Tensor, "N D y x"]:
        patches = self.network.forward_features(x)[:, self.network.num_prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, self.patch_grid)  # type: ignore[no-any-return]

    def tokens(self, grid: Float[Tensor, "N D y x"]) -> Tokens:
        """Tokens pooled from patch features, row by row."""
        return pooled(grid, self.token_grid)


def _convolution(before: int, after: int, *, stride: int) -> list[nn.Module]:
    # An even kernel where it halves: an odd one looks half a cell further up and left than down and right.
    return [
        nn.Conv2d(before, after, 4 if stride == 2 else 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    ]
