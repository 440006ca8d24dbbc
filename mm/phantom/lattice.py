"""Points in a patient, and smooth fields and branching tubes that can be evaluated on any set of them."""

# ruff: noqa: F821  # axis names in shapes

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

Plane = Float[np.ndarray, "Y X"]
Field = Float[np.ndarray, "Z Y X"]
Slices = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Lattice:
    """Points at which a patient is evaluated: planar coordinates times axial ones.

    Attributes:
        x: Body x of every column.
        y: Body y of every column.
        z: Body z of every slice.
        spacing_mm: Between points (z, y, x).
        to_index: 3x4, body (x, y, z, 1) to index (z, y, x).
    """

    x: Plane
    y: Plane
    z: Float[np.ndarray, "Z"]
    spacing_mm: tuple[float, float, float]
    to_index: Float[np.ndarray, "3 4"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Points (z, y, x)."""
        return (len(self.z), *self.x.shape)

    @property
    def voxel_mm3(self) -> float:
        """Volume that a point stands for."""
        return math.prod(self.spacing_mm)

    @property
    def soft_mm(self) -> float:
        """Width of an edge in the plane; wider where the lattice is coarse along y, or projections would ripple."""
        return max(self.spacing_mm[2], 0.6 * self.spacing_mm[1])

    def index(self, points: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
        """Index coordinates (z, y, x) of body points (x, y, z)."""
        return np.asarray(points @ self.to_index[:, :3].T + self.to_index[:, 3])

    def box(self, low: tuple[float, float, float], high: tuple[float, float, float]) -> Slices:
        """Index box around the body box low..high (x, y, z); may be empty."""
        corners = np.array([[(low, high)[bit >> axis & 1][axis] for axis in range(3)] for bit in range(8)])
        index = self.index(corners)
        start = np.clip(np.floor(index.min(0)).astype(int), 0, self.shape)
        stop = np.clip(np.ceil(index.max(0)).astype(int) + 1, 0, self.shape)
        return tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))  # type: ignore[return-value]

    def crop(self, box: Slices) -> "Lattice":
        """The part of the lattice in an index box."""
        shift = self.to_index.copy()
        shift[:, 3] -= [item.start for item in box]
        return replace(self, x=self.x[box[1:]], y=self.y[box[1:]], z=self.z[box[0]], to_index=shift)


def regular_lattice(
    low: tuple[float, float, float], high: tuple[float, float, float], spacing_mm: tuple[float, float, float]
) -> Lattice:
    """A lattice along the body axes; low and high are (x, y, z), the spacing is (z, y, x)."""
    x, y, z = (
        np.arange(a, b + step / 2, step, dtype=np.float32)
        for a, b, step in zip(low, high, spacing_mm[::-1], strict=True)
    )
    planar_y, planar_x = np.meshgrid(y, x, indexing="ij")
    dz, dy, dx = spacing_mm
    to_index = np.array([[0, 0, 1 / dz, -low[2] / dz], [0, 1 / dy, 0, -low[1] / dy], [1 / dx, 0, 0, -low[0] / dx]])
    return Lattice(planar_x, planar_y, z, spacing_mm, to_index)


def lattice_points(lattice: Lattice, flat: np.ndarray) -> Float[np.ndarray, "N 3"]:
    """Body (x, y, z) of flat indices."""
    slice_, plane = np.divmod(flat, lattice.x.size)
    return np.stack([lattice.x.ravel()[plane], lattice.y.ravel()[plane], lattice.z[slice_]], 1).astype(np.float64)


@dataclass(frozen=True)
class Waves:
    """A smooth random field as a sum of plane waves: cheap on any lattice, the same on all of them."""

    vectors: Float[np.ndarray, "W 3"]
    phases: Float[np.ndarray, "W"]

    def __call__(self, lattice: Lattice) -> Field:
        """Values of about zero mean and unit variance."""
        vectors = self.vectors.astype(np.float32)
        planar = vectors[:, 0, None] * lattice.x.ravel() + vectors[:, 1, None] * lattice.y.ravel()
        planar += self.phases.astype(np.float32)[:, None]
        axial = lattice.z[:, None] * vectors[:, 2]
        left = np.concatenate([np.sin(axial), np.cos(axial)], 1)
        right = np.concatenate([np.cos(planar), np.sin(planar)], 0)
        left *= np.float32(math.sqrt(2.0 / len(vectors)))
        return np.asarray((left @ right).reshape(lattice.shape))


def draw_waves(rng: np.random.Generator, *, wavelength_mm: tuple[float, float], count: int = 20) -> Waves:
    """Waves of random direction with wavelengths in a range."""
    direction = rng.normal(size=(count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    vectors = direction * (2 * math.pi / rng.uniform(*wavelength_mm, (count, 1)))
    return Waves(vectors, rng.uniform(0.0, 2 * math.pi, count))


@dataclass(frozen=True)
class Tubes:
    """Points along branching tubes: position, radius, and the length of tube that each stands for."""

    points: Float[np.ndarray, "N 3"]
    radius: Float[np.ndarray, "N"]
    length: Float[np.ndarray, "N"]


def branch(
    rng: np.random.Generator,
    root: tuple[float, float, float],
    ends: Float[np.ndarray, "E 3"],
    *,
    radius: float,
    shrink: float,
    stride: float = 0.45,
) -> Tubes:
    """A binary tree from `root` to a power of two of `ends`, halved level by level along their longest axis.

    Args:
        rng: Bends the tubes.
        root: Where the tree starts.
        ends: Where it ends; E a power of two.
        radius: Of the first tubes.
        shrink: Radius of a daughter over that of its mother.
        stride: How far a tube runs towards the middle of what it serves.
    """
    levels = int(math.log2(len(ends)))
    groups = ends[None]
    mother = np.array([root], dtype=np.float64)
    points, radii, lengths = [], [], []
    for level in range(1, levels + 1):
        axis = np.ptp(groups, axis=1).argmax(1)
        order = np.take_along_axis(groups, axis[:, None, None], axis=2)[:, :, 0].argsort(1)
        groups = np.take_along_axis(groups, order[:, :, None], axis=1).reshape(2**level, -1, 3)
        start = np.repeat(mother, 2, axis=0)
        goal = groups.mean(1)
        stop = goal if level == levels else start + stride * (goal - start)
        run = stop - start
        reach = np.linalg.norm(run, axis=1)
        count = max(2, int(reach.max() / 2.0))
        along = (np.arange(count) + 0.5) / count
        bend = rng.normal(0.0, 0.08, run.shape) * reach[:, None]
        path = start[:, None] + along[:, None] * run[:, None] + np.sin(np.pi * along)[:, None] * bend[:, None]
        points.append(path.reshape(-1, 3))
        radii.append(np.full(path.shape[0] * count, radius * shrink ** (level - 1)))
        lengths.append(np.repeat(reach / count, count))
        mother = stop
    return Tubes(np.concatenate(points), np.concatenate(radii), np.concatenate(lengths))
