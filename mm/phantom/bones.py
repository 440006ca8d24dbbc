"""Spine, sternum, shoulder blades and ribs of a CT, and their fractures."""

import math

import numpy as np

from mm.phantom.anatomy import (
    NUM_RIBS,
    RIB_DEPTH_MM,
    SIGN,
    Anatomy,
    cage_plane,
    narrowing,
    rib_drop,
)
from mm.phantom.findings import Fracture
from mm.phantom.lattice import Field, Lattice, Slices
from mm.phantom.lungs import Bits, bit
from mm.phantom.paint import blend, disc, ellipsoid, span

RIB_HALF_MM = 5.8


def cage_box(anatomy: Anatomy, lattice: Lattice, low: float, high: float, *, margin: float = 4.0) -> Slices:
    """Index box around the rib cage between two heights."""
    wide, deep = anatomy.half_width + margin, anatomy.half_depth + margin
    return lattice.box((-wide, -deep, low), (wide, deep, high))


def paint_bones(anatomy: Anatomy, lattice: Lattice, voxels: Field) -> None:
    """Spine, sternum and shoulder blades."""
    x, y = anatomy.spine
    box = lattice.box((-40.0, y - 26.0, -400.0), (40.0, y + 62.0, 400.0))
    part, target = lattice.crop(box), voxels[box]
    body = disc(part, x, y, 17.0)
    core = disc(part, x, y, 14.0)
    phase = np.cos(2 * math.pi * part.z / 25.0)
    disk = np.clip(3.0 * (phase - 0.72), 0.0, 1.0).astype(np.float32)[:, None, None]
    bone = (420.0 - 240.0 * core) * (1.0 - disk) + 85.0 * disk
    blend(target, body, bone)
    arch = np.maximum(disc(part, x, y + 27.0, 14.0) - disc(part, x, y + 26.0, 9.0), 0.0)
    wing = np.clip((4.5 - np.abs(part.y - (y + 22.0))) / part.soft_mm + 0.5, 0.0, 1.0)
    wing *= np.clip((34.0 - np.abs(part.x)) / part.soft_mm + 0.5, 0.0, 1.0) * (np.abs(part.x) > 11.0)
    spine = np.clip((3.0 - np.abs(part.x)) / part.soft_mm + 0.5, 0.0, 1.0)
    spine *= np.clip((13.0 - np.abs(part.y - (y + 48.0))) / part.soft_mm + 0.5, 0.0, 1.0)
    back = np.maximum(np.maximum(arch, wing), spine).astype(np.float32)
    height = (0.45 + 0.55 * np.clip(1.5 - 2.0 * (phase + 0.2), 0.0, 1.0)).astype(np.float32)[:, None, None]
    blend(target, back * height, 480.0)
    blend(target, disc(part, x, y + 26.0, 8.0), 30.0)
    front = -anatomy.half_depth - 7.0
    box = lattice.box((-26.0, front - 10.0, anatomy.dome[0]), (26.0, front + 12.0, anatomy.apex - 18.0))
    part = lattice.crop(box)
    share = np.clip((1.0 - np.hypot(part.x / 17.0, (part.y - front) / 5.5)) * 5.5 / part.soft_mm + 0.5, 0.0, 1.0)
    blend(voxels[box], share * span(part.z, anatomy.dome[0] + 6.0, anatomy.apex - 24.0, 6.0), 210.0)
    for sign in SIGN.values():
        box = lattice.box((min(sign * 62.0, sign * 145.0), 0.0, 0.0), (max(sign * 62.0, sign * 145.0), 400.0, 400.0))
        part = lattice.crop(box)
        cage, unit = cage_plane(anatomy, part)
        depth = (cage - 0.93) * unit - (anatomy.wall + 3.0)
        blade = np.clip((2.6 - np.abs(depth)) / part.soft_mm + 0.5, 0.0, 1.0)
        blade *= np.clip((np.abs(part.x) - 66.0) / 6.0, 0.0, 1.0) * np.clip((138.0 - np.abs(part.x)) / 6.0, 0.0, 1.0)
        blade *= part.y > 0.25 * anatomy.half_depth
        blend(voxels[box], blade * span(part.z, 14.0, anatomy.apex + 4.0, 8.0), 420.0)


