"""The healthy thorax as a few numbers, and its surfaces as signed distances on a lattice of points.

Body frame in millimetres: x to the left, y to the back, z to the head, origin at the thorax centre. The rib
cage is an ellipse that narrows towards the apex; a lung is the cage without mediastinum, spine, heart and
what lies under the diaphragm's dome. All of it is written so that a volume needs only sums and maxima of
planar [Y X] and axial [Z] fields: no root or exponential is ever taken voxel by voxel, but for the heart.
"""

# ruff: noqa: F821  # axis names in shapes

from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from jaxtyping import Float

from mm.phantom.lattice import Field, Lattice, Plane, Slices, Tubes, branch, lattice_points, regular_lattice
from mm.phantom.table import TABLE

BodySide = Literal["left", "right"]
BODY_SIDES: Final[tuple[BodySide, ...]] = ("left", "right")


SIGN: Final[dict[str, float]] = {"left": 1.0, "right": -1.0}


RIB_DEPTH_MM: Final = 5.5
"""Of a rib's centre line outside the inner surface of the cage."""


NUM_RIBS: Final = 11


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


def hilum(anatomy: Anatomy, side: BodySide) -> tuple[float, float, float]:
    """Where vessels and bronchi enter a lung."""
    return SIGN[side] * 30.0, 8.0, 0.5 * (anatomy.apex + max(anatomy.dome)) - 18.0


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
