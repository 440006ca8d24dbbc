"""Colour pictures as 8-bit RGB: ultrasound, secondary captures, palettes (PS3.3 C.7.6.3.1.2)."""

from typing import Final

import numpy as np
from jaxtyping import Shaped, UInt8

from mm.dicom.attributes import read_attributes
from mm.dicom.errors import PixelError
from mm.dicom.guard import guarded, open_file
from mm.dicom.instance import NATIVE, Instance
from mm.dicom.lut import PALETTE, palette_of
from mm.dicom.pixels import check_cells, native_bytes, read_samples, reading

RGB: Final = ("RGB", "YBR_ICT", "YBR_RCT")
"""YBR_ICT and YBR_RCT are JPEG 2000's own transforms, which its decoder takes back."""
YBR: Final = ("YBR_FULL", "YBR_FULL_422")


def rgb_of_ybr(samples: UInt8[np.ndarray, "Y X 3"]) -> UInt8[np.ndarray, "Y X 3"]:
    """Full-range YCbCr to RGB, rounded and clipped (PS3.3 C.7.6.3.1.2)."""
    y, blue, red = np.moveaxis(samples.astype(np.float32), 2, 0)
    blue, red = blue - 128, red - 128
    rgb = np.stack([y + 1.402 * red, y - (0.114 * 1.772 * blue + 0.299 * 1.402 * red) / 0.587, y + 1.772 * blue], 2)
    clipped: UInt8[np.ndarray, "Y X 3"] = np.clip(np.rint(rgb), 0, 255).astype(np.uint8)
    return clipped


def _subsampled(instance: Instance, index: int) -> UInt8[np.ndarray, "Y X 3"]:
    """Native YBR_FULL_422: Y Y Cb Cr for two pixels of a row (PS3.3 C.7.6.3.1.2)."""
    if instance.columns % 2 or instance.bits_allocated != 8:
        raise PixelError("unsupported_pixels")
    num_bits = 16 * instance.rows * instance.columns
    with reading(), open_file(instance.path) as file:
        content = native_bytes(instance, file, index * num_bits, num_bits)
    pairs = np.frombuffer(content, np.uint8).reshape(instance.rows, instance.columns // 2, 4)
    samples = np.empty((instance.rows, instance.columns, 3), np.uint8)
    samples[:, 0::2, 0], samples[:, 1::2, 0] = pairs[..., 0], pairs[..., 1]
    samples[..., 1:] = np.repeat(pairs[..., 2:], 2, axis=1)
    return samples


def _bytes(samples: Shaped[np.ndarray, "Y X 3"], instance: Instance) -> UInt8[np.ndarray, "Y X 3"]:
    """The eight highest of the stored bits."""
    shift = instance.bits_stored - 8
    return (samples >> shift if shift >= 0 else samples << -shift).astype(np.uint8)


def read_colour(instance: Instance, index: int = 0) -> UInt8[np.ndarray, "Y X 3"]:
    """One frame of a colour instance as RGB.

    What the samples are is told by PhotometricInterpretation alone, as the standard has it; markers that a JPEG may
    hold besides (JFIF, Adobe) aren't asked.

    Args:
        instance: The file.
        index: Which frame of it, from 0.

    Raises:
        PixelError: `unsupported_pixels` where it isn't colour, and whatever `read_samples` raises.
        FileError: See `read_samples`.
        ValueError: `index` is out of range.
    """
    check_cells(instance)
    if instance.photometric == "PALETTE COLOR" and instance.samples == 1:
        data = read_attributes(instance, PALETTE)
        with guarded():
            red, green, blue = palette_of(data)
        stored = read_samples(instance, index)
        return np.stack([red(stored), green(stored), blue(stored)], axis=2)
    if instance.samples != 3 or instance.photometric not in (*RGB, *YBR) or instance.signed:
        raise PixelError("unsupported_pixels")
    is_native = instance.transfer_syntax_uid in NATIVE
    if is_native and instance.photometric == "YBR_FULL_422":
        if not 0 <= index < instance.num_frames:
            raise ValueError(f"index must be in 0..{instance.num_frames - 1}, got {index}")
        return rgb_of_ybr(_subsampled(instance, index))
    by_plane = is_native and read_attributes(instance, ("PlanarConfiguration",)).get("PlanarConfiguration") == 1
    samples = _bytes(read_samples(instance, index, by_plane=by_plane), instance)
    return rgb_of_ybr(samples) if instance.photometric in YBR else np.ascontiguousarray(samples)
