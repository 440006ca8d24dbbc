"""The exact findings of a visit, read off its lesions."""

import math
from dataclasses import dataclass

import numpy as np

from mm.batch import FindingTruth
from mm.ontology import finding
from mm.phantom.anatomy import BODY_SIDES, Anatomy, BodySide, Cavity, cavity, side_lattice
from mm.phantom.findings import (
    Effusion,
    Lesions,
    Nodule,
    Opacity,
    Pneumothorax,
    Point,
    effusion_field,
    emphysema_field,
    opacity_field,
    pneumothorax_field,
    threshold,
)
from mm.phantom.lattice import Lattice, lattice_points
from mm.phantom.place import as_point
from mm.phantom.plan import Plan
from mm.phantom.table import TABLE


@dataclass(frozen=True)
class Reader:
    """Turns the lesions of a visit into its list of findings."""

    anatomy: Anatomy
    lesions: Lesions
    roll_deg: float
    plans: dict[str, Plan]
    current: bool

    def findings(self) -> tuple[FindingTruth, ...]:
        """All that this visit shows, instance by instance."""
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
        filled = dict.fromkeys(BODY_SIDES, 0.0)
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
    return as_point(middle if float(np.abs(best - middle).max()) < 6.0 else best)


def resolved(
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
