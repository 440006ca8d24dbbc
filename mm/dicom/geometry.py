"""From slices to a stack: order along the normal, spacing, affine; whatever isn't regular is refused.

Everything is decided from ImagePositionPatient and ImageOrientationPatient (PS3.3 C.7.6.2.1.1), never from
file names, InstanceNumber, SliceThickness or SpacingBetweenSlices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float

from mm.dicom.errors import GeometryError
from mm.dicom.instance import Instance

FARTHEST_MM: Final = 1e6
ROUNDING_MM: Final = 0.11  # headers that round coordinates to a tenth of a millimetre
GAP_SHARE: Final = 0.03  # or this share of the distance between slices
DRIFT_SHARE: Final = 0.25  # of the distance that a slice may be away from the regular stack


@dataclass(frozen=True, eq=False)
class Stack:
    """Slices in the order of the normal and where they lie.

    Attributes:
        order: Index into the given instances for every slice.
        affine: Voxel index (z, y, x, 1) to LPS mm.
        spacing_mm: (z, y, x).
    """

    order: tuple[int, ...]
    affine: Float[np.ndarray, "4 4"]
    spacing_mm: tuple[float, float, float]


def plane(instance: Instance) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """Direction along a row (to the next column) and along a column (to the next row), as unit vectors.

    Raises:
        GeometryError: `missing_geometry` or `invalid_orientation`.
    """
    if instance.orientation is None:
        raise GeometryError("missing_geometry")
    values = np.asarray(instance.orientation, dtype=np.float64)
    if not (np.abs(values) < 2).all():  # NaN as well, and what would overflow
        raise GeometryError("invalid_orientation")
    along_row, along_column = values[:3], values[3:]
    lengths = np.linalg.norm(along_row), np.linalg.norm(along_column)
    if not np.isfinite(values).all() or max(abs(lengths[0] - 1), abs(lengths[1] - 1)) > 1e-2:
        raise GeometryError("invalid_orientation")
    along_row, along_column = along_row / lengths[0], along_column / lengths[1]
    if abs(along_row @ along_column) > 1e-3:
        raise GeometryError("invalid_orientation")
    return along_row, along_column


def _check_gaps(along: Float[np.ndarray, " N"]) -> None:
    """Refuses positions (mm along the normal, ascending) that aren't evenly spaced, naming the place."""
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    tolerance = max(ROUNDING_MM, GAP_SHARE * usual)
    for index, gap in enumerate(gaps.tolist()):
        place = f"between slice {index + 1} and {index + 2} of {len(along)}"
        if gap < max(1e-3, 0.05 * usual):
            raise GeometryError("duplicate_position", place)
        if abs(gap - usual) <= min(tolerance, 0.3 * usual):
            continue
        times = round(gap / usual)
        if times >= 2 and abs(gap - times * usual) <= times * tolerance:
            raise GeometryError("missing_slice", place)
        raise GeometryError("uneven_spacing", place)
    step = (along[-1] - along[0]) / len(gaps)
    away = np.abs(along - along[0] - step * np.arange(len(along)))
    if away.max() > DRIFT_SHARE * step:
        raise GeometryError("uneven_spacing", f"at slice {int(away.argmax()) + 1} of {len(along)}")


def stack(instances: Sequence[Instance]) -> Stack:
    """Orders slices of one orientation and size and checks that they are a regular box.

    Raises:
        GeometryError: With the reason and the place, slices counted from 1 along the normal.
    """
    first = instances[0]
    along_row, along_column = plane(first)
    if first.spacing is None or any(item.position is None for item in instances):
        raise GeometryError("missing_geometry")
    spacing = np.asarray(first.spacing, dtype=np.float64)
    positions = np.asarray([item.position for item in instances], dtype=np.float64)
    if not np.isfinite(spacing).all() or spacing.min() <= 0:
        raise GeometryError("invalid_spacing")
    if not (np.abs(positions) < FARTHEST_MM).all():  # NaN as well, and what would overflow
        raise GeometryError("missing_geometry")
    if len(instances) < 2:
        raise GeometryError("single_slice")
    normal = np.cross(along_row, along_column)
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    positions, along = positions[order], along[order]
    _check_gaps(along)
    count = len(instances)
    sideways = positions - positions[0] - np.outer(along - along[0], normal)
    limit = max(ROUNDING_MM, 0.5 * float(spacing.min()))
    off = np.linalg.norm(sideways, axis=1)
    if off.max() > limit:
        # A tilted gantry moves every slice by the same amount; one that was moved stands out of the line.
        share = np.arange(count) / (count - 1)
        if np.linalg.norm(sideways - np.outer(share, sideways[-1]), axis=1).max() <= limit and off[-1] > limit:
            raise GeometryError("gantry_tilt")
        raise GeometryError("shifted_slice", f"slice {int(off.argmax()) + 1} of {count}")
    affine = np.eye(4)
    affine[:3, 0] = normal * (along[-1] - along[0]) / (count - 1)
    affine[:3, 1] = along_column * spacing[0]
    affine[:3, 2] = along_row * spacing[1]
    affine[:3, 3] = positions[0]
    distance = float((along[-1] - along[0]) / (count - 1))
    return Stack(tuple(order.tolist()), affine, (distance, float(spacing[0]), float(spacing[1])))
