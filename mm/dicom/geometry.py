"""From slices to a stack: order along the normal, spacing, affine; whatever isn't regular is refused.

Everything is decided from ImagePositionPatient and ImageOrientationPatient (PS3.3 C.7.6.2.1.1), never from
file names, InstanceNumber, SliceThickness, SpacingBetweenSlices or GantryDetectorTilt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from jaxtyping import Float, Int

from mm.dicom.errors import GeometryError
from mm.dicom.instance import Frame

ROUNDING_MM: Final = 0.11  # headers that round coordinates to a tenth of a millimetre
MISPLACED_MM: Final = 0.25  # that a voxel may be away from where its header has it
GAP_SHARE: Final = 0.03  # of the distance between slices that one gap may differ by
DRIFT_SHARE: Final = 0.25  # of it that a slice may be away from the regular stack
SAME_PLACE_SHARE: Final = 0.05  # of it within which two slices are in one place
SAME_PLACE_MM: Final = 1e-3
FARTHEST_MM: Final = 1e6


@dataclass(frozen=True, eq=False)
class Stack:
    """Slices in the order of the normal and where they lie.

    Attributes:
        order: Index into the given frames for every slice.
        affine: Voxel index (z, y, x, 1) to LPS mm. Column 0 is the step between slices as the positions have it:
            along the normal, or sheared against it where they are.
        spacing_mm: (z, y, x); z along the normal.
        tilted: True where the shear is more than a voxel may be misplaced by: gantry tilt.
    """

    order: tuple[int, ...]
    affine: Float[np.ndarray, "4 4"]
    spacing_mm: tuple[float, float, float]
    tilted: bool


@lru_cache(maxsize=64)
def directions(orientation: tuple[float, ...] | None) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """Direction along a row (to the next column) and along a column (to the next row), as unit vectors.

    All slices of a series have the same, so it is worth keeping; nobody may write to what is returned.

    Args:
        orientation: ImageOrientationPatient, or None where it isn't given.

    Raises:
        GeometryError: `missing_geometry` or `invalid_orientation`.
    """
    if orientation is None:
        raise GeometryError("missing_geometry")
    values = np.asarray(orientation, dtype=np.float64)
    if not (np.abs(values) < 2).all():  # NaN as well, and what would overflow
        raise GeometryError("invalid_orientation")
    along_row, along_column = values[:3], values[3:]
    lengths = np.linalg.norm(along_row), np.linalg.norm(along_column)
    if max(abs(lengths[0] - 1), abs(lengths[1] - 1)) > 1e-2:
        raise GeometryError("invalid_orientation")
    along_row, along_column = along_row / lengths[0], along_column / lengths[1]
    if abs(along_row @ along_column) > 1e-3:
        raise GeometryError("invalid_orientation")
    along_row.flags.writeable = along_column.flags.writeable = False
    return along_row, along_column


def linked(values: Float[np.ndarray, " N"], tolerance: float) -> Int[np.ndarray, " N"]:
    """Numbers values by groups, ascending: a gap of more than `tolerance` to the next value starts another."""
    order = np.argsort(values, kind="stable")
    numbers = np.empty(len(values), dtype=np.int64)
    numbers[order] = np.concatenate([[0], np.cumsum(np.diff(values[order]) > tolerance)])
    return numbers


def _positions(frames: Sequence[Frame]) -> Float[np.ndarray, "N 3"]:
    if any(item.position is None for item in frames):
        raise GeometryError("missing_geometry")
    positions = np.asarray([item.position for item in frames], dtype=np.float64)
    if not (np.abs(positions) < FARTHEST_MM).all():  # false for NaN
        raise GeometryError("missing_geometry")
    return positions


def places(frames: Sequence[Frame]) -> Int[np.ndarray, " N"]:
    """Which place along the normal each frame of one orientation is in, counted from 0.

    Raises:
        GeometryError: They don't say where they lie.
    """
    along_row, along_column = directions(frames[0].orientation)
    along = _positions(frames) @ np.cross(along_row, along_column)
    gaps = np.diff(np.sort(along))
    gaps = gaps[gaps > SAME_PLACE_MM]
    usual = float(np.quantile(gaps, 0.9)) if len(gaps) else 0.0
    return linked(along, max(SAME_PLACE_MM, SAME_PLACE_SHARE * usual))


def _check_gaps(along: Float[np.ndarray, " N"]) -> None:
    """Refuses positions (mm along the normal, ascending) that aren't evenly spaced, naming the place."""
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    tolerance = max(ROUNDING_MM, GAP_SHARE * usual)
    same_place = gaps < max(SAME_PLACE_MM, SAME_PLACE_SHARE * usual)
    odd = same_place | ~(np.abs(gaps - usual) <= min(tolerance, 0.3 * usual))
    if odd.any():
        index = int(odd.argmax())
        place = f"between slice {index + 1} and {index + 2} of {len(along)}"
        if same_place[index]:
            raise GeometryError("duplicate_position", place)
        times = round(float(gaps[index]) / usual)
        if times >= 2 and abs(gaps[index] - times * usual) <= times * tolerance:
            raise GeometryError("missing_slice", place)
        raise GeometryError("uneven_spacing", place)
    step = (along[-1] - along[0]) / len(gaps)
    away = np.abs(along - along[0] - step * np.arange(len(along)))
    if away.max() > min(DRIFT_SHARE * step, MISPLACED_MM):
        raise GeometryError("uneven_spacing", f"at slice {int(away.argmax()) + 1} of {len(along)}")


