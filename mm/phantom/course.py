"""Which findings a patient has, where, and how they come and go over the visits; with the exact truth."""

# ruff: noqa: F821  # axis names in shapes

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from mm.batch import FindingTruth
from mm.ontology import finding
from mm.phantom.anatomy import (
    BODY_SIDES,
    Anatomy,
    BodySide,
    Cavity,
    Lattice,
    breathe,
    cavity,
    lattice_points,
    rib_points,
    side_lattice,
)
from mm.phantom.findings import (
    Effusion,
    Emphysema,
    Fracture,
    Lesions,
    Nodule,
    Opacity,
    OpacityCode,
    Plaque,
    Pneumothorax,
    Point,
    effusion_field,
    emphysema_field,
    opacity_field,
    opacity_reach,
    pneumothorax_field,
    threshold,
)
from mm.phantom.table import TABLE, Range

FOLLOWED = ("nodule", "consolidation", "atelectasis", "effusion", "pneumothorax")
CHANGED = ("new", "larger", "stable", "smaller")
COARSE_MM = (14.0, 11.0, 11.0)


@dataclass(frozen=True)
class Step:
    """One visit of a course."""

    anatomy: Anatomy
    lesions: Lesions
    findings: tuple[FindingTruth, ...]


@dataclass(frozen=True)
class Plan:
    """A followed finding over the visits: factors on the current size (None: absent in that visit)."""

    change: str
    factors: tuple[float | None, ...]

    @property
    def present(self) -> bool:
        """Whether the current visit shows it."""
        return self.factors[0] is not None

    @property
    def ever(self) -> bool:
        """Whether any visit shows it."""
        return any(item is not None for item in self.factors)

    @property
    def largest(self) -> float:
        """The largest factor."""
        return max((item for item in self.factors if item is not None), default=0.0)

    def sizes(self, size: float, *, cap: float) -> tuple[float | None, ...]:
        """Sizes in each visit; a capped one still differs by the least factor that counts as a change."""
        return tuple(None if item is None else min(size * item, max(cap, size)) for item in self.factors)


def draw_plan(rng: np.random.Generator, code: str, visits: int) -> Plan:
    """Presence and change of one followed finding; each of the five changes is .2 of the change labels."""
    prevalence = dict(TABLE.prevalence)[code]
    present = bool(rng.random() < prevalence)
    pick, resolves = CHANGED[int(rng.integers(4))], bool(rng.random() < prevalence / (4 * (1 - prevalence)))
    factor = math.exp(rng.uniform(*np.log(TABLE.changed_factor)))
    drift = rng.uniform(*TABLE.stable_factor, size=visits)
    if visits == 1:
        return Plan("unknown", (1.0 if present else None,))
    if present and pick == "new":
        return Plan("new", (1.0, *[None] * (visits - 1)))
    first = {"larger": 1.0 / factor, "stable": float(drift[0]), "smaller": factor}[pick] if present else 1.0
    earlier = tuple(first * float(np.prod(drift[1:index])) for index in range(1, visits))
    if present:
        return Plan(pick, (1.0, *earlier))
    return Plan("resolved", (None, *earlier)) if resolves else Plan("unknown", (None,) * visits)


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


def draw_course(
    rng: np.random.Generator, anatomy: Anatomy, *, visits: int, rolls: tuple[float, ...]
) -> tuple[Step, ...]:
    """Draws the findings of all visits, the current one first.

    Args:
        rng: Source of chance.
        anatomy: The patient at rest.
        visits: How many CTs there are.
        rolls: Roll of the patient in each, in degrees (turns body into LPS).
    """
    plans = {code: draw_plan(rng, code, visits) for code in FOLLOWED}
    atelectasis = _draw_log(rng, TABLE.atelectasis_ml)
    loss_side = BODY_SIDES[int(rng.integers(2))]
    losses = plans["atelectasis"].sizes(atelectasis, cap=TABLE.prior_opacity_ml)
    anatomies = tuple(_breathed(rng, anatomy, loss, loss_side) for loss in losses)
    sides = {side: _side(anatomies, side) for side in BODY_SIDES}

    pneumothoraces = _draw_pneumothorax(rng, plans["pneumothorax"], sides)
    taken = next((item.side for visit in pneumothoraces for item in visit), None)
    effusions = _draw_effusions(rng, plans["effusion"], sides, taken)
    opacities = _draw_opacities(rng, plans, sides, atelectasis, loss_side)
    nodules = _draw_nodules(rng, plans["nodule"], sides)
    emphysema = _draw_emphysema(rng)
    fractures = _draw_fractures(rng, anatomies[0])
    plaques = _draw_plaques(rng, anatomy)
    steps = []
    for index in range(visits):
        lesions = Lesions(
            emphysema=emphysema,
            nodules=nodules[index],
            opacities=opacities[index],
            effusions=effusions[index],
            pneumothoraces=pneumothoraces[index],
            fractures=fractures if index == 0 else (),
            plaques=plaques,
        )
        truth = _Truth(anatomies[index], lesions, rolls[index], plans, current=index == 0)
        found = truth.findings()
        if index == 0 and visits > 1:
            found += _resolved(plans, pneumothoraces[1], effusions[1], opacities[1], nodules[1])
        steps.append(Step(anatomies[index], lesions, found))
    return tuple(steps)


