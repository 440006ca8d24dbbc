"""Reading pictures: radiographs (CR, DX, MG), bright is dense and the patient's left on the right; and any other."""

from typing import Final

import numpy as np
from jaxtyping import Float, UInt8
from pydicom.dataset import Dataset

from mm.dicom.attributes import read_attributes
from mm.dicom.colour import read_colour
from mm.dicom.display import DISPLAY, display_of
from mm.dicom.errors import KindError, PixelError
from mm.dicom.guard import guarded
from mm.dicom.instance import Instance
from mm.dicom.pixels import read_pixels, rescaled, stored_range
from mm.dicom.scan import Series
from mm.dicom.volume import Image

__all__ = ["Image", "read_image", "read_picture", "windowed"]

VIEWS: Final = {
    "399260004": "ML",
    "399368009": "MLO",
    "399352003": "LM",
    "399099002": "LMO",
    "399162004": "CC",
    "399196006": "FB",
    "399188001": "SIO",
    "399192008": "XCCL",
    "399101009": "XCCM",
    "441555000": "ISO",
    "R-10224": "ML",
    "R-10226": "MLO",
    "R-10228": "LM",
    "R-10230": "LMO",
    "R-10242": "CC",
    "R-10244": "FB",
    "R-102D0": "SIO",
    "R-40AAA": "ISO",
    "R-1024A": "XCCL",
    "R-1024B": "XCCM",
}
"""ViewCodeSequence of mammograms by SNOMED CT and older code, as ViewPosition names them (PS3.16 CID 4014)."""


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
    return _image(series.instances[index], 0)


def _view(instance: Instance, data: Dataset) -> str:
    """ViewPosition, or what ViewCodeSequence says (the only one a mammogram must have, PS3.3 C.8.11.7)."""
    with guarded():
        codes = [str(item.get("CodeValue") or "") for item in data.get("ViewCodeSequence") or ()]
    return instance.view or next((VIEWS[code] for code in codes if code in VIEWS), "")


def _image(instance: Instance, index: int) -> Image:
    stored = read_pixels(instance, index)
    pixels = np.empty(stored.shape, dtype=np.float32)
    rescaled(instance.frame, stored, pixels)
    mirror = None
    if instance.photometric == "MONOCHROME1":
        ends = np.empty((1, 2), dtype=np.float32)
        rescaled(instance.frame, np.asarray([stored_range(instance)]), ends)
        mirror = float(ends.sum())
        np.subtract(np.float32(mirror), pixels, out=pixels)
    data = read_attributes(instance, (*DISPLAY, "ViewCodeSequence"))
    try:
        display = display_of(data, instance.photometric, mirror)
    except PixelError:
        display = None
    pixels, spacing = _upright(pixels, _spacing(instance), instance.patient_orientation)
    oriented = _is_frontal(instance.patient_orientation)
    view = _view(instance, data)
    return Image(pixels, spacing, instance.sop_instance_uid, view, instance.laterality, oriented, display)


def windowed(image: Image, view: int = 0) -> Float[np.ndarray, "Y X"]:
    """What a screen shows of a picture, 0 black to 1 white, by the Modality LUT and VOI LUT or window of its header.

    Args:
        image: As `read_image` or `read_picture` gave it.
        view: Which of the windows of the header, and behind these of its VOI LUTs. Where it has none, the whole range.

    Raises:
        PixelError: `invalid_lut`: its Modality LUT is broken.
        ValueError: `view` is out of range.
    """
    if image.display is None:
        raise PixelError("invalid_lut")
    return image.display.show(image.pixels, view)


def read_picture(instance: Instance, index: int = 0) -> Image | UInt8[np.ndarray, "Y X 3"]:
    """One frame of any picture: ultrasound, secondary capture, mammogram, angiogram or radiograph.

    Args:
        instance: The file, of whatever kind.
        index: Which frame of it, from 0.

    Returns:
        An `Image` of greyscale, turned as `read_image` turns it, or RGB, as stored.

    Raises:
        DicomError: Its pixels can't be read.
        ValueError: `index` is out of range.
    """
    if instance.photometric in ("MONOCHROME1", "MONOCHROME2"):
        return _image(instance, index)
    return read_colour(instance, index)
