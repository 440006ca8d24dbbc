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
from mm.encoders.base import Encoder
from mm.encoders.shared import all_valid


class ConvStem(nn.Module):
    """Halves the image until a cell is a patch; takes the place of timm's PatchEmbed.

    The first level is looked at twice, at half resolution, where one-pixel detail still is.
    """

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, *, bias: bool = True, **_: Any
    ) -> None:
        super().__init__()
        steps = round(math.log2(patch_size))
        if 2**steps != patch_size or steps < 2:
            raise ValueError(f"patch must be a power of two from 4 on with a conv stem, got {patch_size}")
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        widths = [
            in_chans,
            *(max(16, embed_dim // 2 ** (steps - level) // 16 * 16) for level in range(1, steps)),
            embed_dim,
        ]
        layers: list[nn.Module] = []
        for level, (before, after) in enumerate(pairwise(widths)):
            layers += _convolution(before, after, stride=2)
            if level == 0:
                layers += _convolution(after, after, stride=1)
        self.layers = nn.Sequential(*layers)
        self.proj = nn.Conv2d(embed_dim, embed_dim, 1, bias=bias)

    def forward(self, x: Float[Tensor, "N C Y X"]) -> Float[Tensor, "N M D"]:
        """One vector a patch, row by row."""
        return self.proj(self.layers(x)).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class ViTEncoder(Encoder):
    """Radiographs (0 black to 1 white) to patch features and tokens.

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
            options |= {"embed_layer": ConvStem, "class_token": False}
        network: Any = timm.create_model(
            name, pretrained=pretrained, img_size=image_size, in_chans=1, num_classes=0, global_pool="", **options
        )
        self.network = network
        self.width = int(network.num_features)
        self.patch_grid: tuple[int, int] = network.patch_embed.grid_size
        self.token_grid = token_grid
        # timm's fused attention is several times slower than its plain one when training in bfloat16 on a CPU.
        self._attentions = [module for module in network.modules() if hasattr(module, "fused_attn")]

    def grid(self, x: Float[Tensor, "N 1 Y X"]) -> Float[Tensor, "N D y x"]:
        """Features of each patch, in the place of the patch."""
        for module in self._attentions:
            module.fused_attn = x.is_cuda
        pixels = ((x - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)
        features = self.network.forward_features(pixels)
        patches = features[:, self.network.num_prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, self.patch_grid)  # type: ignore[no-any-return]

    def tokens(self, grid: Float[Tensor, "N D y x"]) -> Tokens:
        """Tokens pooled from patch features, row by row."""
        values = F.adaptive_avg_pool2d(grid, self.token_grid).flatten(2).transpose(1, 2)
        return Tokens(values, all_valid(values))

    def forward(self, x: Float[Tensor, "N 1 Y X"]) -> Tokens:
        """Tokens of each image."""
        return self.tokens(self.grid(x))


def _convolution(before: int, after: int, *, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    ]