def _draw_log(rng: np.random.Generator, limits: Range) -> float:
    return math.exp(rng.uniform(math.log(limits[0]), math.log(limits[1])))


def _breathed(rng: np.random.Generator, anatomy: Anatomy, loss: float | None, side: BodySide) -> Anatomy:
    breath = float(rng.uniform(*TABLE.breath_mm))
    rise = 0.0
    if loss is not None:
        low, high = TABLE.diaphragm_rise_mm
        share = math.log(loss / TABLE.atelectasis_ml[0]) / math.log(TABLE.atelectasis_ml[1] / TABLE.atelectasis_ml[0])
        rise = low + (high - low) * min(max(share, 0.0), 1.0)
    return breathe(anatomy, both=breath, left=rise if side == "left" else 0.0, right=rise if side == "right" else 0.0)


def _side(anatomies: tuple[Anatomy, ...], side: BodySide) -> Side:
    lattice = side_lattice(anatomies[0], side, spacing_mm=COARSE_MM)
    points = lattice_points(lattice, np.arange(math.prod(lattice.shape)))
    cavities = tuple(cavity(item, side, lattice) for item in anatomies)
    margin = -np.max([item.depth.ravel() for item in cavities], axis=0)
    return Side(lattice, points, cavities, margin)


# ---------------------------------------------------------------------------------------------- pleural space


def _draw_pneumothorax(
    rng: np.random.Generator, plan: Plan, sides: dict[BodySide, Side]
) -> list[tuple[Pneumothorax, ...]]:
    side, percent = BODY_SIDES[int(rng.integers(2))], _draw_log(rng, TABLE.pneumothorax_percent)
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


def _draw_effusions(
    rng: np.random.Generator, plan: Plan, sides: dict[BodySide, Side], taken: BodySide | None
) -> list[tuple[Effusion, ...]]:
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


# -------------------------------------------------------------------------------------------------- opacities


def _draw_opacities(
    rng: np.random.Generator,
    plans: dict[str, Plan],
    sides: dict[BodySide, Side],
    atelectasis_ml: float,
    loss_side: BodySide,
) -> list[tuple[Opacity, ...]]:
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
        jobs += [("consolidation", side, _draw_log(rng, TABLE.consolidation_ml)) for side in order]
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
        center=_point(center),
        volume_ml=volume,
        axes=axes,
        normal=normal,
        roughness_mm=rough * min(1.0, (volume / 40.0) ** (1 / 3)),
        hu=hu,
        bronchus_mm=float(rng.uniform(*TABLE.bronchogram_radius_mm)) if code == "consolidation" else 0.0,
        seed=int(rng.integers(2**31)),
    )


# ---------------------------------------------------------------------------------------------------- nodules


def _draw_nodules(rng: np.random.Generator, plan: Plan, sides: dict[BodySide, Side]) -> list[tuple[Nodule, ...]]:
    visits: list[tuple[Nodule, ...]] = [()] * len(plan.factors)
    count = 1 + int(rng.choice(len(TABLE.nodule_count), p=TABLE.nodule_count))
    if not plan.ever:
        return visits
    if not plan.present:
        count = 1
    points = np.concatenate([sides[side].points for side in BODY_SIDES])
    margin = np.concatenate([sides[side].margin for side in BODY_SIDES])
    for diameter in sorted((_draw_log(rng, TABLE.nodule_mm) for _ in range(count)), reverse=True):
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
                visits[index] = (*visits[index], Nodule(_point(center), size, _point(stretch), hu))
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


# ------------------------------------------------------------------------------------------------ the others


def _draw_emphysema(rng: np.random.Generator) -> Emphysema:
    positive = rng.random() < dict(TABLE.prevalence)["emphysema"]
    low, high = TABLE.emphysema_absent_percent
    percent = _draw_log(rng, TABLE.emphysema_percent) if positive else low + (high - low) * float(rng.random()) ** 2
    return Emphysema(
        percent=percent,
        upper_mm=float(rng.uniform(60.0, 220.0)),
        scale_mm=float(rng.uniform(*TABLE.emphysema_scale_mm)),
        seed=int(rng.integers(2**31)),
    )


