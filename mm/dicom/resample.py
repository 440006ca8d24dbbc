"""Canonical grids: axes Z to the head, Y to the back, X to the patient's left, centred on the body.

One kernel serves all axes: the overlap of an output cell with the source cells. Where the output is as
fine as the source or finer the cell is one source voxel wide and this *is* linear interpolation; where it
is coarser it is the area average, so nothing aliases and the change from one to the other is continuous.
"""

from dataclasses import dataclass
from itertools import permutations
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch.nn import functional

from mm.dicom.volume import Image, Volume, source_slice

__all__ = [
    "IMAGE_GRID",
    "MODEL_GRID",
    "Grid",
    "body_center",
    "canonical",
    "fit_bits",
    "fit_colours",
    "fit_image",
    "fit_point",
    "grid_affine",
    "resample",
    "resample_bits",
    "source_slice",
    "unfit_point",
]

AIR_HU: Final = -1024.0
BODY_HU: Final = -300.0
CELL_MM: Final = 5.0  # of the coarse mask in which the body is looked for
STRAIGHT: Final = 0.1  # output voxels by which a corner may be off before axes count as oblique
CHUNK: Final = 1 << 21  # voxels of the source at a time: what the cache holds
BAND: Final = 8  # outputs along an axis that are summed together


@dataclass(frozen=True)
class Grid:
    """A canonical grid: number of voxels and their spacing, both (z, y, x)."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"shape must be positive, got {self.shape}")
        if not all(np.isfinite(step) and step > 0 for step in self.spacing_mm):
            raise ValueError(f"spacing_mm must be positive, got {self.spacing_mm}")


MODEL_GRID: Final = Grid((64, 128, 128), (5.0, 2.75, 2.75))
IMAGE_GRID: Final = 256


def grid_affine(grid: Grid, center_mm: tuple[float, float, float]) -> Float[np.ndarray, "4 4"]:
    """The affine of a grid whose middle lies on a patient point: column 0 to the head, 1 to the back, 2 left."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = grid.spacing_mm
    middle = (np.asarray(grid.shape, dtype=np.float64) - 1) / 2
    affine[:3, 3] = np.asarray(center_mm) - affine[:3, :3] @ middle
    affine[3, 3] = 1.0
    return affine


def canonical(
    voxels: Integer[np.ndarray, "A B C"] | Float[np.ndarray, "A B C"], affine: Float[np.ndarray, "4 4"]
) -> tuple[Integer[np.ndarray, "Z Y X"] | Float[np.ndarray, "Z Y X"], Float[np.ndarray, "4 4"]]:
    """A view of the voxels with axes turned and flipped as near to Z head, Y back, X left as they go.

    Returns:
        The view (nothing is copied) and its affine, whose [2, 0], [1, 1] and [0, 2] are positive.
    """
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # Canonical axis i is patient row 2 - i; take the assignment of stored axes that agrees best.
    order = max(permutations(range(3)), key=lambda axes: sum(abs(cosines[2 - i, axis]) for i, axis in enumerate(axes)))
    turned = affine.astype(np.float64)
    turned[:3, :3] = affine[:3, list(order)]
    view = voxels.transpose(order)
    for axis in range(3):
        if turned[2 - axis, axis] < 0:
            turned[:3, 3] += turned[:3, axis] * (view.shape[axis] - 1)
            turned[:3, axis] *= -1
            view = np.flip(view, axis)
    return view, turned


def _weights(num_source: int, num_target: int, start: float, step: float) -> Float[np.ndarray, "T S"]:
    """Overlap of output cells with source cells along one axis; zero rows where a centre lies outside.

    Output i has its centre at source index `start + i * step`. At the border the weights are of the part
    that is covered, so that the last slice isn't mixed with air.
    """
    centers = start + step * np.arange(num_target)[:, None]
    half = max(1.0, step) / 2
    cells = np.arange(num_source)[None, :]
    overlap = np.minimum(centers + half, cells + 0.5) - np.maximum(centers - half, cells - 0.5)
    overlap = overlap.clip(min=0.0)
    overlap[((centers < -0.5) | (centers > num_source - 0.5))[:, 0]] = 0.0
    total = overlap.sum(axis=1, keepdims=True)
    weights: Float[np.ndarray, "T S"] = np.divide(overlap, total, out=np.zeros_like(overlap), where=total > 0)
    return weights.astype(np.float32)


