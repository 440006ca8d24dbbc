"""From frames to a volume's memory: every plane decoded, rescaled once, and written where it belongs."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mm.dicom.errors import DicomError
from mm.dicom.instance import Frame
from mm.dicom.pixels import read_pixels, rescaled


def fill(out: Float[np.ndarray, "Z Y X"], frames: Sequence[Frame]) -> None:
    """Rescaled values of `frames[z]` in `out[z]`.

    Raises:
        DicomError: A frame can't be read; the place names it, counted from 1.
    """
    for z, frame in enumerate(frames):
        try:
            rescaled(frame, read_pixels(frame.instance, frame.index), out[z])
        except DicomError as error:
            raise type(error)(error.reason, f"slice {z + 1} of {len(frames)}") from None
