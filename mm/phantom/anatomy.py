"""The healthy thorax as a few numbers, and its surfaces as signed distances on a lattice of points.

Body frame in millimetres: x to the left, y to the back, z to the head, origin at the thorax centre. The rib
cage is an ellipse that narrows towards the apex; a lung is the cage without mediastinum, spine, heart and
what lies under the diaphragm's dome. All of it is written so that a volume needs only sums and maxima of
planar [Y X] and axial [Z] fields: no root or exponential is ever taken voxel by voxel, but for the heart.
"""

# ruff: noqa: F821  # axis names in shapes

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from jaxtyping import Float

from mm.phantom.table import TABLE

BodySide = Literal["left", "right"]
BODY_SIDES: Final[tuple[BodySide, ...]] = ("left", "right")
SIGN: Final[dict[str, float]] = {"left": 1.0, "right": -1.0}
RIB_DEPTH_MM: Final = 5.5
"""Of a rib's centre line outside the inner surface of the cage."""
NUM_RIBS: Final = 11

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


@dataclass(frozen=True)
class Anatomy:
    """A patient without findings (but for the heart's size); lengths in mm, body frame.

    Attributes:
        half_width: Inner half width of the rib cage.
        half_depth: Its inner half depth, front to back.
        apex: z of the lungs' tips.
        dome: z of the diaphragm's domes (left, right) at rest.
        rise: How far the domes (left, right) stand above rest in this visit.
        wall: Thickness of ribs and muscles.
        fat: Thickness under the skin.
        heart: Centre of the heart (x, y, z).
        heart_axes: Its half axes.
        ratio: Heart width over inner thorax width.
        rib_pitch: Between neighbouring ribs.
        rib_drop: By how much a rib's front lies under its back.
        rib_top: z of the first rib at the spine.
        lung_hu: Mean density of the lungs.
        gravity_hu: How much denser the back is than the front.
        texture_hu: Standard deviation of the lungs' unevenness.
        soft_hu: Of blood and muscle.
        vessel_radius: At the hilum.
        seed: Of vessels and textures; the same in all visits.
    """

    half_width: float
    half_depth: float
    apex: float
    dome: tuple[float, float]
    rise: tuple[float, float]
    wall: float
    fat: float
    heart: tuple[float, float, float]
    heart_axes: tuple[float, float, float]
    ratio: float
    rib_pitch: float
    rib_drop: float
    rib_top: float
    lung_hu: float
    gravity_hu: float
    texture_hu: float
    soft_hu: float
    vessel_radius: float
    seed: int

    @property
    def floor(self) -> float:
        """Height of the deepest lung."""
        return min(self.dome) - 50.0

    @property
    def middle_mm(self) -> float:
        """Height of the middle of the lungs."""
        return (self.apex + self.floor) / 2 - 4.0

    @property
    def spine(self) -> tuple[float, float]:
        """(x, y) of the vertebral bodies' centre."""
        return 0.0, self.half_depth - 13.0

    @property
    def descending_aorta(self) -> tuple[float, float, float]:
        """(x, y, radius)."""
        return 21.0, self.spine[1] - 27.0, 11.5

    @property
    def ascending_aorta(self) -> tuple[float, float, float]:
        """(x, y, radius)."""
        return -16.0, max(-24.0, self.heart[1] + 6.0), 14.0

    @property
    def arch_z(self) -> float:
        """Height at which the aorta's arch starts."""
        return hilum(self, "left")[2] + 22.0

    def dome_of(self, side: BodySide) -> float:
        """Height of a dome in this visit."""
        return self.dome[BODY_SIDES.index(side)] + self.rise[BODY_SIDES.index(side)]


def draw_anatomy(rng: np.random.Generator, *, male: bool, habitus: float) -> Anatomy:
    """A thorax; `habitus` runs from 0 (lean) to 1 (obese)."""

    def uniform(limits: tuple[float, float]) -> float:
        return float(rng.uniform(*limits))

    half_width = uniform(TABLE.half_width_mm[int(male)])
    half_depth = half_width * uniform(TABLE.depth_ratio)
    height = uniform(TABLE.lung_height_mm)
    apex = height / 2
    left = apex - height + 46.0
    enlarged = rng.random() < dict(TABLE.prevalence)["cardiomegaly"]
    ratio = uniform(TABLE.cardiothoracic_enlarged if enlarged else TABLE.cardiothoracic_normal)
    width = ratio * half_width
    depth = min(0.5 * width + uniform((8.0, 14.0)), 0.5 * half_depth + 4.0)
    tall = min(max(0.62 * width + uniform((0.0, 8.0)), 40.0), 62.0)
    heart = (width * uniform((0.18, 0.30)), -half_depth + depth + uniform((6.0, 12.0)), left + tall - 22.0)
    low, high = TABLE.fat_mm
    return Anatomy(
        half_width=half_width,
        half_depth=half_depth,
        apex=apex,
        dome=(left, left + uniform((4.0, 16.0))),
        rise=(0.0, 0.0),
        wall=uniform((12.0, 18.0)),
        fat=low + (high - low) * habitus,
        heart=heart,
        heart_axes=(width, depth, tall),
        ratio=ratio,
        rib_pitch=uniform((0.098, 0.108)) * height,
        rib_drop=uniform((66.0, 96.0)),
        rib_top=apex - uniform((2.0, 12.0)),
        lung_hu=uniform(TABLE.lung_hu),
        gravity_hu=uniform(TABLE.gravity_hu),
        texture_hu=uniform(TABLE.texture_hu),
        soft_hu=uniform(TABLE.soft_hu),
        vessel_radius=uniform(TABLE.vessel_radius_mm),
        seed=int(rng.integers(2**31)),
    )


