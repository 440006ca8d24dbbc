"""Where the lesions of a patient lie: each is placed in lung that is free in every visit."""

# ruff: noqa: F821  # axis names in shapes

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from mm.phantom.anatomy import BODY_SIDES, Anatomy, BodySide, Cavity, cavity, rib_points, side_lattice
from mm.phantom.findings import (
    Effusion,
    Emphysema,
    Fracture,
    Nodule,
    Opacity,
    OpacityCode,
    Plaque,
    Pneumothorax,
    Point,
    effusion_field,
    opacity_reach,
    pneumothorax_field,
    threshold,
)
from mm.phantom.lattice import Lattice, lattice_points
from mm.phantom.plan import Plan
from mm.phantom.table import TABLE, Range

COARSE_MM = (14.0, 11.0, 11.0)


@dataclass
class Side:
    """One pleural cavity on a coarse lattice in every visit, and what is still free in it."""

    lattice: Lattice
    points: Float[np.ndarray, "N 3"]
    cavities: tuple[Cavity, ...]
    margin: Float[np.ndarray, "N"]
    """How far, in mm, a point is from whatever bounds or fills the lung in any visit."""

    @property
    def capacity_ml(self) -> float:
        """Of the smallest visit."""
        return min(float(item.coverage.sum()) for item in self.cavities) * self.lattice.voxel_mm3 / 1e3

    def fill(self, values: np.ndarray, cut: float) -> None:
        """Takes a region out of the free lung."""
        self.margin = np.minimum(self.margin, cut - values.ravel())


def room_of(anatomies: tuple[Anatomy, ...], side: BodySide) -> Side:
    """One pleural cavity in all visits, before anything is placed in it."""
    lattice = side_lattice(anatomies[0], side, spacing_mm=COARSE_MM)
    points = lattice_points(lattice, np.arange(math.prod(lattice.shape)))
    cavities = tuple(cavity(item, side, lattice) for item in anatomies)
    margin = -np.max([item.depth.ravel() for item in cavities], axis=0)
    return Side(lattice, points, cavities, margin)


def draw_log(rng: np.random.Generator, limits: Range) -> float:
    """A log-uniform number."""
    return math.exp(rng.uniform(math.log(limits[0]), math.log(limits[1])))


def draw_pneumothorax(
    rng: np.random.Generator, plan: Plan, sides: dict[BodySide, Side]
) -> list[tuple[Pneumothorax, ...]]:
    """Free air on one side, for each visit."""
    side, percent = BODY_SIDES[int(rng.integers(2))], draw_log(rng, TABLE.pneumothorax_percent)
    visits: list[tuple[Pneumothorax, ...]] = []
    for index, size in enumerate(plan.sizes(percent, cap=100 * TABLE.prior_share)):
        if size is None:
            visits.append(())
            continue
        visits.append((Pneumothorax(side, size),))
        space, room = sides[side], sides[side].cavities[index]
        values = pneumothorax_field(space.lattice, room, upright=False)
        amount = size / 100 * float(room.coverage.sum())
        space.fill(values, threshold(values, room.coverage, amount=amount, soft=11.0))
    return visits


def draw_effusions(
    rng: np.random.Generator, plan: Plan, sides: dict[BodySide, Side], taken: BodySide | None
) -> list[tuple[Effusion, ...]]:
    """Fluid on one or both sides, for each visit; never beside free air."""
    visits: list[tuple[Effusion, ...]] = [()] * len(plan.factors)
    both, order = rng.random() < TABLE.effusion_bilateral, rng.permutation(2)
    draws = rng.random(2)
    chosen = [BODY_SIDES[int(index)] for index in order[: 2 if both and plan.present else 1]]
    if taken is not None:
        # Air and fluid on one side would need a level of their own: the fluid is on the other side.
        chosen = [side for side in BODY_SIDES if side != taken]
    hu = float(rng.uniform(*TABLE.effusion_hu))
    for side, draw in zip(chosen, draws, strict=False):
        space = sides[side]
        low, high = TABLE.effusion_ml
        high = min(high, TABLE.effusion_share * space.capacity_ml)
        volume = math.exp(math.log(low) + float(draw) * math.log(high / low))
        for index, size in enumerate(plan.sizes(volume, cap=TABLE.prior_share * space.capacity_ml)):
            if size is None:
                continue
            visits[index] = (*visits[index], Effusion(side, size, hu))
            room = space.cavities[index]
            values = effusion_field(space.lattice, room, upright=False)
            amount = size * 1e3 / space.lattice.voxel_mm3
            space.fill(values, threshold(values, room.coverage, amount=amount, soft=11.0))
    return visits


