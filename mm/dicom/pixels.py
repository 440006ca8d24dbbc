"""The pixels of one instance as stored integers, whatever its transfer syntax."""

import io
import struct
from typing import Final

import numpy as np
from jaxtyping import Float, Shaped
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from mm.dicom.errors import PixelError
from mm.dicom.guard import BoundedFile, guarded, inflate, open_file
from mm.dicom.header import behind_meta, pixel_element
from mm.dicom.instance import Frame, Instance

NATIVE: Final = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)

MAX_COMPONENTS: Final = 4
"""Of a codestream; JPEG 2000 can declare 16384, each decoded to 32 bits."""


def check_greyscale(instance: Instance) -> None:
    """Refuses what isn't greyscale integers.

    Raises:
        PixelError: `unsupported_pixels`.
    """
    grey = instance.samples == 1 and instance.photometric in ("MONOCHROME1", "MONOCHROME2")
    bits = instance.bits_allocated in (8, 16, 32) and 1 <= instance.bits_stored <= instance.bits_allocated
    if not grey or not bits or not instance.bits_stored - 1 <= instance.high_bit < instance.bits_allocated:
        raise PixelError("unsupported_pixels")


def stored_range(instance: Instance) -> tuple[int, int]:
    """Smallest and largest integer that BitsStored and PixelRepresentation allow."""
    half = 1 << (instance.bits_stored - 1)
    return (-half, half - 1) if instance.signed else (0, 2 * half - 1)


def _native(instance: Instance, file: BoundedFile, index: int) -> Shaped[np.ndarray, "Y X"]:
    """Uncompressed pixels; bits outside BitsStored (old overlays) are shifted out (PS3.5 section 8.1.1)."""
    num_pixels = instance.rows * instance.columns
    order = ">" if instance.transfer_syntax_uid == ExplicitVRBigEndian else "<"
    kind = f"{order}{'i' if instance.signed else 'u'}{instance.bits_allocated // 8}"
    stream: BoundedFile | io.BytesIO = file
    if instance.transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
        stream = io.BytesIO(inflate(behind_meta(file), instance.pixel_offset + 12 + instance.num_bytes))
    stream.seek(instance.pixel_offset)
    element = pixel_element(stream.read(12), instance.transfer_syntax_uid)
    if element is None:
        raise PixelError("changed")
    num_bytes = num_pixels * instance.bits_allocated // 8
    stream.seek(instance.pixel_offset + element[0] + index * num_bytes)
    content = stream.read(num_bytes)
    if len(content) * 8 != num_pixels * instance.bits_allocated:
        raise PixelError("truncated", "pixels")
    pixels = np.frombuffer(content, dtype=np.dtype(kind)).reshape(instance.rows, instance.columns)
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if instance.bits_stored < instance.bits_allocated:
        left = instance.bits_allocated - 1 - instance.high_bit
        pixels = (pixels << left) >> (instance.bits_allocated - instance.bits_stored)
    return pixels


def codestream_shape(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 codestream declares, or None if it declares none.

    A decoder allocates by these numbers, not by Rows and Columns.
    """
    if frame[4:8] == b"jP  ":  # a JP2 file where a bare codestream is due; decoders take it
        frame = frame[max(0, frame.find(b"\xff\x4f\xff\x51", 0, 4096)) :]
    if frame[:4] == b"\xff\x4f\xff\x51":  # SOC, SIZ (ISO/IEC 15444-1 annex A.5.1)
        if len(frame) < 42 or struct.unpack(">H", frame[40:42])[0] > MAX_COMPONENTS:
            return None
        width, height, left, top = struct.unpack(">LLLL", frame[8:24])
        return height - top, width - left
    position = 2
    while frame[:2] == b"\xff\xd8" and position + 9 <= len(frame) and frame[position] == 0xFF:
        marker = frame[position + 1]
        if marker == 0xFF:
            position += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):  # SOF (ITU-T T.81 B.2.2)
            height, width = struct.unpack(">HH", frame[position + 5 : position + 9])
            return height, width
        else:
            position += 2 + struct.unpack(">H", frame[position + 2 : position + 4])[0]
    return None


def _compressed(instance: Instance, file: BoundedFile, index: int) -> Shaped[np.ndarray, "Y X"]:
    """One encapsulated frame (PS3.5 section A.4) through pydicom's decoders."""
    try:
        decoder = get_decoder(instance.transfer_syntax_uid)
    except NotImplementedError:
        raise PixelError("unsupported_transfer_syntax") from None
    if not decoder.is_available:
        raise PixelError("missing_decoder")
    file.seek(instance.pixel_offset + 12)
    content = file.read()
    frame = get_frame(content, index, number_of_frames=instance.num_frames)
    if instance.transfer_syntax_uid != RLELossless:
        shape = codestream_shape(frame)
        if shape != (instance.rows, instance.columns):
            raise PixelError("codestream_mismatch")
    data = Dataset()
    data.Rows, data.Columns, data.SamplesPerPixel = instance.rows, instance.columns, 1
    data.PhotometricInterpretation = instance.photometric
    data.BitsAllocated, data.BitsStored, data.HighBit = instance.bits_allocated, instance.bits_stored, instance.high_bit
    data.PixelRepresentation = int(instance.signed)
    data.NumberOfFrames = instance.num_frames
    data.PixelData = content
    data["PixelData"].VR = "OB"
    pixels, _ = decoder.as_array(data, index=index, raw=True)
    if pixels.shape != (instance.rows, instance.columns):
        raise PixelError("codestream_mismatch")
    return np.asarray(pixels)


def read_pixels(instance: Instance, index: int = 0) -> Shaped[np.ndarray, "Y X"]:
    """Stored integers of one frame of a greyscale instance.

    Args:
        instance: The file.
        index: Which frame of it, from 0.

    Raises:
        PixelError: They aren't what we read, or no decoder is installed.
        FileError: The file is damaged or another than the one scanned.
    """
    check_greyscale(instance)
    with guarded(), open_file(instance.path) as file:
        if instance.transfer_syntax_uid in NATIVE:
            return _native(instance, file, index)
        return _compressed(instance, file, index)


def rescaled(frame: Frame, pixels: Shaped[np.ndarray, "Y X"], out: Float[np.ndarray, "Y X"]) -> None:
    """Writes `slope * stored + intercept` into float32 `out`, once (PS3.3 section C.11.1.1.2).

    In float64 where slope or intercept isn't whole, so that the result is right to the last bit of float32.
    """
    slope = 1.0 if frame.slope is None else frame.slope
    intercept = 0.0 if frame.intercept is None else frame.intercept
    if not np.isfinite(slope) or slope == 0 or not np.isfinite(intercept):
        raise PixelError("invalid_rescale")
    if slope == 1 and intercept.is_integer() and frame.instance.bits_stored <= 16 and abs(intercept) < 1 << 20:
        np.add(pixels, np.float32(intercept), out=out, dtype=np.float32, casting="unsafe")
    else:
        out[...] = pixels.astype(np.float64) * slope + intercept