def paint_ribs(anatomy: Anatomy, lattice: Lattice, voxels: Field, cracks: tuple[Fracture, ...]) -> None:
    """All ribs at once: a voxel of the wall belongs to the rib whose height at its angle is nearest."""
    low = anatomy.rib_top - anatomy.rib_pitch * NUM_RIBS - anatomy.rib_drop
    box = cage_box(anatomy, lattice, low, anatomy.rib_top + 14.0, margin=16.0)
    part, target = lattice.crop(box), voxels[box]
    cage, unit = cage_plane(anatomy, part)
    depth = cage - narrowing(anatomy, part.z)[:, None, None]
    depth *= unit
    depth -= RIB_DEPTH_MM
    shell = np.flatnonzero(np.abs(depth) < 7.0)
    slices, plane = np.divmod(shell, part.x.size)
    x, y = part.x.ravel(), part.y.ravel()
    angle = np.arctan2(np.abs(x) / np.float32(anatomy.half_width), y / np.float32(anatomy.half_depth))
    height = rib_drop(anatomy, angle).astype(np.float32)
    depth_flat = depth.ravel()[shell]
    above = np.float32(anatomy.rib_top) - height[plane] - part.z[slices]
    rib = np.rint(above * np.float32(1.0 / anatomy.rib_pitch))
    away = above - rib * np.float32(anatomy.rib_pitch)
    gap = np.zeros_like(away)
    for crack in cracks:
        _break(crack, anatomy, (x, y, angle), plane, rib, away, depth_flat, gap)
    radius = np.sqrt((depth_flat * np.float32(1 / 4.2)) ** 2 + (away * np.float32(1 / RIB_HALF_MM)) ** 2)
    share = np.clip((1.0 - radius) * np.float32(4.2 / part.soft_mm) + 0.5, 0.0, 1.0)
    share *= (rib >= 0) & (rib < NUM_RIBS) & (np.abs(x[plane]) > 9.0)
    share *= 1.0 - gap
    # Behind the cortex is marrow; in front of about 135 degrees the rib is cartilage.
    bone = 330.0 + 420.0 * np.clip(radius * 1.6 - 0.6, 0.0, 1.0)
    front = np.clip((angle - 2.35) * 6.0, 0.0, 1.0).astype(np.float32)[plane]
    bone += front * (95.0 - bone)
    flat = target.reshape(-1) if target.flags.c_contiguous else None
    if flat is None:
        rows, columns = np.divmod(plane, part.x.shape[1])
        values = target[slices, rows, columns]
        values += share * (bone.astype(np.float32) - values)
        target[slices, rows, columns] = values
    else:
        flat[shell] += share * (bone.astype(np.float32) - flat[shell])


def _break(
    crack: Fracture,
    anatomy: Anatomy,
    where: tuple[np.ndarray, np.ndarray, np.ndarray],
    plane: np.ndarray,
    rib: np.ndarray,
    away: np.ndarray,
    depth: np.ndarray,
    gap: np.ndarray,
) -> None:
    """Shifts the part of a rib in front of the break and opens a gap, in place."""
    x, _, angle = where
    mine = np.flatnonzero((rib == crack.rib) & (np.sign(x[plane]) == SIGN[crack.side]))
    # Arc length from the break, positive towards the front.
    bend = math.hypot(anatomy.half_width * math.cos(crack.angle), anatomy.half_depth * math.sin(crack.angle))
    arc = (angle[plane[mine]] - crack.angle) * bend
    shift = np.where(arc > 0, crack.step_mm * np.exp(-np.maximum(arc, 0.0) / 30.0), 0.0).astype(np.float32)
    away[mine] -= 0.8 * shift
    depth[mine] += 0.6 * shift
    gap[mine] = np.maximum(gap[mine], np.clip((0.5 * crack.gap_mm - np.abs(arc)) / 2.75 + 0.5, 0.0, 1.0))


def paint_swelling(crack: Fracture, lattice: Lattice, voxels: Field, bits: Bits) -> None:
    """Blood around a break, bulging into the chest."""
    x, y, z = crack.center
    inward = math.hypot(x, y)
    size = crack.swelling_mm
    middle = (x * (1 - 4.5 / inward), y * (1 - 4.5 / inward), z)
    where, share = ellipsoid(lattice, middle, (size, size, size))
    if share.size == 0:
        return
    # Bone stays what it is.
    share *= voxels[where] < 150.0
    blend(voxels[where], share, 55.0)
    bits[where] |= np.where(share > 0.5, bit("rib_fracture"), 0).astype(np.int32)