def draw_opacities(
    rng: np.random.Generator,
    plans: dict[str, Plan],
    sides: dict[BodySide, Side],
    atelectasis_ml: float,
    loss_side: BodySide,
) -> list[tuple[Opacity, ...]]:
    """Consolidations and atelectases, for each visit."""
    visits: list[tuple[Opacity, ...]] = [()] * len(plans["consolidation"].factors)
    jobs: list[tuple[OpacityCode, BodySide, float]] = []
    if plans["atelectasis"].ever:
        jobs.append(("atelectasis", loss_side, atelectasis_ml))
    if plans["consolidation"].ever:
        both = rng.random() < TABLE.consolidation_bilateral and plans["consolidation"].present
        free = {side: float((space.margin > 8.0).sum()) for side, space in sides.items()}
        weight = np.array([free[side] for side in BODY_SIDES])
        if plans["atelectasis"].ever and not both:
            weight[BODY_SIDES.index(loss_side)] *= 0.25
        order = [BODY_SIDES[int(rng.random() > weight[0] / max(weight.sum(), 1.0))]]
        if both:
            order.append("left" if order[0] == "right" else "right")
        jobs += [("consolidation", side, draw_log(rng, TABLE.consolidation_ml)) for side in order]
    for code, side, volume in jobs:
        opacity = _place_opacity(rng, code, side, sides[side], volume, plans[code].largest)
        for index, size in enumerate(plans[code].sizes(volume, cap=TABLE.prior_opacity_ml)):
            if size is not None:
                visits[index] = (*visits[index], replace(opacity, volume_ml=size))
        sizes = plans[code].sizes(volume, cap=TABLE.prior_opacity_ml)
        reach = opacity_reach(replace(opacity, volume_ml=max(size for size in sizes if size is not None)))
        away = np.linalg.norm(sides[side].points - np.array(opacity.center), axis=1) - 0.8 * reach
        sides[side].margin = np.minimum(sides[side].margin, away)
    return visits


def _place_opacity(
    rng: np.random.Generator, code: OpacityCode, side: BodySide, space: Side, volume: float, largest: float
) -> Opacity:
    inner = 0.45 * (volume * max(1.0, largest) * 1e3 * 0.75 / math.pi) ** (1 / 3)
    margin, z = space.margin, space.points[:, 2]
    fits = margin > min(inner, 0.6 * float(margin.max()))
    if code == "atelectasis":
        fits &= z <= np.quantile(z[fits], 0.35)
    flat = int(rng.choice(np.flatnonzero(fits)))
    center = space.points[flat] + rng.uniform(-4.0, 4.0, 3)
    if code == "atelectasis":
        flatness = float(rng.uniform(*TABLE.atelectasis_flatness))
        wide = flatness**-0.5
        axes: Point = (wide, wide, flatness)
        normal: Point = (float(rng.normal(0, 0.3)), float(rng.normal(0, 0.5)), 1.0)
        hu, rough = float(rng.uniform(*TABLE.atelectasis_hu)), TABLE.atelectasis_roughness_mm
    else:
        stretch = np.exp(rng.normal(0.0, 0.18, 3))
        stretch /= np.prod(stretch) ** (1 / 3)
        axes = (float(stretch[0]), float(stretch[1]), float(stretch[2]))
        normal = (float(rng.normal()), float(rng.normal()), float(rng.normal()))
        hu, rough = float(rng.uniform(*TABLE.consolidation_hu)), TABLE.consolidation_roughness_mm
    return Opacity(
        code=code,
        side=side,
        center=as_point(center),
        volume_ml=volume,
        axes=axes,
        normal=normal,
        roughness_mm=rough * min(1.0, (volume / 40.0) ** (1 / 3)),
        hu=hu,
        bronchus_mm=float(rng.uniform(*TABLE.bronchogram_radius_mm)) if code == "consolidation" else 0.0,
        seed=int(rng.integers(2**31)),
    )


