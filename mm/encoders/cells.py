"""What the voxels under each cell of a feature pyramid say by themselves: greatest, mean and least, in HU windows.

A plaque of 50 mm3 or a nodule of 5 mm is one or two voxels bright and as small as noise to a convolution that averages
before it decides. The greatest voxel of a cell keeps it, the least says that the cell isn't bone through and through,
and the contrast with the voxels around it is the same on every background (top-hat transform in spirit; Meyer 1979).
A cell of 10 x 11 x 11 mm can hold an artery's wall and a vertebra's: where in it the bright voxel lies is told as well.
"""

from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CELL: Final = (2, 4, 4)
"""Voxels (z, y, x) a cell: those of the second level of the 3-D ResNet's pyramid."""
AROUND: Final = (3, 5, 5)
"""Voxels (z, y, x) that a voxel is compared with."""
WINDOWS_HU: Final = ((-1000.0, -200.0), (-160.0, 240.0), (50.0, 550.0))
"""Lung, soft tissue, calcium."""
CONTRASTS_HU: Final = ((-1000.0, 200.0), (-200.0, 800.0))
"""What counts in lung and in soft tissue: beside the lung a plaque must not be measured against air."""
CONTRAST_HU: Final = 300.0
PART: Final = (1, 2, 2)
"""Voxels (z, y, x) of each of the eight parts of a cell that are told of the last window and of the last contrast."""
NUM_STATISTICS: Final = 3 * (len(WINDOWS_HU) + len(CONTRASTS_HU)) + 2 * 8


@torch.no_grad()
def cell_statistics(x: Float[Tensor, "N 1 Z Y X"]) -> Float[Tensor, "N C z y x"]:
    """Greatest, mean and least of each cell in every window, and of the contrasts; then the greatest of its parts.

    From -1 to 1; C is `NUM_STATISTICS`.

    Args:
        x: HU; its axes are multiples of `CELL`.
    """
    x = x[:, 0].float()
    scaled = [(x - (high + low) / 2) * (2 / (high - low)) for low, high in WINDOWS_HU]
    clear = [x.clamp(low, high) for low, high in CONTRASTS_HU]
    contrasts = [(values - _mean_around(values)) / CONTRAST_HU for values in clear]
    rows = []
    for values in (*scaled, *contrasts):
        cells = _cells(values.clamp_(-1, 1))
        rows += [cells.amax(-1), cells.mean(-1), cells.amin(-1)]
    parts = [_parts(values) for values in (contrasts[-1], scaled[-1])]
    return torch.cat([torch.stack(rows, dim=1), *parts], dim=1)


def _mean_around(x: Float[Tensor, "N Z Y X"]) -> Float[Tensor, "N Z Y X"]:
    """Mean of the box `AROUND` each voxel, one axis after the other; at the border of the part that is there.

    Sums of shifted copies: pooling of stride 1 (`F.avg_pool3d`) is the same and takes two to five times as long.
    """
    for axis, size in enumerate(AROUND, start=1):
        half, length = size // 2, x.shape[axis]
        total, number = x.clone(), torch.ones(length, device=x.device)
        for step in range(1, min(half, length - 1) + 1):
            rest = length - step
            for here, there in ((0, step), (step, 0)):
                total.narrow(axis, here, rest).add_(x.narrow(axis, there, rest))
                number[here : here + rest] += 1
        x = total / number.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    return x


def _cells(x: Float[Tensor, "N Z Y X"]) -> Float[Tensor, "N z y x voxels"]:
    """The voxels of each cell side by side."""
    n, (sz, sy, sx) = len(x), CELL
    z, y, x_cells = (size // step for size, step in zip(x.shape[1:], CELL, strict=True))
    return x.reshape(n, z, sz, y, sy, x_cells, sx).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)


def _parts(x: Float[Tensor, "N Z Y X"]) -> Float[Tensor, "N 8 z y x"]:
    """Greatest of each part of each cell, parts in the order z, y, x."""
    pooled = F.max_pool3d(x, PART)
    n, z, y, x_parts = pooled.shape
    split = pooled.reshape(n, z // 2, 2, y // 2, 2, x_parts // 2, 2)
    return split.permute(0, 2, 4, 6, 1, 3, 5).flatten(1, 3)
