"""Renders the upright radiograph (PA) of the current visit from the same anatomy and lesions as the CT.

Lungs, fluid, air and opacities are summed along the beam on a lattice that is coarse along y; ribs, vessels,
nodules and the heart are drawn on the pixels themselves. What is summed is the water-equivalent path in mm.
"""

# ruff: noqa: F821  # axis names in shapes

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int32

from mm.ontology import INDEX
from mm.phantom.anatomy import (
    BODY_SIDES,
    NUM_RIBS,
    RIB_DEPTH_MM,
    SIGN,
    Anatomy,
    BodySide,
    lung_vessels,
    narrowing,
    rib_drop,
)
from mm.phantom.findings import Fracture
from mm.phantom.lattice import Lattice, regular_lattice
from mm.phantom.lungs import Lung, bit, fill
from mm.phantom.patient import Machine, Patient, Visit
from mm.phantom.table import TABLE

WATER_PER_MM = 0.0195
"""Linear attenuation of water at the mean energy of a chest radiograph (about 70 keV)."""
COARSE_MM = (2.8, 7.0, 2.8)
RIB_HALF_MM = 6.0

Pixels = Float32[np.ndarray, "Y X"]


@dataclass(frozen=True)
class RenderedImage:
    """A radiograph; row 0 is the head, the patient's left is on the right.

    Attributes:
        pixels: 0 (black) to 1 (dense).
        bits: Bit k is set where finding k is.
        spacing_mm: Of a pixel (y, x).
        origin_mm: Patient (x, z) of pixel (0, 0).
    """

    pixels: Float32[np.ndarray, "Y X"]
    bits: Int32[np.ndarray, "Y X"]
    spacing_mm: tuple[float, float]
    origin_mm: tuple[float, float]

    def pixel(self, image_center_mm: tuple[float, float]) -> tuple[float, float]:
        """Pixel index (y, x) of a patient (x, z)."""
        x, z = image_center_mm
        return (self.origin_mm[1] - z) / self.spacing_mm[0], (x - self.origin_mm[0]) / self.spacing_mm[1]


def render_xray(patient: Patient, *, noise: bool = True) -> RenderedImage:
    """Renders the current visit's radiograph; `noise` False leaves noise away."""
    visit, machine = patient.visits[0], patient.machine
    anatomy = visit.anatomy
    (rows, columns), step = machine.shape, machine.spacing_mm
    x = machine.center_mm[0] + (np.arange(columns, dtype=np.float32) - (columns - 1) / 2) * np.float32(step)
    z = machine.center_mm[1] - (np.arange(rows, dtype=np.float32) - (rows - 1) / 2) * np.float32(step)
    lattice = _beam_lattice(anatomy)
    lungs = {side: fill(anatomy, visit.lesions, side, lattice, upright=True, details=False) for side in BODY_SIDES}
    coarse = np.zeros(lattice.shape[::2], np.float32)
    marks = np.zeros(lattice.shape[::2], np.int32)
    for side, lung in lungs.items():
        where = lung.box[::2]
        coarse[where] -= _missing(lung, anatomy)
        if lung.bits.any():
            coarse[where] += _pleural_line(lung)
        marks[where] |= _marks(lung, visit, side)
    up, across = _interpolation(z, lattice.z), _interpolation(x, lattice.x[0])
    path = up @ coarse @ across.T
    aerated = path[::4, ::4] < -50.0
    path += _trunk(anatomy, x, z)
    path += _skeleton(anatomy, x, z, visit.lesions.fractures)
    bits = marks[np.ix_(up.argmax(1), across.argmax(1))] * ((up.sum(1) > 0)[:, None] & (across.sum(1) > 0)[None])
    for side, lung in lungs.items():
        _vessels(anatomy, side, lung, lattice, path, (float(x[0]), float(z[0]), step))
    _draw(visit, x, z, path, bits)
    pixels = _expose(
        path, aerated, machine, np.random.Generator(np.random.SFC64([patient.seed, 17])) if noise else None
    )
    return RenderedImage(pixels, bits.astype(np.int32), (step, step), (float(x[0]), float(z[0])))


def _beam_lattice(anatomy: Anatomy) -> Lattice:
    wide, deep = anatomy.half_width + 4.0, anatomy.half_depth + 2.0
    return regular_lattice((-wide, -deep, anatomy.floor - 14.0), (wide, deep, anatomy.apex + 6.0), COARSE_MM)