def draw_nodules(rng: np.random.Generator, plan: Plan, sides: dict[BodySide, Side]) -> list[tuple[Nodule, ...]]:
    """Nodules of each visit: the same ones, grown or shrunk."""
    visits: list[tuple[Nodule, ...]] = [()] * len(plan.factors)
    count = 1 + int(rng.choice(len(TABLE.nodule_count), p=TABLE.nodule_count))
    if not plan.ever:
        return visits
    if not plan.present:
        count = 1
    points = np.concatenate([sides[side].points for side in BODY_SIDES])
    margin = np.concatenate([sides[side].margin for side in BODY_SIDES])
    for diameter in sorted((draw_log(rng, TABLE.nodule_mm) for _ in range(count)), reverse=True):
        sizes = plan.sizes(diameter, cap=TABLE.prior_nodule_mm)
        widest = max(size for size in sizes if size is not None) / 2
        center = _place_nodule(rng, points, margin, widest=widest, radius=diameter / 2)
        if center is None:
            continue
        stretch = rng.uniform(*TABLE.nodule_axis_ratio, 3)
        stretch /= np.prod(stretch) ** (1 / 3)
        hu = float(rng.uniform(*TABLE.nodule_hu))
        for index, size in enumerate(sizes):
            if size is not None:
                visits[index] = (*visits[index], Nodule(as_point(center), size, as_point(stretch), hu))
        away = np.linalg.norm(points - center, axis=1) - 1.2 * widest
        margin = np.minimum(margin, away - TABLE.nodule_clearance_mm)
    return visits


def _place_nodule(
    rng: np.random.Generator,
    points: Float[np.ndarray, "N 3"],
    margin: Float[np.ndarray, "N"],
    *,
    widest: float,
    radius: float,
) -> Float[np.ndarray, "3"] | None:
    # A large prior may touch the wall; the current one keeps clear of it as long as there is any room.
    for need in (1.2 * widest + 3.0, 1.2 * radius + 3.0, 1.2 * radius, 0.5 * radius):
        fits = margin > need
        if fits.any():
            slack = float(min(margin[fits].min() - need, 3.0))
            return np.asarray(points[int(rng.choice(np.flatnonzero(fits)))] + rng.uniform(-slack, slack, 3) / 2)
    return None


def draw_emphysema(rng: np.random.Generator) -> Emphysema:
    """How much of the lung is destroyed; every patient has a little or none."""
    positive = rng.random() < dict(TABLE.prevalence)["emphysema"]
    low, high = TABLE.emphysema_absent_percent
    percent = draw_log(rng, TABLE.emphysema_percent) if positive else low + (high - low) * float(rng.random()) ** 2
    return Emphysema(
        percent=percent,
        upper_mm=float(rng.uniform(60.0, 220.0)),
        scale_mm=float(rng.uniform(*TABLE.emphysema_scale_mm)),
        seed=int(rng.integers(2**31)),
    )