def _turned(frames: Sequence[Frame], spacing: Float[np.ndarray, "2"]) -> Float[np.ndarray, " N"]:
    """How many mm the farthest corner of each slice is off because it is turned against the first."""
    turns = np.asarray([item.orientation for item in frames], dtype=np.float64) - np.asarray(frames[0].orientation)
    instance = frames[0].instance
    width, height = (instance.columns - 1) * spacing[1], (instance.rows - 1) * spacing[0]
    away: Float[np.ndarray, " N"] = np.linalg.norm(turns[:, :3], axis=1) * width
    away += np.linalg.norm(turns[:, 3:], axis=1) * height
    return away


def stack(frames: Sequence[Frame]) -> Stack:
    """Orders slices of one orientation and size and checks that they are a regular box, sheared or not.

    Raises:
        GeometryError: With the reason and the place, slices counted from 1 along the normal.
    """
    first = frames[0]
    along_row, along_column = directions(first.orientation)
    if first.spacing is None:
        raise GeometryError("missing_geometry")
    spacing = np.asarray(first.spacing, dtype=np.float64)
    positions = _positions(frames)
    if not (spacing < FARTHEST_MM).all() or spacing.min() <= 0:
        raise GeometryError("invalid_spacing")
    count = len(frames)
    if count < 2:
        raise GeometryError("single_slice")
    normal = np.cross(along_row, along_column)
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    positions, along = positions[order], along[order]
    _check_gaps(along)
    sideways = positions - positions[0] - np.outer(along - along[0], normal)
    shear = sideways[-1] / (count - 1)
    off = np.linalg.norm(sideways, axis=1)
    unsheared = np.linalg.norm(sideways - np.outer(np.arange(count), shear), axis=1)
    limit = max(ROUNDING_MM, min(0.5 * float(spacing.min()), MISPLACED_MM))
    if unsheared.max() > limit:  # a tilted gantry moves every slice by the same amount; this one stands out
        if off[-1] <= limit:
            unsheared = off
        raise GeometryError("shifted_slice", f"slice {int(unsheared.argmax()) + 1} of {count}")
    distance = float((along[-1] - along[0]) / (count - 1))
    drift = along - along[0] - distance * np.arange(count)
    is_sheared = bool(off.max() > ROUNDING_MM)
    away = np.hypot(drift, unsheared if is_sheared else off) + _turned(frames, spacing)[order]
    if not away.max() <= MISPLACED_MM:
        raise GeometryError("shifted_slice", f"slice {int(away.argmax()) + 1} of {count}")
    affine = np.eye(4)
    affine[:3, 0] = normal * distance + (shear if is_sheared else 0.0)
    affine[:3, 1] = along_column * spacing[0]
    affine[:3, 2] = along_row * spacing[1]
    affine[:3, 3] = positions[0]
    tilted = bool(off.max() > max(ROUNDING_MM, 0.5 * float(spacing.min())))
    return Stack(tuple(order.tolist()), affine, (distance, float(spacing[0]), float(spacing[1])), tilted)
