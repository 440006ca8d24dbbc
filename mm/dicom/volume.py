"""What reading ends in: a `Volume` in patient space and an `Image` on its own pixel grid."""

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from jaxtyping import Float

from mm.dicom.display import Display
from mm.dicom.errors import GeometryError, KindError, PixelError
from mm.dicom.planes import fill
from mm.dicom.scan import Series

MAX_VOXELS: Final = 1 << 30

Units = Literal["HU", "arbitrary"]


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels with their place in the patient.

    Attributes:
        voxels: Rescaled values; HU for CT.
        affine: Voxel index to patient LPS millimetres: `affine @ [z, y, x, 1] = [L, P, S, 1]`. Column 0
            is the step from one slice to the next (PS3.3 C.7.6.2.1.1, columns in the order of our axes).
        units: "HU" where the rescale type says so, else "arbitrary".
        sop_instance_uids: One for each index of axis 0 as stored, or empty after resampling.
    """

    voxels: Float[np.ndarray, "Z Y X"]
    affine: Float[np.ndarray, "4 4"]
    units: Units
    sop_instance_uids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3 or min(self.voxels.shape) < 1:
            raise ValueError(f"voxels must be [Z Y X] and not empty, got shape {self.voxels.shape}")
        if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all():
            raise ValueError("affine must be a finite 4x4 matrix")
        if abs(np.linalg.det(self.affine[:3, :3])) < 1e-9:
            raise ValueError("affine must be invertible")
        if self.sop_instance_uids and len(self.sop_instance_uids) != self.voxels.shape[0]:
            raise ValueError(f"{len(self.sop_instance_uids)} SOPInstanceUIDs for {self.voxels.shape[0]} slices")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels (z, y, x)."""
        z, y, x = self.voxels.shape
        return z, y, x

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along each axis (z, y, x)."""
        z, y, x = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)

    def to_mm(self, index: tuple[float, float, float]) -> tuple[float, float, float]:
        """Patient LPS (x, y, z) in millimetres of a voxel index (z, y, x)."""
        x, y, z = self.affine[:3, :3] @ np.asarray(index, dtype=np.float64) + self.affine[:3, 3]
        return float(x), float(y), float(z)

    def to_index(self, point_mm: tuple[float, float, float]) -> tuple[float, float, float]:
        """Voxel index (z, y, x), not rounded, of a patient LPS point (x, y, z) in millimetres."""
        offset = np.asarray(point_mm, dtype=np.float64) - self.affine[:3, 3]
        z, y, x = np.linalg.solve(self.affine[:3, :3], offset)
        return float(z), float(y), float(x)


@dataclass(frozen=True, eq=False)
class Image:
    """A radiograph: bright is dense (MONOCHROME1 is inverted), patient's left on the right where it is known.

    Attributes:
        pixels: Rescaled values, not windowed.
        spacing_mm: (row, column) distance at the detector, or None where the header doesn't give it.
        sop_instance_uid: The instance it came from.
        view: ViewPosition ("PA", "AP", "LL", ...) or "".
        laterality: ImageLaterality or Laterality ("L", "R", "U", "B") or "".
        oriented: True where PatientOrientation says which edge is the patient's left. Without it nobody can tell.
        display: How the header would have it shown (see `mm.dicom.image.windowed`), or None where that is unknown.
    """

    pixels: Float[np.ndarray, "Y X"]
    spacing_mm: tuple[float, float] | None
    sop_instance_uid: str
    view: str = ""
    laterality: str = ""
    oriented: bool = False
    display: Display | None = None

    def __post_init__(self) -> None:
        if self.pixels.ndim != 2 or min(self.pixels.shape) < 1:
            raise ValueError(f"pixels must be [Y X] and not empty, got shape {self.pixels.shape}")


def source_slice(volume: Volume, center_mm: tuple[float, float, float]) -> int:
    """The stored slice nearest to a patient point.

    Args:
        volume: As read, not resampled.
        center_mm: Patient LPS (x, y, z).

    Returns:
        Index into axis 0 and into `sop_instance_uids`, clipped to the volume.
    """
    return int(np.clip(round(volume.to_index(center_mm)[0]), 0, volume.shape[0] - 1))


def read_volume(series: Series) -> Volume:
    """The slices of a series as one volume, rescaled once, in the order of the slice normal.

    Args:
        series: Of kind "volume", as `scan` returns it.

    Returns:
        HU for CT (unless its RescaleType says otherwise), arbitrary units for MR and PET. The axes are those
        of the file; `mm.dicom.resample.resample` turns them.

    Raises:
        DicomError: The series is refused (see `Series.refused`) or one of its slices can't be decoded.
    """
    if series.kind not in ("volume", "localizer", "multiframe"):
        raise KindError("not_a_volume")
    if series.refused is not None:
        family = KindError if series.kind != "volume" or series.refused == "mosaic" else GeometryError
        raise (PixelError if series.refused == "unsupported_pixels" else family)(series.refused, series.place)
    assert series.affine is not None
    instances = series.instances
    if len(instances) * series.rows * series.columns > MAX_VOXELS:
        raise PixelError("too_many_pixels", "in all slices")
    is_ct = series.modality == "CT"
    voxels = np.empty((len(instances), series.rows, series.columns), dtype=np.float32)
    for index, instance in enumerate(instances):
        if is_ct and (instance.slope is None or instance.intercept is None):
            raise PixelError("missing_rescale", f"slice {index + 1} of {len(instances)}")
    fill(voxels, [item.frame for item in instances])
    in_hu = is_ct and all(item.rescale_type in ("", "HU") for item in instances)
    return Volume(voxels, series.affine, "HU" if in_hu else "arbitrary", tuple(i.sop_instance_uid for i in instances))
