"""Key images as inline SVG: the picture once as PNG, on it ring, scale bar and patient directions."""

import base64
import io
import math
from typing import Final

import numpy as np
from jaxtyping import UInt8
from PIL import Image as Picture

from mm.report.schema import KeyImage

MARK: Final = "#ffd43b"
HALO: Final = "rgba(0,0,0,.55)"
SHADE: Final = "rgba(0,0,0,.8)"
DETAIL_RADII: Final = 2.2
SMALLEST_DETAIL: Final = 24.0
"""Half the side of the detail, in ring radii and at least in pixels."""


def png(pixels: UInt8[np.ndarray, "Y X"]) -> bytes:
    """The pixels as a grey PNG; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    Picture.fromarray(pixels).save(buffer, format="PNG", optimize=False, compress_level=9)
    return buffer.getvalue()


def data_url(pixels: UInt8[np.ndarray, "Y X"]) -> str:
    """The pixels as a `data:` address, so that the page stays one file."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def overview(image: KeyImage, picture: str, *, title: str) -> str:
    """The whole slice or radiograph as a square SVG.

    Args:
        image: What is shown.
        picture: SVG that draws the pixels at their own size: an `<image>`, or a `<use>` of one drawn before.
        title: Read out by a screen reader.
    """
    height, width = image.pixels.shape
    side = float(max(height, width))
    left, top = (width - side) / 2, (height - side) / 2
    return _svg(image, picture, (left, top, side), title, edges=True)


def detail(image: KeyImage, picture: str, *, title: str) -> str:
    """The surroundings of the ring, enlarged, as a square SVG; empty where the ring fills the picture anyway."""
    if image.center is None:
        return ""
    half = max(DETAIL_RADII * image.radius, SMALLEST_DETAIL)
    if 2 * half > 0.8 * max(image.pixels.shape):
        return ""
    height, width = image.pixels.shape
    row, column = (min(max(at, half), num - half) for at, num in zip(image.center, (height, width), strict=True))
    return _svg(image, picture, (column - half, row - half, 2 * half), title, edges=False)


def picture_of(image: KeyImage, identifier: str) -> str:
    """The SVG that holds the pixels; other pictures refer to it by `<use>`."""
    height, width = image.pixels.shape
    return f'<image id="{identifier}" width="{width}" height="{height}" href="{data_url(image.pixels)}"/>'


def _svg(image: KeyImage, picture: str, view: tuple[float, float, float], title: str, *, edges: bool) -> str:
    left, top, side = view
    unit = side / 100  # drawings are sized by the view, not by the pixels
    parts = [f"<title>{title}</title>", f'<rect x="{left:.2f}" y="{top:.2f}" width="{side:.2f}" height="{side:.2f}"/>']
    parts.append(picture)
    if image.center is not None:
        row, column = image.center
        ring = f'cx="{column + 0.5:.2f}" cy="{row + 0.5:.2f}" r="{image.radius:.2f}" fill="none"'
        parts.append(f'<circle {ring} stroke="{HALO}" stroke-width="{1.6 * unit:.3f}"/>')
        parts.append(f'<circle class="ring" {ring} stroke="{MARK}" stroke-width="{0.7 * unit:.3f}"/>')
    if edges:
        places = ((2, 51.5, "start"), (98, 51.5, "end"), (50, 5.5, "middle"), (50, 97.5, "middle"))
        for word, (x, y, anchor) in zip(image.edges, places, strict=True):
            if word:
                parts.append(_text(word, left + x * unit, top + y * unit, 4.2 * unit, anchor))
    if image.mm_per_pixel is not None:
        parts.append(_scale(left, top, side, image.mm_per_pixel))
    return (
        f'<svg viewBox="{left:.2f} {top:.2f} {side:.2f} {side:.2f}" role="img" preserveAspectRatio="xMidYMid meet">'
        + "".join(parts)
        + "</svg>"
    )


def _scale(left: float, top: float, side: float, mm_per_pixel: float) -> str:
    """A bar of a round length near a fifth of the view, at the lower left."""
    wanted = side * mm_per_pixel / 5
    power = 10 ** math.floor(math.log10(wanted))
    length = max(step * power for step in (1, 2, 5) if step * power <= wanted)
    unit, bar = side / 100, length / mm_per_pixel
    x, y = left + 3 * unit, top + 95.5 * unit
    path = f"M{x:.2f} {y - 1.2 * unit:.2f}V{y:.2f}H{x + bar:.2f}V{y - 1.2 * unit:.2f}"
    return (
        f'<path d="{path}" fill="none" stroke="{HALO}" stroke-width="{1.4 * unit:.3f}"/>'
        f'<path d="{path}" fill="none" stroke="#fff" stroke-width="{0.6 * unit:.3f}"/>'
        + _text(f"{length:g} mm", x + bar + 1.5 * unit, y, 3.4 * unit, "start")
    )


def _text(text: str, x: float, y: float, height: float, anchor: str) -> str:
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" font-size="{height:.2f}" text-anchor="{anchor}" fill="#fff" '
        f'stroke="{SHADE}" stroke-width="{height / 4:.2f}" stroke-linejoin="round" paint-order="stroke">{text}</text>'
    )
