"""Lesions: what they are (dataclasses), where they lie (fields), and how they come and go over the visits.

A region (effusion, pneumothorax, opacity) is the part of a pleural cavity where a field, written in
millimetres, is above a threshold; the threshold is found on whatever lattice one renders so that the region
has its volume. Hence truth, CT and radiograph agree by construction.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float

from mm.phantom.anatomy import BodySide, Cavity
from mm.phantom.lattice import Field, Lattice, Waves, draw_waves

OpacityCode = Literal["consolidation", "atelectasis"]
Point = tuple[float, float, float]


@dataclass(frozen=True)
class Nodule:
    """An ellipsoid with the volume of a sphere of `diameter_mm`; centre in the body frame."""

    center: Point
    diameter_mm: float
    axes: Point
    hu: float


@dataclass(frozen=True)
class Opacity:
    """A consolidation (rough, with air bronchogram) or an atelectasis (flat, smooth, without)."""

    code: OpacityCode
    side: BodySide
    center: Point
    volume_ml: float
    axes: Point
    normal: Point
    roughness_mm: float
    hu: float
    bronchus_mm: float
    seed: int


@dataclass(frozen=True)
class Effusion:
    """Fluid that has sunk to the back (CT) or to the base (upright radiograph)."""

    side: BodySide
    volume_ml: float
    hu: float


@dataclass(frozen=True)
class Pneumothorax:
    """Air that has risen to the front (CT) or to the apex (upright radiograph)."""

    side: BodySide
    percent: float


@dataclass(frozen=True)
class Emphysema:
    """Low-attenuation areas: `percent` of the aerated lung is below -950 HU."""

    percent: float
    upper_mm: float
    scale_mm: float
    seed: int


@dataclass(frozen=True)
class Fracture:
    """A broken rib: the part in front of the break is shifted by `step_mm`."""

    side: BodySide
    rib: int
    angle: float
    center: Point
    step_mm: float
    gap_mm: float
    swelling_mm: float
    on_ct: bool


@dataclass(frozen=True)
class Plaque:
    """Calcium in an arterial wall."""

    center: Point
    volume_mm3: float
    axes: Point
    hu: float


@dataclass(frozen=True)
class Lesions:
    """Everything that one visit shows, the heart's size aside."""

    emphysema: Emphysema
    nodules: tuple[Nodule, ...] = field(default=())
    opacities: tuple[Opacity, ...] = field(default=())
    effusions: tuple[Effusion, ...] = field(default=())
    pneumothoraces: tuple[Pneumothorax, ...] = field(default=())
    fractures: tuple[Fracture, ...] = field(default=())
    plaques: tuple[Plaque, ...] = field(default=())


# --------------------------------------------------------------------------------------------------- fields


def effusion_field(lattice: Lattice, cavity: Cavity, *, upright: bool) -> Field:
    """Depth of a point below a fluid level, with a meniscus that climbs the wall."""
    y_weight, z_weight = (0.25, 0.90) if upright else (0.85, 0.40)
    level = np.maximum(cavity.depth, np.float32(-35.0))
    level *= np.float32(0.75)
    level += np.float32(y_weight) * lattice.y
    level -= np.float32(z_weight) * lattice.z[:, None, None]
    return np.asarray(level)


def pneumothorax_field(lattice: Lattice, cavity: Cavity, *, upright: bool) -> Field:
    """Nearness to the wall at the front or the apex, where free air collects."""
    y_weight, z_weight = (0.10, 0.55) if upright else (0.60, 0.25)
    level = np.maximum(cavity.depth, np.float32(-70.0))
    level *= np.float32(0.85)
    level -= np.float32(y_weight) * lattice.y
    level += np.float32(z_weight) * lattice.z[:, None, None]
    return np.asarray(level)


def opacity_waves(opacity: Opacity) -> Waves:
    """The unevenness of an opacity's surface."""
    return draw_waves(np.random.default_rng([opacity.seed, 5]), wavelength_mm=(22.0, 60.0))


def opacity_field(opacity: Opacity, lattice: Lattice) -> Field:
    """Minus the radius in mm from the opacity's centre, stretched along its axes and roughened."""
    basis = _basis(opacity.normal).astype(np.float32)
    dx, dy = lattice.x - np.float32(opacity.center[0]), lattice.y - np.float32(opacity.center[1])
    dz = (lattice.z - np.float32(opacity.center[2]))[:, None, None]
    total = np.zeros(lattice.shape, np.float32)
    for direction, axis in zip(basis, opacity.axes, strict=True):
        scaled = direction / np.float32(axis)
        part = (scaled[0] * dx + scaled[1] * dy) + scaled[2] * dz
        part *= part
        total += part
    np.sqrt(total, out=total)
    np.negative(total, out=total)
    total += np.float32(opacity.roughness_mm) * opacity_waves(opacity)(lattice)
    return total


def opacity_reach(opacity: Opacity) -> float:
    """Radius in mm of a ball that holds the opacity even where the lung's wall cuts much of it off."""
    ball = (opacity.volume_ml * 1e3 * 0.75 / math.pi) ** (1 / 3)
    return float(1.5 * ball * max(opacity.axes) + 2.5 * opacity.roughness_mm)


def emphysema_field(emphysema: Emphysema, lattice: Lattice) -> Field:
    """Where lung is destroyed first."""
    waves = draw_waves(
        np.random.default_rng([emphysema.seed, 6]),
        wavelength_mm=(emphysema.scale_mm, 2.2 * emphysema.scale_mm),
        count=28,
    )
    values = waves(lattice)
    values += (lattice.z * np.float32(1.0 / emphysema.upper_mm))[:, None, None]
    return values


def threshold(values: Field, weight: Field, *, amount: float, soft: float) -> float:
    """The level above which a field holds a given amount.

    Args:
        values: The field.
        weight: How much each voxel can hold (the same unit as `amount`).
        amount: How much is asked for; all of `weight` if that is less.
        soft: Width over which the region's edge fades, in units of the field.
    """
    inside = weight > 0.0
    level, room = values[inside], weight[inside]
    if len(level) == 0:
        return math.inf
    total = float(room.sum())
    if amount >= total:
        return float(level.min()) - soft
    rank = min(max(int(len(level) * (1.0 - amount / total)), 0), len(level) - 1)
    cut = float(np.partition(level, rank)[rank])
    # A few Newton steps: voxels at the wall hold less than others, and the edge is soft.
    for _ in range(4):
        share = np.clip((level - np.float32(cut)) * np.float32(1.0 / soft) + np.float32(0.5), 0.0, 1.0)
        excess = float(share @ room) - amount
        rim = (share > 0.0) & (share < 1.0)
        slope = float(room[rim].sum()) / soft
        if abs(excess) < 1e-3 * amount or slope <= 0.0:
            break
        cut += float(np.clip(excess / slope, -2.0 * soft, 2.0 * soft))
    return float(cut)


def region(values: Field, cut: float, soft: float) -> Field:
    """Share of each voxel above the threshold."""
    share = values - np.float32(cut)
    share *= np.float32(1.0 / soft)
    share += np.float32(0.5)
    return np.asarray(np.clip(share, 0.0, 1.0, out=share))


def _basis(normal: Point) -> Float[np.ndarray, "3 3"]:
    """Rows: two directions across the normal, then the normal itself."""
    last = np.array(normal) / math.sqrt(sum(item * item for item in normal))
    first = np.cross(last, np.eye(3)[int(np.argmin(np.abs(last)))])
    first /= np.linalg.norm(first)
    return np.stack([first, np.cross(last, first), last])
