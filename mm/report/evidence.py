"""Key images: for each positive finding the slice or radiograph that shows it, windowed, turned and marked."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float, Int16, UInt8
from PIL import Image as Picture

from mm.dicom.volume import Image, Volume
from mm.report.schema import KeyImage, Size


@dataclass(frozen=True)
class Window:
    """A display window in HU, as radiology workstations name them."""

    name: str
    center: int
    width: int


LUNG: Final = Window("lung", -600, 1500)
SOFT: Final = Window("soft tissue", 40, 400)
BONE: Final = Window("bone", 400, 1800)
CALCIUM: Final = Window("mediastinum", 120, 700)
EMPHYSEMA: Final = Window("emphysema", -800, 600)

WINDOWS: Final[dict[str, Window]] = {
    "nodule": LUNG,
    "consolidation": LUNG,
    "atelectasis": LUNG,
    "effusion": SOFT,
    "pneumothorax": LUNG,
    "cardiomegaly": SOFT,
    "emphysema": EMPHYSEMA,
    "rib_fracture": BONE,
    "calcification": CALCIUM,
    "infection": LUNG,
}
REACH_MM: Final[dict[str, float]] = {
    "effusion": 45.0,
    "pneumothorax": 40.0,
    "cardiomegaly": 75.0,
    "emphysema": 40.0,
    "rib_fracture": 12.0,
    "calcification": 14.0,
}
"""Radius of the ring where the finding's measure isn't its extent in the picture."""

LARGEST_PIXELS: Final = 1024


@dataclass(frozen=True)
class Stack:
    """A volume as stored, in 16 bits: half the memory of a `Volume` while its report is written.

    Attributes:
        voxels: Rounded values.
        affine: As in `Volume`.
        sop_instance_uids: One a slice.
        units: As in `Volume`.
        frame_numbers: As in `Volume`.
    """

    voxels: Int16[np.ndarray, "Z Y X"]
    affine: Float[np.ndarray, "4 4"]
    sop_instance_uids: tuple[str, ...]
    units: str
    frame_numbers: tuple[int, ...] = ()

    @classmethod
    def of(cls, volume: Volume) -> "Stack":
        """Keeps a volume's slices for looking at."""
        voxels = np.empty(volume.shape, dtype=np.int16)
        for index, plane in enumerate(volume.voxels):  # slice by slice: no second float copy of the volume
            voxels[index] = np.clip(np.rint(plane), -32768, 32767)
        return cls(voxels, volume.affine, volume.sop_instance_uids, volume.units, volume.frame_numbers)

    def to_index(self, point_mm: tuple[float, float, float]) -> tuple[float, float, float]:
        """Voxel index (z, y, x), not rounded, of a patient LPS point."""
        z, y, x = np.linalg.solve(self.affine[:3, :3], np.asarray(point_mm) - self.affine[:3, 3])
        return float(z), float(y), float(x)

    def slice_of(self, point_mm: tuple[float, float, float]) -> int:
        """The stored slice nearest to a patient point."""
        return int(np.clip(round(self.to_index(point_mm)[0]), 0, self.voxels.shape[0] - 1))


def ring_mm(code: str, size: Size | None) -> float:
    """Radius of the ring around a finding: its own extent and some room, 8 to 75 mm."""
    if code in REACH_MM:
        return REACH_MM[code]
    if size is None:
        return 25.0
    if size.unit == "mm":
        extent = size.value / 2
    elif size.unit == "ml":  # the radius of a ball of that volume
        extent = 10 * (3 * size.value / (4 * np.pi)) ** (1 / 3)
    else:
        extent = 20.0
    return float(np.clip(1.4 * extent + 4, 8.0, 75.0))


