"""What the voxels under each cell of a feature pyramid say by themselves: greatest, mean and least, in HU windows.

A plaque of 50 mm3 or a nodule of 5 mm is one or two voxels bright and as small as noise to a convolution that averages
before it decides. The greatest voxel of a cell keeps it, the least says that the cell isn't bone through and through,
and the contrast with the voxels around it is the same on every background (top-hat transform in spirit; Meyer 1979).
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
NUM_STATISTICS: Final = 3 * (len(WINDOWS_HU) + len(CONTRASTS_HU))


@torch.no_grad()
def cell_statistics(x: Float[Tensor, "N 1 Z Y X"]) -> Float[Tensor, "N C z y x"]:
    """Greatest, mean and least of each cell in every window, and of the contrasts; -1 to 1, C is `NUM_STATISTICS`.

    Args:
        x: HU; its axes are multiples of `CELL`.
    """
    x = x[:, 0].float()
    scaled = [(x - (high + low) / 2) * (2 / (high - low)) for low, high in WINDOWS_HU]
    clear = [x.clamp(low, high) for low, high in CONTRASTS_HU]
    contrasts = [(values - _mean_around(values)) / CONTRAST_HU for values in clear]
    rows = []
    for values in (*scaled, *contrasts):
        cells = _cells(values.clamp(-1, 1))
        rows += [cells.amax(-1), cells.mean(-1), cells.amin(-1)]
    return torch.stack(rows, dim=1)


def _mean_around(x: Float[Tensor, "N Z Y X"]) -> Float[Tensor, "N Z Y X"]:
    """Mean of the box `AROUND` each voxel, one axis after the other; at the border of the part that is there."""
    x = x[:, None]
    for axis, size in enumerate(AROUND):
        kernel = tuple(size if i == axis else 1 for i in range(3))
        padding = tuple(n // 2 for n in kernel)
        x = F.avg_pool3d(x, kernel, stride=1, padding=padding, count_include_pad=False)
    return x[:, 0]


def _cells(x: Float[Tensor, "N Z Y X"]) -> Float[Tensor, "N z y x voxels"]:
    """The voxels of each cell side by side."""
    n, (sz, sy, sx) = len(x), CELL
    z, y, x_cells = (size // step for size, step in zip(x.shape[1:], CELL, strict=True))
    return x.reshape(n, z, sz, y, sy, x_cells, sx).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