def _interpolation(fine: Float[np.ndarray, "F"], coarse: Float[np.ndarray, "C"]) -> Float[np.ndarray, "F C"]:
    """Matrix of linear interpolation; rows outside are zero."""
    position = (fine - coarse[0]) / (coarse[1] - coarse[0])
    weight: np.ndarray = np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(len(coarse), dtype=np.float32)))
    return weight.astype(np.float32)


def _missing(lung: Lung, anatomy: Anatomy) -> Float[np.ndarray, "Z X"]:
    """Water-equivalent millimetres by which what fills a cavity is thinner than soft tissue."""
    thin = anatomy.soft_hu - lung.hu
    thin *= lung.share
    return np.asarray(thin.sum(1) * np.float32(COARSE_MM[1] / 1000.0))


def _pleural_line(lung: Lung) -> Float[np.ndarray, "Z X"]:
    """The edge of a collapsed lung, where the beam runs along the visceral pleura."""
    free = (lung.bits & bit("pneumothorax")) > 0
    air = free.sum(1) * COARSE_MM[1]
    rest = (np.where(free, 0.0, lung.share)).sum(1) * COARSE_MM[1]
    line = np.clip(1.0 - np.abs(rest - 9.0) / 9.0, 0.0, 1.0) * (air > 14.0)
    return np.asarray(7.0 * line, dtype=np.float32)


def _marks(lung: Lung, visit: Visit, side: BodySide) -> Int32[np.ndarray, "Z X"]:
    """Masks of what the truth says the radiograph shows on this side."""
    shown = {item.code for item in visit.findings if item.side == side and item.image_center_mm is not None}
    marks = np.zeros((lung.bits.shape[0], lung.bits.shape[2]), np.int32)
    if lung.bits.any():
        for code, least in TABLE.xray_seen_mm:
            if code in shown:
                length = ((lung.bits & bit(code)) > 0).sum(1) * COARSE_MM[1]
                marks |= np.where(length >= least, bit(code), 0).astype(np.int32)
    return marks


def _trunk(anatomy: Anatomy, x: Float[np.ndarray, "X"], z: Float[np.ndarray, "Z"]) -> Pixels:
    """Path through the body without lungs and bones."""
    outer_x = anatomy.half_width + anatomy.wall + 0.8 * anatomy.fat
    outer_y = anatomy.half_depth + anatomy.wall + anatomy.fat + 4.0
    height = (z - anatomy.middle_mm) / 150.0
    scale = 1.0 - 0.5 * np.clip(height - 0.8, 0.0, 0.6) - 0.05 * height**2
    wide = np.clip(np.abs(x[None]) / (outer_x * scale[:, None]), 0.0, 1.0)
    path = 2.0 * outer_y * scale[:, None] * (1.0 - wide**2.5) ** (1 / 2.5)
    # Heart and great vessels are denser than the fat around them; the liver is under the right dome.
    (x0, _, z0), (a, b, c) = anatomy.heart, anatomy.heart_axes
    heart = np.maximum(1.0 - ((x - x0) / a)[None] ** 2 - ((z - z0) / c)[:, None] ** 2, 0.0)
    path = path * 0.97 + 0.16 * 2.0 * b * np.sqrt(heart)
    knob = np.maximum(1.0 - ((x - 22.0) / 15.0)[None] ** 2 - ((z - anatomy.arch_z - 8.0) / 17.0)[:, None] ** 2, 0.0)
    trachea = np.exp(-((x / 7.5)[None] ** 4)) * np.clip((z - anatomy.arch_z + 4.0) / 6.0, 0.0, 1.0)[:, None]
    path += 14.0 * np.sqrt(knob) - 13.0 * trachea
    return np.asarray(path, dtype=np.float32)