def _bands(weights: Float[np.ndarray, "T S"]) -> list[tuple[slice, slice, Float[torch.Tensor, "t s"]]]:
    """The weights that aren't zero, a few outputs at a time: those outputs, the stretch of the source they read."""
    bands = []
    for first in range(0, len(weights), BAND):
        part = weights[first : first + BAND]
        read = np.flatnonzero(part.any(axis=0))
        source = slice(int(read[0]), int(read[-1]) + 1) if len(read) else slice(0, 1)
        taken = torch.from_numpy(np.ascontiguousarray(part[:, source]))
        bands.append((slice(first, first + len(part)), source, taken))
    return bands


def _separable(
    view: Float[np.ndarray, "A B C"], weights: list[Float[np.ndarray, "_ _"]], fill: float
) -> Float[torch.Tensor, "Z Y X"]:
    """Applies one weight matrix an axis to `view - fill`, a slab of slices at a time.

    What lies below `fill` (padding outside the field of view of some CTs) counts as `fill`. Along the first axis to
    shrink, y, only the bands of the matrix that aren't zero are multiplied: the rest is a tenth of the work.
    """
    along_z, along_x = torch.from_numpy(weights[0]), torch.from_numpy(weights[2])
    bands = _bands(weights[1])
    num_slices, num_rows, num_columns = view.shape
    slab = max(1, CHUNK // (num_rows * num_columns))
    held = torch.empty(min(slab, num_slices), num_rows, num_columns)
    rows = torch.empty(num_slices, len(weights[1]), num_columns)
    for first in range(0, num_slices, slab):
        part = torch.from_numpy(np.ascontiguousarray(view[first : first + slab], dtype=np.float32))
        above = torch.clamp(part, min=fill, out=held[: len(part)]).sub_(fill)
        for outputs, source, taken in bands:
            rows[first : first + slab, outputs] = taken @ above[:, source]
    plane = rows @ along_x.T
    return (along_z @ plane.flatten(1)).reshape(-1, *plane.shape[1:])


def _largest_box(mask: Bool[np.ndarray, "Y X"]) -> tuple[float, float, int] | None:
    """Middle (y, x) of the bounding box of the largest 8-connected part of a mask, and its number of cells."""
    edge = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    lines, firsts = (item.tolist() for item in np.nonzero(edge == 1))
    lasts = (np.nonzero(edge == -1)[1] - 1).tolist()
    runs = list(zip(lines, firsts, lasts, strict=True))
    parents = list(range(len(runs)))

    def root(item: int) -> int:
        while parents[item] != item:
            parents[item] = parents[parents[item]]
            item = parents[item]
        return item

    above = 0  # the first run that can still touch the current one
    for item, (line, first, last) in enumerate(runs):
        while runs[above][0] < line - 1 or (runs[above][0] == line - 1 and runs[above][2] < first - 1):
            above += 1
        other = above
        while runs[other][0] == line - 1 and runs[other][1] <= last + 1:
            parents[root(other)] = root(item)
            other += 1
    parts: dict[int, list[tuple[int, int, int]]] = {}
    for item, run in enumerate(runs):
        parts.setdefault(root(item), []).append(run)
    if not parts:
        return None
    largest = max(parts.values(), key=lambda part: sum(last - first + 1 for _, first, last in part))
    size = sum(last - first + 1 for _, first, last in largest)
    left, right = min(run[1] for run in largest), max(run[2] for run in largest)
    return (largest[0][0] + largest[-1][0]) / 2, (left + right) / 2, size


def body_center(volume: Volume) -> tuple[float, float, float]:
    """Where the body is: the middle of its bounding box across, the middle of the scan along the patient.

    In up to 16 slices the largest part over -300 HU is boxed on a 5 mm lattice; the median over slices is
    taken, so that a table or an arm in a few of them doesn't move it. Volumes that aren't in HU, and those
    without a body, are centred on their own middle.

    Returns:
        Patient LPS (x, y, z) in millimetres.
    """
    view, affine = canonical(volume.voxels, volume.affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    middle = (np.asarray(view.shape, dtype=np.float64) - 1) / 2
    if volume.units == "HU":
        step_y, step_x = (max(1, round(CELL_MM / float(item))) for item in spacing[1:])
        chosen = np.unique(np.linspace(0, view.shape[0] - 1, min(16, view.shape[0])).round().astype(int))
        found = [_largest_box(view[z, ::step_y, ::step_x] > BODY_HU) for z in chosen.tolist()]
        boxes = [(y * step_y, x * step_x) for y, x, size in filter(None, found) if size >= 25]
        if boxes:
            middle[1:] = np.median(np.asarray(boxes), axis=0)
    x, y, z = affine[:3, :3] @ middle + affine[:3, 3]
    return float(x), float(y), float(z)


def _to_source(affine: Float[np.ndarray, "4 4"], target: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """Index on the target grid to index on the source grid."""
    matrix: Float[np.ndarray, "4 4"] = np.linalg.solve(affine, target)
    return matrix


def _is_straight(matrix: Float[np.ndarray, "4 4"], shape: tuple[int, int, int]) -> bool:
    """True where leaving out the off-diagonal terms moves no voxel of the grid by more than `STRAIGHT`."""
    diagonal = np.diag(matrix)[:3]
    shift = np.abs(matrix[:3, :3] - np.diag(diagonal)) @ (np.asarray(shape, dtype=np.float64) / 2)
    return bool((shift <= STRAIGHT * np.maximum(diagonal, 1e-6)).all())


def _straighten(matrix: Float[np.ndarray, "4 4"], shape: tuple[int, int, int]) -> list[tuple[float, float]]:
    """(start, step) an axis, exact in the middle of the grid."""
    middle = (np.asarray(shape, dtype=np.float64) - 1) / 2
    at_middle = matrix[:3, :3] @ middle + matrix[:3, 3]
    return [(float(at_middle[i] - matrix[i, i] * middle[i]), float(matrix[i, i])) for i in range(3)]


def _oblique(
    view: Float[np.ndarray, "A B C"], matrix: Float[np.ndarray, "4 4"], grid: Grid, fill: float
) -> Float[torch.Tensor, "Z Y X"]:
    """Trilinear along turned axes; the source is first averaged to cells about as large as the output's."""
    shape = view.shape
    steps = [max(1.0, float(item)) for item in np.abs(np.diag(matrix)[:3])]
    counts = [max(1, int(np.ceil(num / step))) if step > 1.2 else num for num, step in zip(shape, steps, strict=True)]
    ratios = [num / count for num, count in zip(shape, counts, strict=True)]
    weights = [
        _weights(num, count, (ratio - 1) / 2, ratio) for num, count, ratio in zip(shape, counts, ratios, strict=True)
    ]
    coarse = _separable(view, weights, fill)
    # grid_sample's -1 and 1 are the outer faces of the volume (align_corners=False), whatever its cells.
    scale = torch.tensor([2.0 / num for num in shape], dtype=torch.float64)
    turn = torch.from_numpy(np.ascontiguousarray(matrix)) * torch.cat([scale, scale.new_ones(1)])[:, None]
    turn[:3, 3] += scale / 2 - 1
    z, y, x = (torch.arange(num, dtype=torch.float32) for num in grid.shape)
    turn = turn[[2, 1, 0]].float()  # grid_sample wants x, y, z
    place = (
        z[:, None, None, None] * turn[:, 0] + y[None, :, None, None] * turn[:, 1] + x[None, None, :, None] * turn[:, 2]
    ) + turn[:, 3]
    sampled = functional.grid_sample(coarse[None, None], place[None], padding_mode="border", align_corners=False)[0, 0]
    return sampled * (place.abs().amax(dim=-1) <= 1.0)


def resample(volume: Volume, grid: Grid, *, center_mm: tuple[float, float, float] | None = None) -> Volume:
    """The volume on a canonical grid: trilinear, area-averaged where the grid is coarser, air outside.

    Args:
        volume: In any orientation.
        grid: Number of voxels and spacing.
        center_mm: Patient LPS point that the middle of the grid lies on; the body's centre by default.

    Returns:
        Float32 voxels whose affine records where the grid lies; without SOPInstanceUIDs.
    """
    center = body_center(volume) if center_mm is None else center_mm
    view, affine = canonical(volume.voxels, volume.affine)
    target = grid_affine(grid, center)
    matrix = _to_source(affine, target)
    fill = AIR_HU if volume.units == "HU" else float(volume.voxels.min())
    if _is_straight(matrix, grid.shape):
        axes = zip(view.shape, grid.shape, _straighten(matrix, grid.shape), strict=True)
        result = _separable(view, [_weights(num, out, start, step) for num, out, (start, step) in axes], fill)
    else:
        result = _oblique(view, matrix, grid, fill)
    return Volume(result.add_(fill).numpy(), target, volume.units)


def resample_bits(
    bits: Integer[np.ndarray, "A B C"],
    affine: Float[np.ndarray, "4 4"],
    grid: Grid,
    *,
    center_mm: tuple[float, float, float],
) -> Integer[np.ndarray, "Z Y X"]:
    """Integer bit fields on a canonical grid: the nearest source voxel, 0 outside.

    Args:
        bits: Masks, one a bit.
        affine: Of `bits`, as in `Volume`.
        grid: Number of voxels and spacing.
        center_mm: As passed to `resample` for the volume these masks belong to.
    """
    view, turned = canonical(bits, affine)
    matrix = _to_source(turned, grid_affine(grid, center_mm))
    if _is_straight(matrix, grid.shape):
        kept, taken = [], []
        for num, out, (start, step) in zip(view.shape, grid.shape, _straighten(matrix, grid.shape), strict=True):
            nearest = np.floor(start + step * np.arange(out) + 0.5).astype(np.int64)
            kept.append((nearest >= 0) & (nearest < num))
            taken.append(nearest.clip(0, num - 1))
        result = view[np.ix_(*taken)]
        for axis, keep in enumerate(kept):
            result[(slice(None),) * axis + (~keep,)] = 0
        return result
    index = np.indices(grid.shape, dtype=np.float32).reshape(3, -1)
    place = np.floor(matrix[:3, :3].astype(np.float32) @ index + matrix[:3, 3:].astype(np.float32) + 0.5).astype(
        np.int64
    )
    limits = np.asarray(view.shape)[:, None]
    inside = ((place >= 0) & (place < limits)).all(axis=0)
    z, y, x = place.clip(0, limits - 1)
    oblique: Integer[np.ndarray, "Z Y X"] = np.where(inside, view[z, y, x], 0).astype(bits.dtype).reshape(grid.shape)
    return oblique


# ------------------------------------------------------------------------------------------------ images


def _fit(shape: tuple[int, int], size: int) -> tuple[float, float, float]:
    """(step, start_y, start_x): output pixel i has its centre at source pixel `start + i * step`."""
    step = max(shape) / size
    return step, (shape[0] - 1 - step * (size - 1)) / 2, (shape[1] - 1 - step * (size - 1)) / 2


def fit_image(image: Image, size: int = IMAGE_GRID) -> Float[np.ndarray, "S S"]:
    """The radiograph padded to a square, area-averaged to `size` pixels, 0 (black) to 1 (white: dense).

    The window is the 0.5 to 99.5 percentile of its own pixels; the padding is black.
    """
    thin = max(1, int(np.sqrt(image.pixels.size / 250_000)))
    low, high = np.percentile(image.pixels[::thin, ::thin], (0.5, 99.5)).tolist()
    height, width = image.pixels.shape
    step, start_y, start_x = _fit((height, width), size)
    pixels = torch.from_numpy(np.ascontiguousarray(image.pixels, dtype=np.float32))
    window = ((pixels - low) / max(high - low, 1e-6)).clamp_(0.0, 1.0)
    along_y = torch.from_numpy(_weights(height, size, start_y, step))
    along_x = torch.from_numpy(_weights(width, size, start_x, step))
    fitted: Float[np.ndarray, "S S"] = (along_y @ (window @ along_x.T)).clamp_(0.0, 1.0).numpy()
    return fitted


def fit_colours(pixels: Float[np.ndarray, "3 Y X"], size: int = IMAGE_GRID) -> Float[np.ndarray, "3 S S"]:
    """A photograph (0 to 255) padded to a square as `fit_image` does it, 0 to 1; its contrast stays."""
    height, width = pixels.shape[1:]
    step, start_y, start_x = _fit((height, width), size)
    along_y = torch.from_numpy(_weights(height, size, start_y, step))
    along_x = torch.from_numpy(_weights(width, size, start_x, step))
    scaled = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32)) / 255
    fitted: Float[np.ndarray, "3 S S"] = (along_y @ (scaled @ along_x.T)).clamp_(0.0, 1.0).numpy()
    return fitted


def fit_bits(bits: Integer[np.ndarray, "Y X"], size: int = IMAGE_GRID) -> Integer[np.ndarray, "S S"]:
    """Masks of a radiograph on the grid of `fit_image`: the nearest pixel, 0 in the padding."""
    height, width = bits.shape
    step, start_y, start_x = _fit((height, width), size)
    y = np.floor(start_y + step * np.arange(size) + 0.5).astype(np.int64)
    x = np.floor(start_x + step * np.arange(size) + 0.5).astype(np.int64)
    result = bits[np.ix_(y.clip(0, height - 1), x.clip(0, width - 1))]
    result[(y < 0) | (y >= height)] = 0
    result[:, (x < 0) | (x >= width)] = 0
    return result


def fit_point(point: tuple[float, float], shape: tuple[int, int], size: int = IMAGE_GRID) -> tuple[float, float]:
    """Where pixel (y, x) of a radiograph of `shape` lies on the grid of `fit_image`."""
    step, start_y, start_x = _fit(shape, size)
    return (point[0] - start_y) / step, (point[1] - start_x) / step


def unfit_point(point: tuple[float, float], shape: tuple[int, int], size: int = IMAGE_GRID) -> tuple[float, float]:
    """Where pixel (y, x) of the fitted grid lies on the radiograph of `shape`; undoes `fit_point`."""
    step, start_y, start_x = _fit(shape, size)
    return start_y + step * point[0], start_x + step * point[1]
