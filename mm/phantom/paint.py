"""Partial volume: what share of each voxel a tube, an ellipsoid or a disc takes."""

# ruff: noqa: F821  # axis names in shapes

import math

import numpy as np
from jaxtyping import Float

from mm.phantom.lattice import Field, Lattice, Plane, Slices, Tubes

# A tube wider than a voxel is splatted as a cluster of points, or its core would overflow a single voxel.
_CLUSTER = 0.62 * np.array(
    [[0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], dtype=np.float64
)


def splat(tubes: Tubes, lattice: Lattice) -> Field:
    """Share of each voxel that the tubes take, with the tubes' volume kept (but where they overlap)."""
    volume = math.pi * tubes.radius**2 * tubes.length
    wide = tubes.radius > 0.5 * lattice.soft_mm
    cluster = tubes.points[wide, None] + tubes.radius[wide, None, None] * _CLUSTER
    points = np.concatenate([tubes.points[~wide], cluster.reshape(-1, 3)])
    mass = np.concatenate([volume[~wide], np.repeat(volume[wide] / len(_CLUSTER), len(_CLUSTER))])
    index = lattice.index(points)
    shape = np.array(lattice.shape)
    inside = ((index >= 0) & (index < shape - 1)).all(1)
    index, mass = index[inside], mass[inside] / lattice.voxel_mm3
    base = index.astype(np.int64)
    part = index - base
    flat = (base[:, 0] * shape[1] + base[:, 1]) * shape[2] + base[:, 2]
    cells, weights = [], []
    for corner in range(8):
        bits = corner >> 2 & 1, corner >> 1 & 1, corner & 1
        weight = mass.copy()
        for axis, bit in enumerate(bits):
            weight *= part[:, axis] if bit else 1.0 - part[:, axis]
        cells.append(flat + (bits[0] * shape[1] + bits[1]) * shape[2] + bits[2])
        weights.append(weight)
    total = np.bincount(np.concatenate(cells), np.concatenate(weights), minlength=int(shape.prod()))
    return np.minimum(total, 1.0).astype(np.float32).reshape(lattice.shape)


def ellipsoid(
    lattice: Lattice, center: tuple[float, float, float], half_axes: tuple[float, float, float]
) -> tuple[Slices, Field]:
    """Index box and share of each voxel in it of an ellipsoid along the body axes; its volume is kept."""
    reach = tuple(axis + max(lattice.spacing_mm) for axis in half_axes)
    low = tuple(a - b for a, b in zip(center, reach, strict=True))
    high = tuple(a + b for a, b in zip(center, reach, strict=True))
    box = lattice.box(low, high)  # type: ignore[arg-type]
    part = lattice.crop(box)
    if 0 in part.shape:
        return box, np.zeros(part.shape, np.float32)
    fine = 5 if max(half_axes) < 4.0 else 3 if max(half_axes) < 12.0 else 2
    steps = (np.arange(fine) + 0.5) / fine - 0.5
    # Body shifts of the sub-points: one index step along each axis, in body millimetres.
    unit = np.linalg.inv(lattice.to_index[:, :3])
    x, y = part.x[..., None, None].astype(np.float64), part.y[..., None, None].astype(np.float64)
    down, across = steps[:, None], steps[None, :]
    x = (x + unit[0, 1] * down + unit[0, 2] * across - center[0]) / half_axes[0]
    y = (y + unit[1, 1] * down + unit[1, 2] * across - center[1]) / half_axes[1]
    planar = (x * x + y * y).reshape(*part.x.shape, fine * fine).astype(np.float32)
    z = ((part.z[:, None] + unit[2, 0] * steps - center[2]) / half_axes[2]).astype(np.float32)
    room = 1.0 - z * z
    share = np.zeros(part.shape, np.float32)
    for slice_ in range(len(part.z)):
        if room[slice_].max() <= 0.0:
            continue
        share[slice_] = sum((planar < item).mean(-1, dtype=np.float32) for item in room[slice_]) / fine
    total = float(share.sum()) * lattice.voxel_mm3
    wanted = 4 / 3 * math.pi * math.prod(half_axes)
    whole = all(item.start > 0 and item.stop < size for item, size in zip(box, lattice.shape, strict=True))
    if whole and total > 0.0:
        share *= wanted / total
    return box, share


def disc(lattice: Lattice, x: float, y: float, radius: float) -> Plane:
    """Share of each pixel of the plane that a disc takes."""
    edge = np.hypot(lattice.x - x, lattice.y - y)
    edge -= radius
    edge *= -1.0 / lattice.soft_mm
    edge += 0.5
    return np.asarray(np.clip(edge, 0.0, 1.0, out=edge), dtype=np.float32)


def blend(voxels: Field, share: Field | Plane, hu: float | Field | Plane) -> None:
    """Mixes a density into voxels by the share that it takes, in place."""
    change = hu - voxels
    change *= share
    voxels += change


def span(z: Float[np.ndarray, "Z"], low: float, high: float, soft: float) -> Float[np.ndarray, "Z 1 1"]:
    """Share of each slice between two heights."""
    share = np.clip((z - low) / soft + 0.5, 0.0, 1.0) * np.clip((high - z) / soft + 0.5, 0.0, 1.0)
    return share.astype(np.float32)[:, None, None]
