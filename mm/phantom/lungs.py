"""What fills a pleural cavity: lung, vessels, and every lesion of lung and pleura, on any lattice."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int32

from mm.ontology import INDEX
from mm.phantom.anatomy import Anatomy, BodySide, Cavity, cavity, cavity_box, hilum, lung_vessels
from mm.phantom.findings import (
    Emphysema,
    Lesions,
    Nodule,
    Opacity,
    Pneumothorax,
    effusion_field,
    emphysema_field,
    opacity_field,
    opacity_reach,
    pneumothorax_field,
    region,
    threshold,
)
from mm.phantom.lattice import Field, Lattice, Slices, Tubes, branch, draw_waves
from mm.phantom.paint import blend, ellipsoid, splat

AIR_HU = -1000.0
LAA_HU = -950.0
Bits = Int32[np.ndarray, "Z Y X"]


@dataclass(frozen=True)
class Lung:
    """One pleural cavity, rendered.

    Attributes:
        box: Where it lies in the lattice.
        share: Share of each voxel that is cavity.
        hu: Density of what fills it.
        bits: Bit k is set where finding k is.
    """

    box: Slices
    share: Field
    hu: Field
    bits: Bits


def bit(code: str) -> int:
    """The mask bit of a finding."""
    return 1 << INDEX[code]


def fill(anatomy: Anatomy, lesions: Lesions, side: BodySide, lattice: Lattice, *, upright: bool, details: bool) -> Lung:
    """Fills one pleural cavity.

    Args:
        anatomy: The patient in this visit.
        lesions: Of this visit.
        side: Which cavity.
        lattice: Where to evaluate.
        upright: Fluid sinks to the base and air rises to the apex, instead of to the back and to the front.
        details: Draw vessels, nodules and emphysema (a radiograph draws its own, finer than this lattice).
    """
    box = cavity_box(anatomy, side, lattice)
    part = lattice.crop(box)
    room = cavity(anatomy, side, part)
    soft = lattice.soft_mm
    hu = _parenchyma(anatomy, part)
    bits = np.zeros(part.shape, np.int32)
    free = room.coverage.copy()

    fluids = [item for item in lesions.effusions if item.side == side]
    airs = [item for item in lesions.pneumothoraces if item.side == side]
    fluid_shares, air_shares = [], []
    for fluid in fluids:
        values = effusion_field(part, room, upright=upright)
        cut = threshold(values, room.coverage, amount=fluid.volume_ml * 1e3 / lattice.voxel_mm3, soft=soft)
        fluid_shares.append(region(values, cut, soft))
        free *= 1.0 - fluid_shares[-1]
    for air in airs:
        share, line = _air(air, part, room, upright=upright, soft=soft)
        air_shares.append((share, line))
        free *= 1.0 - share
        # The air squeezes the lung.
        hu += 250.0 * air.percent / 100

    masses = []
    for opacity in (item for item in lesions.opacities if item.side == side):
        where, share = _mass(opacity, part, free, soft)
        masses.append((opacity, where, share))
        bits[where] |= np.where(share * free[where] > 0.4, bit(opacity.code), 0).astype(np.int32)
        free[where] *= 1.0 - share

    if details:
        vessels = splat(lung_vessels(anatomy, side), part)
        if lesions.emphysema.percent > 0.02:
            _destroy(lesions.emphysema, part, hu, free, vessels, bits)
        blend(hu, vessels, anatomy.soft_hu)
    for opacity, where, share in masses:
        blend(hu[where], share, _opaque(opacity, anatomy, part.crop(where)))
    if details:
        for nodule in lesions.nodules:
            _nodule(nodule, part, hu, bits)
    for fluid, share in zip(fluids, fluid_shares, strict=True):
        blend(hu, share, fluid.hu)
        bits |= np.where(share * room.coverage > 0.4, bit("effusion"), 0).astype(np.int32)
    for share, line in air_shares:
        blend(hu, share, AIR_HU)
        blend(hu, line, anatomy.soft_hu)
        bits |= np.where(share * room.coverage > 0.4, bit("pneumothorax"), 0).astype(np.int32)
    return Lung(box, room.coverage, hu, bits)


def _parenchyma(anatomy: Anatomy, part: Lattice) -> Field:
    waves = draw_waves(np.random.default_rng([anatomy.seed, 8]), wavelength_mm=(14.0, 60.0), count=24)
    hu = waves(part)
    hu *= anatomy.texture_hu
    hu += np.float32(anatomy.lung_hu) + np.float32(0.5 * anatomy.gravity_hu / anatomy.half_depth) * part.y
    # Healthy lung stays above the limit of emphysema, or the truth of LAA-950 would drift.
    return np.asarray(np.maximum(hu, np.float32(LAA_HU + 15.0), out=hu))


def _air(air: Pneumothorax, part: Lattice, room: Cavity, *, upright: bool, soft: float) -> tuple[Field, Field]:
    values = pneumothorax_field(part, room, upright=upright)
    amount = air.percent / 100 * float(room.coverage.sum())
    cut = threshold(values, room.coverage, amount=amount, soft=soft)
    # The visceral pleura: a line of 1.6 mm just inside the air's edge.
    line = np.abs(values - np.float32(cut - 0.5 * soft))
    line *= -1.0 / soft
    line += 1.0
    np.maximum(line, 0.0, out=line)
    line *= min(1.6 / soft, 1.0)
    return region(values, cut, soft), line


def _mass(opacity: Opacity, part: Lattice, free: Field, soft: float) -> tuple[Slices, Float[np.ndarray, "z y x"]]:
    reach = opacity_reach(opacity)
    x, y, z = opacity.center
    where = part.box((x - reach, y - reach, z - reach), (x + reach, y + reach, z + reach))
    values = opacity_field(opacity, part.crop(where))
    amount = opacity.volume_ml * 1e3 / part.voxel_mm3
    cut = threshold(values, free[where], amount=amount, soft=soft)
    return where, region(values, cut, soft)


def _opaque(opacity: Opacity, anatomy: Anatomy, part: Lattice) -> Field:
    rng = np.random.default_rng([opacity.seed, 9])
    hu = draw_waves(rng, wavelength_mm=(10.0, 40.0), count=12)(part)
    hu *= 14.0 if opacity.code == "consolidation" else 5.0
    hu += opacity.hu
    if opacity.code == "consolidation":
        blend(hu, splat(_bronchi(opacity, anatomy, rng), part), -950.0)
    return hu


def _bronchi(opacity: Opacity, anatomy: Anatomy, rng: np.random.Generator) -> Tubes:
    """The air-filled bronchi of a consolidation: a tree that enters from the hilum."""
    center, entry = np.array(opacity.center), np.array(hilum(anatomy, opacity.side))
    ball = (opacity.volume_ml * 1e3 * 0.75 / np.pi) ** (1 / 3)
    toward = (entry - center) / max(float(np.linalg.norm(entry - center)), 1.0)
    spread = rng.normal(size=(16, 3))
    spread *= (
        ball
        * np.array(opacity.axes).max()
        * rng.uniform(0.6, 1.15, (16, 1))
        / np.linalg.norm(spread, axis=1, keepdims=True)
    )
    root = center + toward * ball
    return branch(
        rng,
        (float(root[0]), float(root[1]), float(root[2])),
        center + spread,
        radius=opacity.bronchus_mm * min(1.0, (opacity.volume_ml / 30.0) ** (1 / 3) + 0.3),
        shrink=0.9,
        stride=0.5,
    )


def _destroy(emphysema: Emphysema, part: Lattice, hu: Field, free: Field, vessels: Field, bits: Bits) -> None:
    """Lowers `percent` of the aerated voxels below the limit; the number of voxels is exact."""
    aerated = free > 0.5
    candidates = aerated & (vessels < 0.02)
    values = emphysema_field(emphysema, part)
    level = values[candidates]
    count = min(round(emphysema.percent / 100 * int(aerated.sum())), len(level))
    if count == 0:
        return
    rank = len(level) - count
    cut = np.partition(level, rank)[rank]
    depth = values - cut
    near = np.clip(depth * np.float32(2.5) + np.float32(1.0), 0.0, 1.0)
    hu += near * (np.float32(LAA_HU + 2.0) - hu)
    hollow = candidates & (depth >= 0)
    hu[hollow] = LAA_HU - 6.0 - 40.0 * np.minimum(depth[hollow], 1.0)
    bits |= np.where(hollow, bit("emphysema"), 0).astype(np.int32)


def _nodule(nodule: Nodule, part: Lattice, hu: Field, bits: Bits) -> None:
    half = nodule.diameter_mm / 2
    where, share = ellipsoid(part, nodule.center, (half * nodule.axes[0], half * nodule.axes[1], half * nodule.axes[2]))
    if share.size == 0 or share.max() <= 0.0:
        return
    blend(hu[where], share, nodule.hu)
    mark = (share > 0.3) | (share == share.max())
    bits[where] |= np.where(mark, bit("nodule"), 0).astype(np.int32)
