"""Renders the CT of a visit: body wall, bones, mediastinum, lungs with their lesions, table and noise."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int32

from mm.phantom.anatomy import (
    BODY_SIDES,
    SIGN,
    Anatomy,
    cage_plane,
    dome_plane,
    heart_radius,
    hilum,
    narrowing,
)
from mm.phantom.bones import cage_box, paint_bones, paint_ribs, paint_swelling
from mm.phantom.findings import Plaque
from mm.phantom.lattice import Field, Lattice
from mm.phantom.lungs import AIR_HU, Bits, bit, fill
from mm.phantom.paint import blend, disc, ellipsoid, span
from mm.phantom.patient import Patient, Scanner
from mm.phantom.table import TABLE

FAT_HU = -95.0


@dataclass(frozen=True)
class Rendered:
    """A CT on its scanner's grid.

    Attributes:
        voxels: HU, whole numbers.
        affine: Voxel index (z, y, x, 1) to LPS (x, y, z, 1) in mm.
        bits: Bit k is set where finding k (of `mm.ontology.FINDINGS`) is.
    """

    voxels: Float32[np.ndarray, "Z Y X"]
    affine: Float[np.ndarray, "4 4"]
    bits: Int32[np.ndarray, "Z Y X"]


def scanner_lattice(scanner: Scanner) -> Lattice:
    """The scanner's voxels in the body frame."""
    affine = scanner.affine
    roll = math.radians(scanner.roll_deg)
    cos, sin = math.cos(roll), math.sin(roll)
    to_body = np.array([[cos, sin, 0, 0], [-sin, cos, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]) @ affine
    nz, ny, nx = scanner.shape
    row, column = np.arange(ny)[:, None], np.arange(nx)[None]
    x = to_body[0, 1] * row + to_body[0, 2] * column + to_body[0, 3]
    y = to_body[1, 1] * row + to_body[1, 2] * column + to_body[1, 3]
    z = to_body[2, 0] * np.arange(nz) + to_body[2, 3]
    to_index = np.linalg.inv(to_body)[:3]
    return Lattice(x.astype(np.float32), y.astype(np.float32), z.astype(np.float32), scanner.spacing_mm, to_index)


def render_ct(patient: Patient, visit_index: int, *, noise: bool = True) -> Rendered:
    """Renders one visit.

    Args:
        patient: From `draw_patient`.
        visit_index: 0 is the current visit.
        noise: False leaves noise, offset and rounding away (to measure the truth).

    Raises:
        ValueError: The patient has no such visit.
    """
    if not 0 <= visit_index < len(patient.visits):
        raise ValueError(f"visit_index must be in 0..{len(patient.visits) - 1}, got {visit_index}")
    visit = patient.visits[visit_index]
    anatomy, lesions, scanner = visit.anatomy, visit.lesions, visit.scanner
    lattice = scanner_lattice(scanner)
    bits = np.zeros(lattice.shape, np.int32)
    voxels = _wall(anatomy, lattice)
    _inside(anatomy, lattice, voxels)
    _heart(anatomy, lattice, voxels, bits)
    _great_vessels(anatomy, lattice, voxels)
    paint_bones(anatomy, lattice, voxels)
    cracks = tuple(item for item in lesions.fractures if item.on_ct)
    paint_ribs(anatomy, lattice, voxels, cracks)
    for side in BODY_SIDES:
        lung = fill(anatomy, lesions, side, lattice, upright=False, details=True)
        blend(voxels[lung.box], lung.share, lung.hu)
        bits[lung.box] |= lung.bits
    if lesions.emphysema.percent <= TABLE.emphysema_limit_percent:
        bits &= ~np.int32(bit("emphysema"))
    for crack in cracks:
        paint_swelling(crack, lattice, voxels, bits)
    for plaque in lesions.plaques:
        _plaque(plaque, lattice, voxels, bits)
    if scanner.table_gap_mm is not None:
        _table(anatomy, lattice, voxels, scanner.table_gap_mm)
    if noise:
        _scan(voxels, scanner, np.random.Generator(np.random.SFC64([patient.seed, visit_index, 7])))
    return Rendered(voxels, scanner.affine, bits)


def _wall(anatomy: Anatomy, lattice: Lattice) -> Field:
    """Air, fat and muscle."""
    height = (lattice.z - anatomy.middle_mm) / 150.0
    outer_x = anatomy.half_width + anatomy.wall + 0.8 * anatomy.fat
    outer_y = anatomy.half_depth + anatomy.wall + anatomy.fat + 4.0
    power = 2.5
    radius = ((np.abs(lattice.x) / outer_x) ** power + (np.abs(lattice.y) / outer_y) ** power) ** (1 / power)
    radius = np.maximum(radius, 1e-3)
    unit = np.hypot(lattice.x, lattice.y) / radius + 1e-3
    scale = 1.0 - 0.22 * np.clip(height - 0.62, 0.0, 1.0) - 0.05 * height**2
    share = _soft(radius, scale, unit, lattice.soft_mm)
    share *= FAT_HU - AIR_HU
    share += AIR_HU
    cage, slope = cage_plane(anatomy, lattice)
    wide = np.maximum(narrowing(anatomy, lattice.z), 0.62)
    muscle = _soft(cage, wide, slope, lattice.soft_mm, offset=anatomy.wall)
    # Muscle lies under fat, never beyond the skin.
    muscle *= anatomy.soft_hu + 8.0 - FAT_HU
    muscle[share < FAT_HU - 20.0] = 0.0
    share += muscle
    return share


def _soft(radius: np.ndarray, scale: np.ndarray, unit: np.ndarray, soft: float, *, offset: float = 0.0) -> Field:
    """Share of each voxel within `offset` mm of the surface radius = scale(z)."""
    slope = (unit * (-1.0 / soft)).astype(np.float32)
    planar = (radius * slope + (0.5 + offset / soft)).astype(np.float32)
    share = scale.astype(np.float32)[:, None, None] * slope
    np.subtract(planar, share, out=share)
    return np.asarray(np.clip(share, 0.0, 1.0, out=share))


def _inside(anatomy: Anatomy, lattice: Lattice, voxels: Field) -> None:
    """Mediastinal fat above the diaphragm, liver, spleen and stomach below."""
    box = cage_box(anatomy, lattice, -400.0, anatomy.apex)
    part = lattice.crop(box)
    cage, unit = cage_plane(anatomy, part)
    share = _soft(cage, narrowing(anatomy, part.z), unit, part.soft_mm)
    dome = np.where(part.x > 0, dome_plane(anatomy, "left", part), dome_plane(anatomy, "right", part))
    top = int(np.searchsorted(part.z, max(anatomy.dome_of(side) for side in BODY_SIDES) + 8.0))
    organs = np.full(part.shape, FAT_HU + 30.0, np.float32)
    below = np.clip((dome - part.z[:top, None, None]) * (1.0 / part.spacing_mm[0]) + 0.5, 0.0, 1.0)
    liver = np.where(part.x < 20.0, anatomy.soft_hu + 14.0, anatomy.soft_hu + 4.0).astype(np.float32)
    blend(organs[:top], below, liver)
    blend(voxels[box], share, organs)
    # The stomach's bubble under the left dome looks like free air.
    rng = np.random.default_rng([anatomy.seed, 11])
    size = rng.uniform(8.0, 26.0, 3)
    x, y, _ = SIGN["left"] * 0.42 * anatomy.half_width, -0.2 * anatomy.half_depth, 0.0
    where, bubble = ellipsoid(
        lattice,
        (float(x), float(y), anatomy.dome_of("left") - float(size[2]) - 12.0),
        (float(size[0]), float(size[1]), float(size[2])),
    )
    blend(voxels[where], bubble, -960.0)


def _heart(anatomy: Anatomy, lattice: Lattice, voxels: Field, bits: Bits) -> None:
    (x, y, z), (a, b, c) = anatomy.heart, anatomy.heart_axes
    deep = 1.15 * b
    box = lattice.box((x - a - 3, y - deep - 3, z - c - 6), (x + a + 3, y + deep + 3, z + c + 6))
    part = lattice.crop(box)
    radius = heart_radius(anatomy, part)
    mean = sum(anatomy.heart_axes) / 3
    share = np.clip((1.0 - radius) * (mean / part.soft_mm) + 0.5, 0.0, 1.0)
    blood = np.clip((0.94 - radius) * (mean / part.soft_mm) + 0.5, 0.0, 1.0)
    blood *= anatomy.soft_hu - 2.0 - (FAT_HU + 20.0)
    blood += FAT_HU + 20.0
    blend(voxels[box], share, blood)
    if anatomy.ratio > TABLE.cardiothoracic_limit:
        bits[box] |= np.where(share > 0.5, bit("cardiomegaly"), 0).astype(np.int32)


def _great_vessels(anatomy: Anatomy, lattice: Lattice, voxels: Field) -> None:
    """Aorta, superior vena cava, pulmonary arteries, trachea and main bronchi."""
    blood, dz = anatomy.soft_hu, lattice.spacing_mm[0]
    box = lattice.box((-70.0, -anatomy.half_depth, -400.0), (70.0, anatomy.half_depth, 400.0))
    part, target = lattice.crop(box), voxels[box]
    (x0, y0, r0), (x1, y1, r1) = anatomy.ascending_aorta, anatomy.descending_aorta
    top = anatomy.heart[2] + 0.5 * anatomy.heart_axes[2]
    lobe = hilum(anatomy, "left")[2]
    columns = (
        (x1, y1, r1, -400.0, anatomy.arch_z, blood),
        (x0, y0, r0, top, anatomy.arch_z, blood),
        (x0 - 14.0, y0 + 12.0, 8.5, top, anatomy.apex - 20.0, blood - 4.0),
        (2.0, 38.0, 6.0, -400.0, 400.0, 30.0),
        (16.0, 4.0, 5.0, anatomy.arch_z + 18.0, 400.0, blood),
        (-14.0, 0.0, 5.5, anatomy.arch_z + 18.0, 400.0, blood),
        (0.0, 12.0, 8.5, lobe + 16.0, 400.0, -985.0),
    )
    for x, y, radius, low, high, hu in columns:
        inside = np.flatnonzero((part.z > low - dz) & (part.z < high + dz))
        if len(inside):
            chosen = slice(int(inside[0]), int(inside[-1]) + 1)
            share = span(part.z[chosen], low, high, dz) * disc(part, x, y, radius)
            blend(target[chosen], share, hu)
    half, middle = 0.5 * math.hypot(x1 - x0, y1 - y0), (0.5 * (x0 + x1), 0.5 * (y0 + y1))
    angle = np.linspace(0.0, math.pi, 40)
    along = np.cos(angle) * half
    arch = np.stack(
        [
            middle[0] - along * (x1 - x0) / (2 * half),
            middle[1] - along * (y1 - y0) / (2 * half),
            anatomy.arch_z + 0.75 * half * np.sin(angle),
        ],
        1,
    )
    _rope(part, target, arch, 12.0, blood)
    for side in BODY_SIDES:
        root = np.array(hilum(anatomy, side))
        carina = np.array([0.0, 12.0, lobe + 18.0])
        trunk = np.array([6.0, -14.0, lobe + 2.0])
        _rope(part, target, trunk + np.linspace(0, 1, 20)[:, None] * (root - trunk), 8.0, blood)
        bronchus = carina + np.linspace(0, 1, 20)[:, None] * (root + np.array([0, 6.0, 0]) - carina)
        _rope(part, target, bronchus, 5.5, -960.0)


def _rope(part: Lattice, target: Field, path: Float[np.ndarray, "N 3"], radius: float, hu: float) -> None:
    """A thick tube along a short path, by distance to its points."""
    low, high = path.min(0) - radius - 6.0, path.max(0) + radius + 6.0
    box = part.box((low[0], low[1], low[2]), (high[0], high[1], high[2]))
    near = part.crop(box)
    if 0 in near.shape:
        return
    points = path.astype(np.float32)
    square = np.full(near.shape, np.inf, np.float32)
    for x, y, z in points[::2]:
        planar = (near.x - x) ** 2 + (near.y - y) ** 2
        np.minimum(square, planar + ((near.z - z) ** 2)[:, None, None], out=square)
    share = np.clip((radius - np.sqrt(square)) * (1.0 / part.soft_mm) + 0.5, 0.0, 1.0)
    blend(target[box], share, hu)


def _plaque(plaque: Plaque, lattice: Lattice, voxels: Field, bits: Bits) -> None:
    radius = (plaque.volume_mm3 * 0.75 / math.pi) ** (1 / 3)
    where, share = ellipsoid(
        lattice, plaque.center, (radius * plaque.axes[0], radius * plaque.axes[1], radius * plaque.axes[2])
    )
    if share.size == 0 or share.max() <= 0.0:
        return
    blend(voxels[where], share, plaque.hu)
    mark = (share > 0.15) | (share == share.max())
    bits[where] |= np.where(mark, bit("calcification"), 0).astype(np.int32)


def _table(anatomy: Anatomy, lattice: Lattice, voxels: Field, gap: float) -> None:
    top = anatomy.half_depth + anatomy.wall + anatomy.fat + 4.0 + gap
    depth = lattice.y - top + 2.5e-4 * lattice.x**2
    shell = np.clip((2.2 - np.abs(np.abs(depth - 12.0) - 11.0)) / lattice.soft_mm + 0.5, 0.0, 1.0)
    shell *= np.abs(lattice.x) < 190.0
    rows = np.flatnonzero(shell.any(1))
    if len(rows):
        chosen = slice(int(rows[0]), int(rows[-1]) + 1)
        np.maximum(voxels[:, chosen], AIR_HU + shell[chosen].astype(np.float32) * 850.0, out=voxels[:, chosen])


def _scan(voxels: Field, scanner: Scanner, rng: np.random.Generator) -> None:
    """Noise, miscalibration and rounding, in place."""
    tap = dict(TABLE.noise_tap)[scanner.kernel]
    grain = rng.standard_normal(voxels.shape, dtype=np.float32)
    grain[:, 1:] += tap * grain[:, :-1]
    grain[:, :, 1:] += tap * grain[:, :, :-1]
    # More photons are lost in the shoulders and in the abdomen.
    loss = 1.0 + 0.15 * np.cos(np.linspace(0.0, 2 * math.pi, len(voxels))).astype(np.float32)
    grain *= (loss * np.float32(scanner.noise_hu / (1.0 + tap * tap)))[:, None, None]
    voxels += grain
    voxels += scanner.hu_offset
    np.rint(voxels, out=voxels)
    np.clip(voxels, -1024.0, 3071.0, out=voxels)