def breathe(anatomy: Anatomy, *, both: float, left: float, right: float) -> Anatomy:
    """The same patient with the domes shifted."""
    return replace(anatomy, rise=(both + left, both + right))


# -------------------------------------------------------------------------------------------------- surfaces


def narrowing(anatomy: Anatomy, z: Float[np.ndarray, "Z"]) -> Float[np.ndarray, "Z"]:
    """Width of the cage at each z relative to its widest part: 1 below, 0 above the apex."""
    start = anatomy.floor + 70.0
    up = np.clip((z - start) / (anatomy.apex - start), 0.0, 1.0)
    return np.sqrt(1.0 - up**2.6).astype(np.float32)


def cage_plane(anatomy: Anatomy, lattice: Lattice) -> tuple[Plane, Plane]:
    """(radius, millimetres per unit of radius): radius 1 is the widest inner surface of the cage.

    The signed distance to the cage in slice z is about (radius - narrowing(z)) * millimetres.
    """
    u, v = lattice.x / np.float32(anatomy.half_width), lattice.y / np.float32(anatomy.half_depth)
    radius = np.sqrt(u * u + v * v) + np.float32(1e-6)
    slope = np.sqrt((u / np.float32(anatomy.half_width)) ** 2 + (v / np.float32(anatomy.half_depth)) ** 2)
    return radius, radius / (slope + np.float32(1e-6))


def heart_radius(anatomy: Anatomy, lattice: Lattice) -> Field:
    """Radius of the heart's ellipsoid: 1 on its surface."""
    (x0, y0, z0), (a, b, c) = anatomy.heart, anatomy.heart_axes
    x = (lattice.x - np.float32(x0)) / np.float32(a)
    # The cardiac apex points to the front left: a shear leaves the width as it is.
    y = (lattice.y - np.float32(y0)) / np.float32(b) + np.float32(0.35) * x
    planar = x * x + y * y
    axial = ((lattice.z - np.float32(z0)) / np.float32(c)) ** 2
    square = axial[:, None, None] + planar
    return np.asarray(np.sqrt(square, out=square))


def dome_plane(anatomy: Anatomy, side: BodySide, lattice: Lattice) -> Plane:
    """Height of the diaphragm over the plane."""
    x0 = SIGN[side] * 0.46 * anatomy.half_width
    u = (lattice.x - np.float32(x0)) / np.float32(SIGN[side] * 0.54 * anatomy.half_width)
    # Towards the middle the domes meet in the central tendon.
    u = np.maximum(u, np.float32(-0.5) * u)
    v = (lattice.y + np.float32(12.0)) / np.float32(anatomy.half_depth)
    back = np.maximum(v, 0)
    drop = np.float32(38.0) * u * u + np.float32(16.0) * v * v + np.float32(22.0) * back * back
    return np.asarray(np.float32(anatomy.dome_of(side)) - drop)


def middle_plane(anatomy: Anatomy, side: BodySide, lattice: Lattice) -> Plane:
    """Signed distance into the mediastinum or the spine (positive inside)."""
    y = lattice.y
    bump = np.exp(-(((y - np.float32(8.0)) / np.float32(34.0)) ** 2))
    half = np.float32(7.0) + np.float32(21.0 if side == "left" else 18.0) * bump
    middle = half - np.float32(SIGN[side]) * lattice.x
    x0, y0 = anatomy.spine
    spine = np.float32(22.0) - np.hypot(lattice.x - np.float32(x0), y - np.float32(y0))
    np.maximum(middle, spine, out=middle)
    if side == "left":
        x0, y0, aorta = anatomy.descending_aorta
        np.maximum(
            middle, np.float32(aorta + 1.5) - np.hypot(lattice.x - np.float32(x0), y - np.float32(y0)), out=middle
        )
    return np.asarray(middle)


@dataclass(frozen=True)
class Cavity:
    """One pleural cavity on a lattice.

    Attributes:
        depth: Signed distance to its surface in mm, negative inside.
        coverage: Share of each voxel that lies inside, 0 to 1.
    """

    depth: Field
    coverage: Field


