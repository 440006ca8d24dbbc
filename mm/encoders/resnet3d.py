"""3-D residual network on CT, with a pyramid for dense findings.

Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition" (CVPR 2018): R3D. Parameter
names are torchvision's VideoResNet's: at depth 18 and width 64 its weights load and outputs are equal.
"""

from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.batch import Tokens
from mm.encoders.base import Encoder
from mm.encoders.cells import NUM_STATISTICS, cell_statistics
from mm.encoders.shared import all_valid
from mm.encoders.weights import fill, read_weights

Depth = Literal[10, 18, 34]
BLOCKS: Final[dict[int, tuple[int, int, int, int]]] = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
STRIDES: Final = ((1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16))
"""Strides (z, y, x) of the four pyramid levels."""


class BasicBlock(nn.Module):
    """Two 3x3x3 convolutions and a shortcut."""

    def __init__(self, in_width: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv3d(in_width, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        )
        self.conv2 = nn.Sequential(nn.Conv3d(width, width, 3, padding=1, bias=False), nn.BatchNorm3d(width))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_width != width:
            self.downsample = nn.Sequential(
                nn.Conv3d(in_width, width, 1, stride=stride, bias=False), nn.BatchNorm3d(width)
            )

    def forward(self, x: Float[Tensor, "N C Z Y X"]) -> Float[Tensor, "N D z y x"]:
        """The next feature map."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.conv2(self.conv1(x)).add_(shortcut))  # type: ignore[no-any-return]


class ResNet3D(nn.Module):
    """The network itself, on three channels. Give it channels-last input: it trains up to twice as fast on a CPU.

    Args:
        width: Channels of the first level; the others have 2, 4 and 8 times as many.
        depth: 10, 18 or 34 layers.
        stem_kernel: Of the first convolution, odd; torchvision's weights need (3, 7, 7).
        num_classes: Outputs of a classifier `fc`, which torchvision's weights have; 0 for none.
    """

    def __init__(
        self, *, width: int = 64, depth: Depth = 18, num_classes: int = 0, stem_kernel: tuple[int, int, int] = (3, 7, 7)
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {sorted(BLOCKS)}, got {depth}")
        self.stem = nn.Sequential(
            nn.Conv3d(3, width, stem_kernel, stride=(1, 2, 2), padding=_half(stem_kernel), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        )
        one, two, three, four = BLOCKS[depth]
        self.layer1 = _stage(width, width, blocks=one, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks=two, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks=three, stride=2)
        self.layer4 = _stage(4 * width, 8 * width, blocks=four, stride=2)
        self.fc = nn.Linear(8 * width, num_classes) if num_classes else None
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last_3d)  # as their gradients come, which else are copied each step

    def pyramid(self, x: Float[Tensor, "N 3 Z Y X"]) -> tuple[Float[Tensor, "N _ _ _ _"], ...]:
        """Feature maps at `STRIDES`, finest first."""
        first = self.layer1(self.stem(x))
        second = self.layer2(first)
        third = self.layer3(second)
        return first, second, third, self.layer4(third)

    def forward(self, x: Float[Tensor, "N 3 Z Y X"]) -> Float[Tensor, "N D"]:
        """Class scores, or the pooled features where there is no classifier."""
        pooled = self.pyramid(x)[-1].mean((2, 3, 4))
        return pooled if self.fc is None else self.fc(pooled)


class ResNet3DEncoder(Encoder):
    """CT volumes in Hounsfield units to a feature pyramid and tokens.

    Three windows make the three channels, so that lung, soft tissue and bone are each seen with contrast.

    Args:
        width: Channels of the first pyramid level: 16, 24 or 64 (torchvision's).
        depth: 10, 18 or 34.
        windows: Lower and upper HU of the three channels; values outside are clamped.
        token_grid: Tokens along z, y and x, pooled from the coarsest level.
        stem_kernel: (3, 7, 7) is torchvision's; (3, 3, 3) takes about a tenth off the time of a training step.
        statistics: Puts a level of `mm.encoders.cells` before the network's own four, which has no weights: for what
            is a voxel or two wide, such as arterial calcium.
        weights: File with the weights of torchvision's VideoResNet or of another run (safetensors, or torch.save of
            a state dict), with these sizes; its classifier is left out. None for random weights.

    Raises:
        ValueError: Sizes that make no network, windows that are none, or weights that don't fit.
    """

    def __init__(
        self,
        *,
        width: int = 16,
        depth: Depth = 10,
        windows: tuple[tuple[float, float], tuple[float, float], tuple[float, float]] = (
            (-1000.0, -200.0),
            (-160.0, 240.0),
            (-1000.0, 1000.0),
        ),
        token_grid: tuple[int, int, int] = (4, 4, 4),
        stem_kernel: tuple[int, int, int] = (3, 7, 7),
        statistics: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if any(low >= high for low, high in windows):
            raise ValueError(f"windows must be (lower, upper) pairs in HU, got {windows}")
        self.windows = windows
        self.network = ResNet3D(width=width, depth=depth, stem_kernel=stem_kernel)
        if weights is not None:
            given = read_weights(weights)
            fill(self.network, {k: v for k, v in given.items() if not k.startswith("fc.")}, path=weights)
        self.width = 8 * width
        self.statistics = statistics
        levels = (width, 2 * width, 4 * width, 8 * width)
        self.widths = (NUM_STATISTICS, *levels) if statistics else levels
        self.token_grid = token_grid
        self.position = nn.Embedding(token_grid[0] * token_grid[1] * token_grid[2], self.width)
        nn.init.trunc_normal_(self.position.weight, std=0.02)

    def window(self, x: Float[Tensor, "N 1 Z Y X"]) -> Float[Tensor, "N 3 Z Y X"]:
        """HU to -1..1 in each window, laid out channels last: the convolutions keep it and are twice as fast."""
        channels = [
            (x[:, 0] * (2 / (high - low)) - (high + low) / (high - low)).clamp(-1, 1) for low, high in self.windows
        ]
        return torch.stack(channels, dim=-1).permute(0, 4, 1, 2, 3)

    def pyramid(self, x: Float[Tensor, "N 1 Z Y X"]) -> tuple[Float[Tensor, "N _ _ _ _"], ...]:
        """Feature maps at `STRIDES` with `self.widths` channels, finest first; before them the cells' statistics."""
        levels = self.network.pyramid(self.window(x))
        return (cell_statistics(x), *levels) if self.statistics else levels

    def tokens(self, coarsest: Float[Tensor, "N D z y x"]) -> Tokens:
        """Tokens from the coarsest level of a pyramid, in z, y, x order, with a learned place each."""
        pooled = F.adaptive_avg_pool3d(coarsest, self.token_grid).flatten(2).transpose(1, 2)
        values = pooled + self.position.weight
        return Tokens(values, all_valid(values))

    def forward(self, x: Float[Tensor, "N 1 Z Y X"]) -> Tokens:
        """Tokens of each volume."""
        return self.tokens(self.pyramid(x)[-1])

    def sealed(self) -> dict[str, Any]:
        """Arguments that make the same network without the file."""
        return {"weights": None}


def _stage(in_width: int, width: int, *, blocks: int, stride: int) -> nn.Sequential:
    rest = [BasicBlock(width, width, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(in_width, width, stride=stride), *rest)


def _half(kernel: tuple[int, int, int]) -> tuple[int, int, int]:
    if any(size % 2 == 0 for size in kernel):
        raise ValueError(f"stem_kernel must be three odd sizes, got {kernel}")
    return kernel[0] // 2, kernel[1] // 2, kernel[2] // 2
