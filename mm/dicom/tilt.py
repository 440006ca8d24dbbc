"""Gantry tilt undone: slices that are sheared against their normal, resampled to an orthogonal grid.

Every slice is shifted within its own plane, linearly between neighbours along columns and rows, so nothing is
interpolated between slices. The grid is as large as it must be to keep every stored pixel.
"""

import math

import numpy as np
from jaxtyping import Float


def _shifted(plane: Float[np.ndarray, "Y X"], shift: float, out: Float[np.ndarray, "V X"], *, outside: float) -> None:
    """Row `r` of the result is row `r - shift` of the plane; `outside` where it lies beyond the first or last row."""
    whole = math.floor(shift)
    share = shift - whole  # 0 <= share < 1: row r lies between r - whole - 1 and r - whole
    out[:] = outside
    if share < 1e-6:
        out[whole : whole + len(plane)] = plane
        return
    out[whole + 1 : whole + len(plane)] = share * plane[:-1] + (1 - share) * plane[1:]


def straightened(
    voxels: Float[np.ndarray, "Z Y X"], affine: Float[np.ndarray, "4 4"], *, outside: float
) -> tuple[Float[np.ndarray, "Z V W"], Float[np.ndarray, "4 4"]]:
    """The same volume on a grid whose slices follow their normal.

    Args:
        voxels: As stored.
        affine: Index (z, y, x, 1) to LPS mm, column 0 sheared.
        outside: Value where no slice reaches.

    Returns:
        Float32 voxels, at least as many rows and columns, and the orthogonal affine. Slice `z` lies in the plane of
        stored slice `z`.
    """
    count, rows, columns = voxels.shape
    down, right = affine[:3, 1], affine[:3, 2]
    step = affine[:3, 0]
    # How far a slice lies down and right of the one before, in pixels; the rest of the step is along the normal.
    per_slice = np.linalg.lstsq(np.stack([down, right], axis=1), step, rcond=None)[0]
    ends = per_slice * (count - 1)
    before = np.ceil(np.maximum(0.0, -ends) - 1e-6)
    more = np.ceil(np.abs(ends) - 1e-6).astype(int)
    result = np.empty((count, rows + more[0], columns + more[1]), dtype=np.float32)
    wide = np.empty((columns + more[1], rows), dtype=np.float32)
    for z in range(count):
        shift_down, shift_right = (before + z * per_slice).tolist()
        _shifted(voxels[z].T, max(0.0, shift_right), wide, outside=outside)
        _shifted(wide.T, max(0.0, shift_down), result[z], outside=outside)
    straight = affine.copy()
    straight[:3, 0] = step - down * per_slice[0] - right * per_slice[1]
    straight[:3, 3] = affine[:3, 3] - down * before[0] - right * before[1]
    return result, straight