def _skeleton(
    anatomy: Anatomy, x: Float[np.ndarray, "X"], z: Float[np.ndarray, "Z"], cracks: tuple[Fracture, ...]
) -> Pixels:
    """Ribs, spine and collar bones."""
    path = np.zeros((len(z), len(x)), np.float32)
    # The ring of ribs at its own height: one that a beam meets once at the back and once at the front.
    scale = np.maximum(narrowing(anatomy, z), 0.05)
    sine = np.abs(x)[None] / (anatomy.half_width * scale + RIB_DEPTH_MM)[:, None]
    back = np.arcsin(np.minimum(sine, 1.0)).astype(np.float32)
    ring = np.clip((1.03 - sine) / 0.03, 0.0, 1.0)
    oblique = np.minimum(1.0 / np.maximum(np.cos(back), 0.2), 3.2)
    for front, weight in ((False, 1.0), (True, 0.75)):
        angle = np.float32(math.pi) - back if front else back
        above = np.float32(anatomy.rib_top) - rib_drop(anatomy, angle).astype(np.float32) - z[:, None]
        rib = np.rint(above * np.float32(1.0 / anatomy.rib_pitch))
        away = above - rib * np.float32(anatomy.rib_pitch)
        shade = ring * oblique * weight
        for crack in cracks:
            if (crack.angle > math.pi / 2) == front:
                _break(crack, anatomy, x, angle, rib, away, shade)
        t = np.minimum(np.abs(away) * np.float32(1.0 / RIB_HALF_MM), 1.0)
        bone = 7.0 * np.sqrt(1.0 - t * t)
        bone += 5.0 * np.clip(1.0 - np.abs(t - 0.82) * 6.0, 0.0, 1.0)
        bone *= shade
        bone *= (rib >= 0) & (rib < NUM_RIBS)
        if front:
            bone *= np.clip((2.35 - angle) * 6.0, 0.08, 1.0)
        path += bone
    phase = np.clip(3.0 * (np.cos(2 * math.pi * z / 25.0) - 0.72), 0.0, 1.0)
    column = np.sqrt(np.maximum(1.0 - (x / 19.0) ** 2, 0.0))
    path += ((17.0 - 7.0 * phase)[:, None] * column[None]).astype(np.float32)
    far = np.abs(x)
    middle = anatomy.apex - 26.0 + 0.16 * far + 5.0 * np.sin(far / 28.0)
    collar = 1.0 - ((z[:, None] - middle[None]) / 6.0) ** 2
    path += (9.0 * np.sqrt(np.maximum(collar, 0.0)) * ((far > 14.0) & (far < anatomy.half_width))).astype(np.float32)
    return path


def _break(
    crack: Fracture,
    anatomy: Anatomy,
    x: Float[np.ndarray, "X"],
    angle: Pixels,
    rib: Pixels,
    away: Pixels,
    shade: Float[np.ndarray, "Z X"],
) -> None:
    """Shifts the part of a rib in front of the break and opens a gap, in place."""
    mine = (rib == crack.rib) & (np.sign(x) == SIGN[crack.side])[None]
    bend = math.hypot(anatomy.half_width * math.cos(crack.angle), anatomy.half_depth * math.sin(crack.angle))
    arc = (angle[mine] - np.float32(crack.angle)) * np.float32(bend)
    away[mine] -= np.where(arc > 0, crack.step_mm * np.exp(-np.maximum(arc, 0.0) / 30.0), 0.0).astype(np.float32)
    shade[mine] *= 1.0 - np.clip((0.5 * crack.gap_mm - np.abs(arc)) / 1.4 + 0.5, 0.0, 1.0)


def _vessels(
    anatomy: Anatomy, side: BodySide, lung: Lung, lattice: Lattice, path: Pixels, frame: tuple[float, float, float]
) -> None:
    """Adds the vessels that run in aerated lung, in place."""
    tubes = lung_vessels(anatomy, side)
    part = lattice.crop(lung.box)
    cell = np.rint(part.index(tubes.points)).astype(int)
    cell = np.clip(cell, 0, np.array(part.shape) - 1)
    here = tuple(cell.T)
    aerated = (lung.share[here] > 0.5) & (lung.hu[here] > -950.0) & (lung.hu[here] < -400.0)
    points, radius = tubes.points[aerated], tubes.radius[aerated]
    mass = math.pi * radius**2 * tubes.length[aerated] * (anatomy.soft_hu - anatomy.lung_hu) / 1000.0
    turns = np.arange(12) * 2.399963
    reach = np.sqrt((np.arange(12) + 0.5) / 12) * 0.9
    x0, z0, step = frame
    column = (points[:, :1] + radius[:, None] * reach * np.cos(turns) - x0) / step
    row = (z0 - points[:, 2:] + radius[:, None] * reach * np.sin(turns)) / step
    column, row = column.ravel(), row.ravel()
    weight = np.repeat(mass / (12 * step * step), 12)
    inside = (column >= 0) & (row >= 0) & (column < path.shape[1] - 1) & (row < path.shape[0] - 1)
    column, row, weight = column[inside], row[inside], weight[inside]
    left, top = column.astype(int), row.astype(int)
    right, down = column - left, row - top
    flat = top * path.shape[1] + left
    cells = np.concatenate([flat, flat + 1, flat + path.shape[1], flat + path.shape[1] + 1])
    shares = np.concatenate([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right])
    total = np.bincount(cells, shares * np.tile(weight, 4), minlength=path.size)
    path += total.reshape(path.shape).astype(np.float32)