def _draw_fractures(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Fracture, ...]:
    if rng.random() >= dict(TABLE.prevalence)["rib_fracture"]:
        return ()
    on_ct = bool(rng.random() >= TABLE.fracture_only_image)
    count = 1 + int(rng.choice(len(TABLE.fracture_count), p=TABLE.fracture_count))
    fractures: list[Fracture] = []
    for _ in range(24):
        side, rib = BODY_SIDES[int(rng.integers(2))], int(rng.integers(2, 9))
        # Where a rib runs along the beam the radiograph can't show a step.
        angle = float(rng.uniform(0.55, 1.15) if rng.random() < 0.7 else rng.uniform(1.95, 2.35))
        center = _point(rib_points(anatomy, side, rib, np.array([angle]))[0])
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


def _draw_plaques(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Plaque, ...]:
    if rng.random() >= dict(TABLE.prevalence)["calcification"]:
        return ()
    plaques: list[Plaque] = []
    count = 1 + int(rng.choice(len(TABLE.calcium_count), p=TABLE.calcium_count))
    for _ in range(30):
        center = _artery_point(rng, anatomy)
        if all(math.dist(center, other.center) > 30.0 for other in plaques):
            stretch = np.exp(rng.normal(0.0, 0.25, 3))
            stretch /= np.prod(stretch) ** (1 / 3)
            volume, hu = _draw_log(rng, TABLE.calcium_mm3), float(rng.uniform(*TABLE.calcium_hu))
            plaques.append(Plaque(center, volume, _point(stretch), hu))
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


def _point(values: np.ndarray) -> Point:
    return float(values[0]), float(values[1]), float(values[2])


# ------------------------------------------------------------------------------------------------------ truth


@dataclass(frozen=True)
class _Truth:
    """Turns the lesions of a visit into its list of findings."""

    anatomy: Anatomy
    lesions: Lesions
    roll_deg: float
    plans: dict[str, Plan]
    current: bool

    def findings(self) -> tuple[FindingTruth, ...]:
        found: list[FindingTruth] = []
        found += [self._nodule(item) for item in self.lesions.nodules]
        found += self._regions()
        heart = self.anatomy.heart
        if self.anatomy.ratio > TABLE.cardiothoracic_limit:
            found.append(self._truth("cardiomegaly", "none", heart, (heart[0], heart[2]), self.anatomy.ratio))
        if self.lesions.emphysema.percent > TABLE.emphysema_limit_percent:
            found.append(self._truth("emphysema", "none", self._worst(), None, self.lesions.emphysema.percent))
        for crack in self.lesions.fractures:
            on_image = (crack.center[0], crack.center[2])
            center = crack.center if crack.on_ct else None
            found.append(self._truth("rib_fracture", crack.side, center, on_image, crack.step_mm))
        for plaque in self.lesions.plaques:
            found.append(self._truth("calcification", "none", plaque.center, None, plaque.volume_mm3))
        return tuple(found)

    def _truth(
        self, code: str, side: str, center: Point | None, on_image: tuple[float, float] | None, size: float
    ) -> FindingTruth:
        if not self.current:
            on_image = None
        sources = (("volume",) if center is not None else ()) + (("image",) if on_image is not None else ())
        change = self.plans[code].change if self.current and finding(code).followed else "unknown"
        lps = None if center is None else turn(center, self.roll_deg)
        return FindingTruth(code, True, side, lps, on_image, size, change, sources)

    def _nodule(self, nodule: Nodule) -> FindingTruth:
        side: BodySide = "left" if nodule.center[0] > 0 else "right"
        x, _, z = nodule.center
        heart, axes = self.anatomy.heart, self.anatomy.heart_axes
        hidden = ((x - heart[0]) / axes[0]) ** 2 + ((z - heart[2]) / axes[2]) ** 2 < 1.1
        hidden |= z < self.anatomy.dome_of(side) + 4.0
        if not hidden and self.current:
            hidden = self._under_fluid(side, nodule.center)
        shown = not hidden and nodule.diameter_mm >= TABLE.xray_nodule_mm
        return self._truth("nodule", side, nodule.center, (x, z) if shown else None, nodule.diameter_mm)

    def _under_fluid(self, side: BodySide, center: Point) -> bool:
        for effusion in self.lesions.effusions:
            if effusion.side == side:
                _, on_image = self._fluid(effusion)
                return on_image is not None and center[2] < on_image[1] + 30.0
        return False

    def _regions(self) -> list[FindingTruth]:
        found = []
        for opacity in self.lesions.opacities:
            lattice, room = self._room(opacity.side)
            values = opacity_field(opacity, lattice)
            center = _middle(lattice, values, room.coverage, opacity.volume_ml * 1e3)
            shown = opacity.volume_ml >= TABLE.xray_opacity_ml
            on_image = (center[0], center[2]) if shown else None
            found.append(self._truth(opacity.code, opacity.side, center, on_image, opacity.volume_ml))
        for effusion in self.lesions.effusions:
            center, on_image = self._fluid(effusion)
            found.append(self._truth("effusion", effusion.side, center, on_image, effusion.volume_ml))
        for air in self.lesions.pneumothoraces:
            lattice, room = self._room(air.side)
            amount = air.percent / 100 * float(room.coverage.sum()) * lattice.voxel_mm3
            center = _middle(lattice, pneumothorax_field(lattice, room, upright=False), room.coverage, amount)
            on_image = None
            if self.current and air.percent >= TABLE.xray_pneumothorax_percent:
                up = _middle(lattice, pneumothorax_field(lattice, room, upright=True), room.coverage, amount)
                on_image = (up[0], up[2])
            found.append(self._truth("pneumothorax", air.side, center, on_image, air.percent))
        return found

    def _fluid(self, effusion: Effusion) -> tuple[Point, tuple[float, float] | None]:
        lattice, room = self._room(effusion.side)
        amount = effusion.volume_ml * 1e3
        center = _middle(lattice, effusion_field(lattice, room, upright=False), room.coverage, amount)
        if not self.current or effusion.volume_ml < TABLE.xray_effusion_ml:
            return center, None
        up = _middle(lattice, effusion_field(lattice, room, upright=True), room.coverage, amount)
        return center, (up[0], up[2])

    def _room(self, side: BodySide) -> tuple[Lattice, Cavity]:
        lattice = side_lattice(self.anatomy, side, spacing_mm=(9.0, 8.0, 8.0))
        return lattice, cavity(self.anatomy, side, lattice)

    def _worst(self) -> Point:
        """Where the emphysema is worst, in the lung with less fluid or air around it."""
        filled = {side: 0.0 for side in BODY_SIDES}
        for effusion in self.lesions.effusions:
            filled[effusion.side] += effusion.volume_ml
        for air in self.lesions.pneumothoraces:
            filled[air.side] += 25.0 * air.percent
        side: BodySide = "right" if filled["right"] < filled["left"] else "left"
        lattice, room = self._room(side)
        free = room.coverage.copy()
        for effusion in self.lesions.effusions:
            if effusion.side == side:
                values = effusion_field(lattice, room, upright=False)
                amount = effusion.volume_ml * 1e3 / lattice.voxel_mm3
                free[values > threshold(values, room.coverage, amount=amount, soft=8.0)] = 0.0
        for opacity in self.lesions.opacities:
            if opacity.side == side:
                values = opacity_field(opacity, lattice)
                amount = opacity.volume_ml * 1e3 / lattice.voxel_mm3
                free[values > threshold(values, room.coverage, amount=amount, soft=8.0)] = 0.0
        share = self.lesions.emphysema.percent / 100 * float(free.sum()) * lattice.voxel_mm3
        return _middle(lattice, emphysema_field(self.lesions.emphysema, lattice), free, share)


