"""From rescaled values to what a screen shows: Modality LUT, then VOI LUT or window (PS3.3 C.11.1 and C.11.2)."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from jaxtyping import Float
from pydicom.dataset import Dataset

from mm.dicom.errors import PixelError
from mm.dicom.guard import guarded
from mm.dicom.lut import Lut, lut_of

Function = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]

DISPLAY: Final = (
    "ModalityLUTSequence",
    "PixelRepresentation",
    "PresentationLUTShape",
    "VOILUTFunction",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
)
"""The elements that `display_of` reads."""


@dataclass(frozen=True)
class Window:
    """Center and width in rescaled values, and how they are meant (PS3.3 C.11.2.1)."""

    center: float
    width: float
    function: Function = "LINEAR"

    def __call__(self, values: Float[np.ndarray, "Y X"]) -> Float[np.ndarray, "Y X"]:
        """0 for what is shown darkest, 1 for brightest."""
        if self.function == "SIGMOID":
            with np.errstate(over="ignore"):
                return (1 / (1 + np.exp(-4 * (values - self.center) / self.width))).astype(np.float32)
        if self.function == "LINEAR_EXACT":
            shown = (values - self.center) / self.width + 0.5
        elif self.width == 1:
            shown = (values > self.center - 0.5).astype(np.float32)
        else:
            shown = (values - (self.center - 0.5)) / (self.width - 1) + 0.5
        return np.clip(shown, 0, 1).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Display:
    """How the header would have an image shown.

    Attributes:
        modality: Modality LUT where there is one in the place of a rescale, or None.
        windows: The windows of the header, the default first.
        luts: The VOI LUTs of the header.
        inverted: Low values are bright (MONOCHROME1, or PresentationLUTShape INVERSE, which says the same).
        mirror: What the values and their mirror image add up to, where they were mirrored when read, else None.
    """

    modality: Lut | None = None
    windows: tuple[Window, ...] = ()
    luts: tuple[Lut, ...] = ()
    inverted: bool = False
    mirror: float | None = None

    def show(self, pixels: Float[np.ndarray, "Y X"], view: int = 0) -> Float[np.ndarray, "Y X"]:
        """Brightness from 0 to 1.

        Args:
            pixels: Rescaled values, mirrored where `mirror` says so.
            view: Which of the windows, and behind these of the VOI LUTs. Without any the whole range is shown.

        Raises:
            ValueError: `view` is out of range.
        """
        num_views = max(1, len(self.windows) + len(self.luts))
        if not 0 <= view < num_views:
            raise ValueError(f"view must be in 0..{num_views - 1}, got {view}")
        values = pixels if self.mirror is None else np.float32(self.mirror) - pixels
        if self.modality is not None:
            values = self.modality(values).astype(np.float32)
        if view < len(self.windows):
            shown = self.windows[view](values)
        elif self.luts:
            lut = self.luts[view - len(self.windows)]
            shown = lut(values).astype(np.float32) / np.float32((1 << lut.bits) - 1)
        else:
            low, high = float(values.min()), float(values.max())
            shown = ((values - low) / max(high - low, 1e-12)).astype(np.float32)
        return 1 - shown if self.inverted else shown


def _numbers(data: Dataset, keyword: str) -> list[float]:
    value = data.get(keyword)
    if value is None or value == "":
        return []
    return [float(item) for item in (value if hasattr(value, "__iter__") and not isinstance(value, str) else [value])]


def _windows(data: Dataset) -> tuple[Window, ...]:
    """Pairs of center and width; LINEAR needs a width of 1 or more, the others more than 0. Others are left out."""
    name = str(data.get("VOILUTFunction") or "LINEAR").strip()
    function: Function = next((item for item in get_args(Function) if item == name), "LINEAR")
    pairs = zip(_numbers(data, "WindowCenter"), _numbers(data, "WindowWidth"), strict=False)
    finite = [(center, width) for center, width in pairs if np.isfinite(center) and np.isfinite(width)]
    return tuple(
        Window(center, width, function)
        for center, width in finite
        if (width >= 1 if function == "LINEAR" else width > 0)
    )


def _luts(data: Dataset, keyword: str, *, signed: bool) -> tuple[Lut, ...]:
    big_endian = data.original_encoding[1] is False
    return tuple(
        lut_of(item.get("LUTDescriptor"), item.get("LUTData"), signed=signed, big_endian=big_endian)
        for item in data.get(keyword) or ()
    )


def display_of(data: Dataset, photometric: str, mirror: float | None) -> Display:
    """Takes the elements of `DISPLAY` out of a data set; a table that is broken is left out, for the values need none.

    Raises:
        PixelError: `invalid_lut`, where the Modality LUT is broken: without it windows mean nothing.
        FileError: `damaged`.
    """
    with guarded():
        signed = data.get("PixelRepresentation") == 1
        modality = _luts(data, "ModalityLUTSequence", signed=signed)
        try:
            luts = _luts(data, "VOILUTSequence", signed=signed)
        except PixelError:
            luts = ()
        inverted = photometric == "MONOCHROME1" or str(data.get("PresentationLUTShape") or "").strip() == "INVERSE"
        return Display(modality[0] if modality else None, _windows(data), luts, inverted, mirror)