def draw_fractures(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Fracture, ...]:
    """Broken ribs of the current visit, where a radiograph can show them."""
    if rng.random() >= dict(TABLE.prevalence)["rib_fracture"]:
        return ()
    on_ct = bool(rng.random() >= TABLE.fracture_only_image)
    count = 1 + int(rng.choice(len(TABLE.fracture_count), p=TABLE.fracture_count))
    fractures: list[Fracture] = []
    for _ in range(24):
        side, rib = BODY_SIDES[int(rng.integers(2))], int(rng.integers(2, 9))
        # Where a rib runs along the beam the radiograph can't show a step.
        angle = float(rng.uniform(0.55, 1.15) if rng.random() < 0.7 else rng.uniform(1.95, 2.35))
        center = as_point(rib_points(anatomy, side, rib, np.array([angle]))[0])
        over_lung = anatomy.dome_of(side) + 8.0 < center[2] < anatomy.apex - 30.0
        behind_heart = abs(center[0] - anatomy.heart[0]) < anatomy.heart_axes[0] and (
            abs(center[2] - anatomy.heart[2]) < anatomy.heart_axes[2]
        )
        apart = all(math.dist(center, other.center) > 45.0 for other in fractures)
        if over_lung and apart and not behind_heart:
            step, gap = float(rng.uniform(*TABLE.fracture_step_mm)), float(rng.uniform(*TABLE.fracture_gap_mm))
            swelling = float(rng.uniform(*TABLE.fracture_swelling_mm))
            fractures.append(Fracture(side, rib, angle, center, step, gap, swelling, on_ct))
        if len(fractures) == count:
            break
    return tuple(fractures)


def draw_plaques(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Plaque, ...]:
    """Calcium in the walls of the aorta and the coronary arteries."""
    if rng.random() >= dict(TABLE.prevalence)["calcification"]:
        return ()
    plaques: list[Plaque] = []
    count = 1 + int(rng.choice(len(TABLE.calcium_count), p=TABLE.calcium_count))
    for _ in range(30):
        center = _artery_point(rng, anatomy)
        if all(math.dist(center, other.center) > 30.0 for other in plaques):
            stretch = np.exp(rng.normal(0.0, 0.25, 3))
            stretch /= np.prod(stretch) ** (1 / 3)
            volume, hu = draw_log(rng, TABLE.calcium_mm3), float(rng.uniform(*TABLE.calcium_hu))
            plaques.append(Plaque(center, volume, as_point(stretch), hu))
        if len(plaques) == count:
            break
    return tuple(plaques)


def _artery_point(rng: np.random.Generator, anatomy: Anatomy) -> Point:
    place, turn = int(rng.integers(3)), float(rng.uniform(0.0, 2 * math.pi))
    if place == 0:
        x, y, radius = anatomy.descending_aorta
        z = float(rng.uniform(anatomy.dome[0] - 20.0, anatomy.arch_z))
        return x + radius * math.cos(turn), y + radius * math.sin(turn), z
    if place == 1:
        (x0, y0, _), (x1, y1, radius) = anatomy.ascending_aorta, anatomy.descending_aorta
        along = float(rng.uniform(0.15, 0.85)) * math.pi
        reach = 0.5 * math.hypot(x1 - x0, y1 - y0) + radius
        share = 0.5 - 0.5 * math.cos(along) * reach / max(reach - radius, 1.0)
        return x0 + share * (x1 - x0), y0 + share * (y1 - y0), anatomy.arch_z + reach * math.sin(along)
    # A coronary artery: in the groove on the heart's upper half, front and left.
    (x0, y0, z0), (a, b, c) = anatomy.heart, anatomy.heart_axes
    azimuth, height = float(rng.uniform(-2.6, 0.4)), float(rng.uniform(0.15, 0.75))
    planar = 0.92 * math.sqrt(1.0 - height**2)
    u = planar * math.cos(azimuth)
    return x0 + a * u, y0 + b * (planar * math.sin(azimuth) - 0.35 * u), z0 + c * 0.92 * height


def as_point(values: np.ndarray) -> Point:
    """Three numbers as a tuple of floats."""
    return float(values[0]), float(values[1]), float(values[2])