def turn(point: Point, degrees: float) -> Point:
    """A body point in LPS after the patient has rolled by an angle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y, z = point
    return cos * x - sin * y, sin * x + cos * y, z


def _middle(lattice: Lattice, values: np.ndarray, room: np.ndarray, amount_mm3: float) -> Point:
    """The point of a region that is nearest to the region's centroid."""
    cut = threshold(values, room, amount=amount_mm3 / lattice.voxel_mm3, soft=8.0)
    inside = np.flatnonzero((values > cut) & (room > 0.3))
    if len(inside) == 0:
        inside = np.array([int(np.argmax(np.where(room > 0.0, values, -np.inf)))])
    points = lattice_points(lattice, inside)
    middle = points.mean(0)
    best = points[int(((points - middle) ** 2).sum(1).argmin())]
    # A compact region has its centroid inside: then the centroid itself is the truth.
    return _point(middle if float(np.abs(best - middle).max()) < 6.0 else best)


def _resolved(
    plans: dict[str, Plan],
    pneumothoraces: tuple[Pneumothorax, ...],
    effusions: tuple[Effusion, ...],
    opacities: tuple[Opacity, ...],
    nodules: tuple[Nodule, ...],
) -> tuple[FindingTruth, ...]:
    """One row for each finding that the last prior shows and the current visit doesn't."""
    gone: list[tuple[str, str]] = [("nodule", "left" if item.center[0] > 0 else "right") for item in nodules]
    gone += [(item.code, item.side) for item in opacities]
    gone += [("effusion", item.side) for item in effusions]
    gone += [("pneumothorax", item.side) for item in pneumothoraces]
    return tuple(
        FindingTruth(code, False, side, None, None, None, "resolved", ("volume",))
        for code, side in gone
        if plans[code].change == "resolved"
    )