def _draw(visit: Visit, x: Float[np.ndarray, "X"], z: Float[np.ndarray, "Z"], path: Pixels, bits: np.ndarray) -> None:
    """Nodules and swellings, and the masks of what has no path of its own, in place."""
    anatomy = visit.anatomy
    for nodule in visit.lesions.nodules:
        half = nodule.diameter_mm / 2
        a, b, c = (half * axis for axis in nodule.axes)
        rho = ((x - nodule.center[0]) / a)[None] ** 2 + ((z - nodule.center[2]) / c)[:, None] ** 2
        chord = 2.0 * b * np.sqrt(np.maximum(1.0 - rho, 0.0))
        path += (chord * (nodule.hu - anatomy.lung_hu) / 1000.0).astype(np.float32)
    for crack in visit.lesions.fractures:
        # The part of the blood around a break that bulges into the lung.
        rho = ((x - crack.center[0])[None] ** 2 + (z - crack.center[2])[:, None] ** 2) / crack.swelling_mm**2
        path += (0.9 * crack.swelling_mm * np.sqrt(np.maximum(1.0 - rho, 0.0))).astype(np.float32)
    for item in visit.findings:
        if item.image_center_mm is None or item.code not in ("nodule", "rib_fracture"):
            continue
        radius = 8.0 if item.code == "rib_fracture" else max(0.5 * (item.size or 0.0), 2.0)
        near = (x - item.image_center_mm[0])[None] ** 2 + (z - item.image_center_mm[1])[:, None] ** 2 < radius**2
        bits[near] |= 1 << INDEX[item.code]
    if anatomy.ratio > TABLE.cardiothoracic_limit:
        (x0, _, z0), (a, _, c) = anatomy.heart, anatomy.heart_axes
        bits[((x - x0) / a)[None] ** 2 + ((z - z0) / c)[:, None] ** 2 < 1.0] |= bit("cardiomegaly")


def _expose(path: Pixels, aerated: np.ndarray, machine: Machine, rng: np.random.Generator | None) -> Pixels:
    """Photons, scatter, detector blur, and the display curve."""
    light = np.exp(path * np.float32(-WATER_PER_MM))
    # Scattered light is smooth: the mean over blocks, interpolated back.
    rows, columns = light.shape
    block = 32
    high, wide = -(-rows // block), -(-columns // block)
    padded = np.pad(light, ((0, high * block - rows), (0, wide * block - columns)), mode="edge")
    mean = np.minimum(padded, np.float32(0.35)).reshape(high, block, wide, block).mean((1, 3))
    up = _interpolation(np.clip(np.arange(rows), block / 2, (high - 0.5) * block - 1), _centers(high, block))
    across = _interpolation(np.clip(np.arange(columns), block / 2, (wide - 0.5) * block - 1), _centers(wide, block))
    light += np.float32(machine.scatter) * (up @ mean @ across.T)
    side = np.float32(machine.blur_px**2 / 2)
    light[1:-1] += side * (light[2:] + light[:-2] - 2 * light[1:-1])
    light[:, 1:-1] += side * (light[:, 2:] + light[:, :-2] - 2 * light[:, 1:-1])
    density = -np.log(np.maximum(light, 1e-4))
    # Windowed as an automatic exposure does: the darkest lung is nearly black.
    thin = density[::4, ::4][aerated]
    low, high_value = (float(np.quantile(thin, 0.02)) - 0.35 if len(thin) else 0.6), float(density.max())
    scaled = np.clip((density - low) / (high_value - low), 0.0, 1.0)
    # The display curve spends its greys on the lungs, as the characteristic curve of a film does.
    scaled = (1.0 - np.exp(scaled * np.float32(-2.2))) * np.float32(1.0 / (1.0 - math.exp(-2.2)))
    scaled **= machine.gamma
    if rng is not None:
        # Few photons come through dense parts: they are noisier.
        grain = rng.standard_normal(scaled.shape, dtype=np.float32)
        scaled += grain * (machine.noise * (0.5 + scaled))
        np.clip(scaled, 0.0, 1.0, out=scaled)
    return np.asarray(scaled, dtype=np.float32)


def _centers(count: int, block: int) -> Float[np.ndarray, "C"]:
    return (np.arange(count) + 0.5) * block - 0.5