def key_slice(
    stack: Stack, *, finding: int, code: str, center_mm: tuple[float, float, float], radius_mm: float
) -> KeyImage:
    """The stored slice through a finding.

    It is turned as it hangs in a reading room: seen from the feet, the patient's right on the left, the
    front at the top; coronal and sagittal acquisitions with the head at the top. Pixels are made square.
    """
    index = stack.slice_of(center_mm)
    _, row, column = stack.to_index(center_mm)
    plane = stack.voxels[index]
    window = WINDOWS.get(code, SOFT)
    level = (window.center, window.width) if stack.units == "HU" else None
    pixels = _windowed(plane, level)
    cosines = stack.affine[:3, 1:3] / np.linalg.norm(stack.affine[:3, 1:3], axis=0)
    spacing = [float(item) for item in np.linalg.norm(stack.affine[:3, 1:3], axis=0)]
    down, across = (int(np.argmax(np.abs(cosines[:, axis]))) for axis in (0, 1))
    if down < across:  # left-right lies across before front-back, and that before head-foot
        pixels, cosines, spacing = pixels.T, cosines[:, ::-1], spacing[::-1]
        down, across, row, column = across, down, column, row
    # Patient axes in LPS point left, back and head; the head belongs at the top, hence the minus.
    if cosines[across, 1] < 0:
        pixels, column = pixels[:, ::-1], pixels.shape[1] - 1 - column
    if (cosines[down, 0] < 0) != (down == 2):
        pixels, row = pixels[::-1], pixels.shape[0] - 1 - row
    fine = min(spacing)
    scale = min(1.0, LARGEST_PIXELS * fine / max(pixels.shape[0] * spacing[0], pixels.shape[1] * spacing[1]))
    factors = (scale * spacing[0] / fine, scale * spacing[1] / fine)
    return KeyImage(
        finding=finding,
        pixels=_scaled(pixels, factors),
        center=((row + 0.5) * factors[0] - 0.5, (column + 0.5) * factors[1] - 0.5),
        radius=radius_mm * scale / fine,
        mm_per_pixel=fine / scale,
        window=window.name if level else "",
        level=level,
        place=(index + 1, stack.voxels.shape[0]),
        edges=("RAF"[across], "LPH"[across], "RAH"[down], "LPF"[down]),
    )


def key_radiograph(image: Image, *, finding: int, pixel: tuple[float, float] | None, radius_mm: float) -> KeyImage:
    """The radiograph with a finding's place; `pixel` is (row, column) on the upright picture, as `read_image` turns it.

    Its edges are named where PatientOrientation tells them.
    """
    low, high = np.percentile(image.pixels, (0.5, 99.5)).tolist()
    pixels = np.clip((image.pixels - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    spacing = image.spacing_mm
    fine = min(spacing) if spacing else 1.0
    stretch = (spacing[0] / fine, spacing[1] / fine) if spacing else (1.0, 1.0)
    scale = min(1.0, LARGEST_PIXELS / max(pixels.shape[0] * stretch[0], pixels.shape[1] * stretch[1]))
    factors = (scale * stretch[0], scale * stretch[1])
    # Without a spacing the ring is told by the picture: a chest film is about 400 mm wide.
    mm_per_pixel = fine / scale if spacing else 400 / (max(pixels.shape) * scale)
    return KeyImage(
        finding=finding,
        pixels=_scaled(pixels, factors),
        center=None if pixel is None else ((pixel[0] + 0.5) * factors[0] - 0.5, (pixel[1] + 0.5) * factors[1] - 0.5),
        radius=radius_mm / mm_per_pixel,
        mm_per_pixel=mm_per_pixel if spacing else None,
        window="",
        level=None,
        place=None,
        edges=("R", "L", "", "") if image.oriented else ("", "", "", ""),
    )


def _windowed(plane: Int16[np.ndarray, "Y X"], level: tuple[int, int] | None) -> UInt8[np.ndarray, "Y X"]:
    values = plane.astype(np.float32)
    if level is None:
        low, high = np.percentile(values, (0.5, 99.5)).tolist()
    else:
        low, high = level[0] - level[1] / 2, level[0] + level[1] / 2
    pixels: UInt8[np.ndarray, "Y X"] = np.clip((values - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    return pixels


def _scaled(pixels: UInt8[np.ndarray, "Y X"], factors: tuple[float, float]) -> UInt8[np.ndarray, "y x"]:
    height, width = (max(1, round(num * factor)) for num, factor in zip(pixels.shape, factors, strict=True))
    if (height, width) == pixels.shape:
        return np.ascontiguousarray(pixels)
    picture = Picture.fromarray(np.ascontiguousarray(pixels))
    way = Picture.Resampling.BOX if height * width < pixels.size else Picture.Resampling.BICUBIC
    return np.asarray(picture.resize((width, height), way))
