"""What reading ends in: a `Volume` in patient space and an `Image` on its own pixel grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from jaxtyping import Float

from mm.dicom.display import Display
from mm.dicom.errors import DicomError, FileError, GeometryError, KindError, PixelError, Reason
from mm.dicom.geometry import stack
from mm.dicom.instance import Frame
from mm.dicom.planes import fill
from mm.dicom.scan import Series
from mm.dicom.tilt import straightened

MAX_VOXELS: Final = 1 << 30

FAMILIES: Final[dict[Reason, type[DicomError]]] = {
    "mosaic": KindError,
    "unsupported_pixels": PixelError,
    "functional_groups": FileError,
    "damaged": FileError,
    "unreadable": FileError,
}
AIR_HU: Final = -1024.0

Units = Literal["HU", "arbitrary"]
Tilt = Literal["refuse", "resample"]


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels with their place in the patient.

    Attributes:
        voxels: Rescaled values; HU for CT.
        affine: Voxel index to patient LPS millimetres: `affine @ [z, y, x, 1] = [L, P, S, 1]`. Column 0
            is the step from one slice to the next (PS3.3 C.7.6.2.1.1, columns in the order of our axes).
        units: "HU" where the rescale type says so, else "arbitrary".
        sop_instance_uids: One for each index of axis 0 as stored, or empty after resampling. Those of a multi-frame
            object repeat.
        frame_numbers: For each slice which frame of its instance it is, from 1; empty where no instance has frames.
        padding: Lowest and highest value of voxels that hold no data (PixelPaddingValue), rescaled as they are, where
            all slices agree on them. The voxels themselves keep what is stored.
    """

    voxels: Float[np.ndarray, "Z Y X"]
    affine: Float[np.ndarray, "4 4"]
    units: Units
    sop_instance_uids: tuple[str, ...] = ()
    frame_numbers: tuple[int, ...] = ()
    padding: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3 or min(self.voxels.shape) < 1:
            raise ValueError(f"voxels must be [Z Y X] and not empty, got shape {self.voxels.shape}")
        if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all():
            raise ValueError("affine must be a finite 4x4 matrix")
        if abs(np.linalg.det(self.affine[:3, :3])) < 1e-9:
            raise ValueError("affine must be invertible")
        if self.sop_instance_uids and len(self.sop_instance_uids) != self.voxels.shape[0]:
            raise ValueError(f"{len(self.sop_instance_uids)} SOPInstanceUIDs for {self.voxels.shape[0]} slices")
        if self.frame_numbers and len(self.frame_numbers) != self.voxels.shape[0]:
            raise ValueError(f"{len(self.frame_numbers)} frame numbers for {self.voxels.shape[0]} slices")

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


def _padding(frames: Sequence[Frame]) -> tuple[float, float] | None:
    """Rescaled padding, if it is one for all slices."""
    found = {(item.instance.padding, item.slope or 1.0, item.intercept or 0.0) for item in frames}
    ends = {tuple(sorted(slope * end + intercept for end in stored or ())) for stored, slope, intercept in found}
    if len(ends) != 1 or None in {stored for stored, *_ in found}:
        return None
    ((low, high),) = ends
    return low, high


def _check_readable(series: Series, *, tilt: Tilt) -> None:
    """Raises what is known of a series without decoding it."""
    if series.kind not in ("volume", "localizer", "multiframe"):
        raise KindError("not_a_volume")
    if series.refused is not None and (series.refused != "gantry_tilt" or tilt == "refuse"):
        family = KindError if series.kind != "volume" else FAMILIES.get(series.refused, GeometryError)
        raise family(series.refused, series.place)
    if series.num_slices * series.rows * series.columns > MAX_VOXELS:
        raise PixelError("too_many_pixels", "in all slices")
    for index, frame in enumerate(series.frames):
        if series.modality == "CT" and (frame.slope is None or frame.intercept is None):
            raise PixelError("missing_rescale", f"slice {index + 1} of {series.num_slices}")


def read_volume(series: Series, *, tilt: Tilt = "refuse") -> Volume:
    """The slices of a series as one volume, rescaled once, in the order of the slice normal.

    Args:
        series: Of kind "volume", as `scan` returns it.
        tilt: What becomes of slices that are sheared against their normal (gantry tilt): refused, or resampled to an
            orthogonal grid, linearly and within their planes (`mm.dicom.tilt`). Each slice of it lies in the plane
            of the instance that it names, but its rows and columns aren't those of the instance.

    Returns:
        HU for CT (unless its RescaleType says otherwise), arbitrary units for MR and PET. The axes are those
        of the file; `mm.dicom.resample.resample` turns them. MONOCHROME1 changes nothing: it is about display.

    Raises:
        DicomError: The series is refused (see `Series.refused`) or one of its slices can't be decoded.
    """
    _check_readable(series, tilt=tilt)
    frames, affine = series.frames, series.affine
    voxels = np.empty((len(frames), series.rows, series.columns), dtype=np.float32)
    fill(voxels, frames)
    in_hu = series.modality == "CT" and all(item.rescale_type in ("", "HU") for item in frames)
    padding = _padding(frames)
    if affine is None:
        outside = AIR_HU if in_hu else float(voxels.min()) if padding is None else padding[0]
        voxels, affine = straightened(voxels, stack(frames).affine, outside=outside)
    has_frames = any(item.instance.num_frames > 1 for item in frames)
    return Volume(
        voxels,
        affine,
        "HU" if in_hu else "arbitrary",
        tuple(item.instance.sop_instance_uid for item in frames),
        tuple(item.index + 1 for item in frames) if has_frames else (),
        padding,
    )