def cavity(anatomy: Anatomy, side: BodySide, lattice: Lattice) -> Cavity:
    """The space of a lung and its pleura."""
    radius, unit = cage_plane(anatomy, lattice)
    planar = np.maximum(middle_plane(anatomy, side, lattice), np.float32(-1e3))
    depth = radius - narrowing(anatomy, lattice.z)[:, None, None]
    depth *= unit
    np.maximum(depth, planar, out=depth)
    heart = heart_radius(anatomy, lattice)
    np.subtract(np.float32(1.0), heart, out=heart)
    heart *= np.float32(sum(anatomy.heart_axes) / 3)
    np.maximum(depth, heart, out=depth)
    edge = depth * np.float32(1.0 / lattice.soft_mm)
    under = dome_plane(anatomy, side, lattice) - lattice.z[:, None, None]
    under *= np.float32(0.8)
    np.maximum(depth, under, out=depth)
    under *= np.float32(1.0 / max(0.8 * lattice.spacing_mm[0], lattice.soft_mm))
    np.maximum(edge, under, out=edge)
    np.subtract(np.float32(0.5), edge, out=edge)
    np.clip(edge, 0.0, 1.0, out=edge)
    return Cavity(depth, edge)


def cavity_box(anatomy: Anatomy, side: BodySide, lattice: Lattice) -> Slices:
    """Index box around a pleural cavity."""
    low, high = (-3.0, anatomy.half_width + 3.0) if side == "left" else (-anatomy.half_width - 3.0, 3.0)
    depth = anatomy.half_depth + 3.0
    return lattice.box((low, -depth, anatomy.floor - 12.0), (high, depth, anatomy.apex + 4.0))


# ---------------------------------------------------------------------------------------- vessels and ribs


def hilum(anatomy: Anatomy, side: BodySide) -> tuple[float, float, float]:
    """Where vessels and bronchi enter a lung."""
    return SIGN[side] * 30.0, 8.0, 0.5 * (anatomy.apex + max(anatomy.dome)) - 18.0


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


def lung_vessels(anatomy: Anatomy, side: BodySide) -> Tubes:
    """The vessel tree of a lung: the same in every visit of a patient."""
    rng = np.random.default_rng([anatomy.seed, 3, side == "left"])
    rest = replace(anatomy, rise=(0.0, 0.0))
    lattice = side_lattice(anatomy, side, spacing_mm=(12.0, 10.0, 10.0))
    inside = np.flatnonzero(cavity(rest, side, lattice).depth < -3.0)
    chosen = rng.choice(inside, TABLE.vessel_ends, replace=len(inside) < TABLE.vessel_ends)
    ends = lattice_points(lattice, chosen) + rng.uniform(-5.0, 5.0, (len(chosen), 3))
    return branch(rng, hilum(anatomy, side), ends, radius=anatomy.vessel_radius, shrink=0.78)


def side_lattice(anatomy: Anatomy, side: BodySide, *, spacing_mm: tuple[float, float, float]) -> Lattice:
    """A regular lattice around one pleural cavity."""
    low, high = (4.0, anatomy.half_width) if side == "left" else (-anatomy.half_width, -4.0)
    depth = anatomy.half_depth
    return regular_lattice((low, -depth, anatomy.floor - 12.0), (high, depth, anatomy.apex), spacing_mm)


def lattice_points(lattice: Lattice, flat: np.ndarray) -> Float[np.ndarray, "N 3"]:
    """Body (x, y, z) of flat indices."""
    slice_, plane = np.divmod(flat, lattice.x.size)
    return np.stack([lattice.x.ravel()[plane], lattice.y.ravel()[plane], lattice.z[slice_]], 1).astype(np.float64)


def rib_drop(anatomy: Anatomy, angle: np.ndarray) -> np.ndarray:
    """How far a rib lies under its root at an angle (0 at the spine, pi at the sternum)."""
    return np.asarray(anatomy.rib_drop * np.sin(0.5 * np.minimum(angle, 2.6)) ** 2)


def rib_points(anatomy: Anatomy, side: BodySide, rib: int, angle: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N 3"]:
    """Centre line of a rib (0 is the first) at angles from the spine (0) to the sternum (pi)."""
    z = anatomy.rib_top - anatomy.rib_pitch * rib - rib_drop(anatomy, angle)
    scale = np.maximum(narrowing(anatomy, z), 0.05)
    x = SIGN[side] * (anatomy.half_width * scale + RIB_DEPTH_MM) * np.sin(angle)
    y = (anatomy.half_depth * scale + RIB_DEPTH_MM) * np.cos(angle)
    return np.stack([x, y, z], 1)


# -------------------------------------------------------------------------------------------------- textures


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
