"""Reading a radiograph (CR, DX): bright is dense, the patient's left on the right."""

import numpy as np
from jaxtyping import Float

from mm.dicom.errors import KindError
from mm.dicom.instance import Instance
from mm.dicom.pixels import read_pixels, rescaled, stored_range
from mm.dicom.scan import Series
from mm.dicom.volume import Image

__all__ = ["Image", "read_image"]


def _upright(
    pixels: Float[np.ndarray, "Y X"], spacing: tuple[float, float] | None, orientation: tuple[str, ...]
) -> tuple[Float[np.ndarray, "A B"], tuple[float, float] | None]:
    """Turns by PatientOrientation (PS3.3 C.7.6.1.1.1): rows run to the patient's left, columns to the feet.

    Where the element is missing, or for a lateral view, pixels stay as stored: left to right as displayed.
    """
    if len(orientation) != 2:
        return pixels, spacing
    along_row, along_column = orientation[0][:1], orientation[1][:1]
    if along_row in "HF" and along_row:
        pixels, along_row, along_column = pixels.T, along_column, along_row
        spacing = None if spacing is None else (spacing[1], spacing[0])
    if along_row == "R":
        pixels = pixels[:, ::-1]
    if along_column == "H":
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels), spacing


def _is_frontal(orientation: tuple[str, ...]) -> bool:
    """True where one axis runs from side to side and the other along the body."""
    axes = {name for name in ("LR", "FH") for item in orientation if item[:1] and item[0] in name}
    return len(orientation) == 2 and axes == {"LR", "FH"}


def _spacing(instance: Instance) -> tuple[float, float] | None:
    if instance.spacing is None or not all(np.isfinite(value) and value > 0 for value in instance.spacing):
        return None
    return instance.spacing[0], instance.spacing[1]


def read_image(series: Series, index: int = 0) -> Image:
    """One radiograph of a series.

    Args:
        series: Of kind "image".
        index: Which instance, in the order of SOPInstanceUID.

    Returns:
        Rescaled pixels; those of MONOCHROME1 are mirrored in their own range, so that bright is dense.

    Raises:
        DicomError: It isn't a radiograph, or its pixels can't be read.
        ValueError: `index` is out of range.
    """
    if series.kind != "image":
        raise KindError("not_an_image")
    if not 0 <= index < series.num_slices:
        raise ValueError(f"index must be in 0..{series.num_slices - 1}, got {index}")
    instance = series.instances[index]
    stored = read_pixels(instance)
    pixels = np.empty(stored.shape, dtype=np.float32)
    rescaled(instance.frame, stored, pixels)
    if instance.photometric == "MONOCHROME1":
        ends = np.empty((1, 2), dtype=np.float32)
        rescaled(instance.frame, np.asarray([stored_range(instance)]), ends)
        np.subtract(ends.sum(), pixels, out=pixels)
    pixels, spacing = _upright(pixels, _spacing(instance), instance.patient_orientation)
    oriented = _is_frontal(instance.patient_orientation)
    return Image(pixels, spacing, instance.sop_instance_uid, instance.view, instance.laterality, oriented)
