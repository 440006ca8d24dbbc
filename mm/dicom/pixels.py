"""The pixels of an instance as stored integers, whatever its transfer syntax."""

import io
import math
import os
import struct
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float, Shaped
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    JPEGBaseline8Bit,
)

from mm.dicom.codecs import DECODER, NUM_WORKERS, Job, decode, is_installed
from mm.dicom.codestream import codestream, is_rle
from mm.dicom.errors import FileError, PixelError
from mm.dicom.fragments import Fragments, fragments
from mm.dicom.guard import BoundedFile, inflate, open_file
from mm.dicom.header import MAX_FRAME_PIXELS, behind_meta, pixel_element
from mm.dicom.instance import NATIVE, Frame, Instance

FREE_EXPANSION: Final = 16 << 20
MAX_EXPANSION: Final = 1000
"""No picture of over 16 MiB shrinks to less than a thousandth."""


def check_greyscale(instance: Instance) -> None:
    """Refuses what isn't greyscale integers.

    Raises:
        PixelError: `unsupported_pixels`.
    """
    if instance.samples != 1 or instance.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise PixelError("unsupported_pixels")
    check_cells(instance)


def check_cells(instance: Instance) -> None:
    """Refuses cells that aren't integers of 1, 8, 16 or 32 bits, and frames too large (PS3.5 section 8.1.1).

    Raises:
        PixelError: `unsupported_pixels`.
        FileError: `too_many_pixels` or `missing_element`.
    """
    bits = instance.bits_allocated in (1, 8, 16, 32) and 1 <= instance.bits_stored <= instance.bits_allocated
    if not bits or not instance.bits_stored - 1 <= instance.high_bit < instance.bits_allocated:
        raise PixelError("unsupported_pixels")
    if min(instance.rows, instance.columns, instance.num_frames) < 1:
        raise FileError("missing_element", "Rows or Columns")
    if instance.rows * instance.columns > MAX_FRAME_PIXELS:
        raise FileError("too_many_pixels")


def stored_range(instance: Instance) -> tuple[int, int]:
    """Smallest and largest integer that BitsStored and PixelRepresentation allow."""
    half = 1 << (instance.bits_stored - 1)
    return (-half, half - 1) if instance.signed else (0, 2 * half - 1)


@contextmanager
def reading() -> Iterator[None]:
    """Turns what the system raises into a FileError. Unlike `guarded`, safe in threads; not for pydicom."""
    try:
        yield
    except OSError:
        raise FileError("unreadable") from None
    except (MemoryError, struct.error, zlib.error):
        raise FileError("damaged") from None


def native_bytes(instance: Instance, file: BoundedFile, start_bit: int, num_bits: int) -> bytes:
    """Some bits of an uncompressed Pixel Data element, in whole bytes.

    Raises:
        PixelError: `truncated`, or `changed` since it was scanned.
    """
    first, last = start_bit // 8, -(-(start_bit + num_bits) // 8)
    stream: BoundedFile | io.BytesIO = file
    if instance.transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
        stream = io.BytesIO(inflate(behind_meta(file), instance.pixel_offset + 12 + last))
    stream.seek(instance.pixel_offset)
    head = stream.read(12)
    element = pixel_element(head, instance.transfer_syntax_uid)
    if element is None:
        raise PixelError("changed")
    is_big = instance.transfer_syntax_uid == ExplicitVRBigEndian
    if is_big and head[4:6] == b"OW" and instance.bits_allocated <= 8 and (first % 2 or last % 2):
        pair = native_bytes(instance, file, first // 2 * 16, (-(-last // 2) - first // 2) * 16)
        return pair[first % 2 :][: last - first]
    if element[1] < last:
        raise PixelError("truncated", "pixels")
    stream.seek(instance.pixel_offset + element[0] + first)
    content = stream.read(last - first)
    if len(content) != last - first:
        raise PixelError("truncated", "pixels")
    if is_big and head[4:6] == b"OW" and instance.bits_allocated <= 8:  # two cells a word, the first in its low byte
        return np.frombuffer(content, ">u2").astype("<u2").tobytes()
    return content


def _native(instance: Instance, file: BoundedFile, index: int, by_plane: bool) -> Shaped[np.ndarray, "..."]:
    """Uncompressed cells; those of one bit lie without a gap, the lowest bit first (PS3.5 section 8.1.1)."""
    num_samples = instance.rows * instance.columns * instance.samples
    num_bits = num_samples * instance.bits_allocated
    content = native_bytes(instance, file, index * num_bits, num_bits)
    if instance.bits_allocated == 1:
        bits = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")
        cells = bits[index * num_bits % 8 :][:num_bits]
    else:
        order = ">" if instance.transfer_syntax_uid == ExplicitVRBigEndian else "<"
        cells = np.frombuffer(content, f"{order}u{instance.bits_allocated // 8}")
        cells = cells.astype(cells.dtype.newbyteorder("="), copy=False)
    return _shaped(cells, instance, by_plane)


def _is_simple(instance: Instance) -> bool:
    """Grey JPEG of 8 bits, which Pillow decodes too: a grey level may differ by one, as the standard of JPEG allows."""
    return instance.transfer_syntax_uid == JPEGBaseline8Bit and instance.samples == 1


@lru_cache(maxsize=4)
def _found(path: Path, _changed: tuple[int, int], pixel_offset: int, num_frames: int) -> Fragments:
    """Where the frames of a multi-frame file lie, kept for its next frame."""
    with open_file(path) as file:
        return fragments(file, pixel_offset, num_frames)


def _compressed(instance: Instance, file: BoundedFile, index: int) -> Shaped[np.ndarray, "..."]:
    """One encapsulated frame (PS3.5 annex A.4), checked against the header before it is decoded."""
    decoder = DECODER.get(instance.transfer_syntax_uid)
    if decoder is None:
        raise PixelError("unsupported_transfer_syntax")
    if decoder == "libjpeg" and not is_installed(decoder) and _is_simple(instance):
        decoder = "PIL"
    status = os.fstat(file.fileno())
    found = _found(instance.path, (status.st_mtime_ns, status.st_size), instance.pixel_offset, instance.num_frames)
    frame = found.read(file, index)
    shape = (instance.rows, instance.columns, instance.samples)
    precision, signed = instance.bits_allocated, False
    if decoder == "rle":
        if not is_rle(frame, instance.rows * instance.columns, instance.samples * ((precision + 7) // 8)):
            raise PixelError("codestream_mismatch")
    else:
        declared = codestream(frame)
        if declared is None or (declared.rows, declared.columns, declared.samples) != shape:
            raise PixelError("codestream_mismatch")
        precision, signed = declared.precision, declared.signed
    bits = 8 if precision <= 8 else 16 if precision <= 16 else 32
    if precision > max(instance.bits_allocated, 8):
        raise PixelError("codestream_mismatch")
    job = Job(decoder, *shape, bits)
    if job.num_bytes > max(FREE_EXPANSION, MAX_EXPANSION * len(frame)):
        raise FileError("expansion")
    decoded = decode(job, frame)
    samples = np.frombuffer(decoded.samples, f"<{'i' if signed else 'u'}{bits // 8}")
    return _integers(_shaped(samples, instance, decoded.by_plane), instance, precision)


def _shaped(samples: Shaped[np.ndarray, " N"], instance: Instance, by_plane: bool) -> Shaped[np.ndarray, "..."]:
    """[Y X], or [Y X S] of several samples a pixel, whichever way these lie (PS3.3 C.7.6.3.1.3)."""
    rows, columns, num = instance.rows, instance.columns, instance.samples
    if num == 1:
        return samples.reshape(rows, columns)
    return np.moveaxis(samples.reshape(num, rows, columns), 0, 2) if by_plane else samples.reshape(rows, columns, num)


def _integers(samples: Shaped[np.ndarray, "..."], instance: Instance, precision: int) -> Shaped[np.ndarray, "..."]:
    """Takes the stored bits out of decoded samples and gives them the sign of PixelRepresentation.

    Bits outside BitsStored (old overlays) are shifted out (PS3.5 section 8.1.1). A codestream of fewer bits than the
    cell holds the value alone, at its lowest bits, in two's complement whether or not it knows of signs (PS3.5 section
    8.2); where its precision isn't BitsStored, the lesser of both tells the place of the sign.
    """
    width = max(instance.bits_allocated, 8)
    low, bits = instance.high_bit + 1 - instance.bits_stored, instance.bits_stored
    if precision <= instance.high_bit:
        low, bits = 0, min(precision, bits)
    exact = low == 0 and bits == precision and (samples.dtype.kind == "i") == instance.signed
    kind = np.dtype(f"{'i' if instance.signed else 'u'}{width // 8}")
    pixels = samples.view(kind) if samples.dtype.itemsize == kind.itemsize else samples.astype(kind)
    if exact or (low == 0 and bits == width):
        return pixels
    return (pixels << (width - low - bits)) >> (width - bits)


def read_samples(instance: Instance, index: int, *, by_plane: bool = False) -> Shaped[np.ndarray, "..."]:
    """Stored integers of one frame, [Y X] or [Y X S], in the colour space they are stored in. Safe in threads.

    Args:
        instance: The file.
        index: Which frame of it, from 0.
        by_plane: PlanarConfiguration is 1; where samples are compressed it isn't asked.

    Raises:
        PixelError: They aren't what we read, or no decoder is installed, or it doesn't survive them.
        FileError: The file is damaged or another than the one scanned.
        ValueError: `index` is out of range.
    """
    check_cells(instance)
    if not 0 <= index < instance.num_frames:
        raise ValueError(f"index must be in 0..{instance.num_frames - 1}, got {index}")
    with reading(), open_file(instance.path) as file:
        if instance.transfer_syntax_uid in NATIVE:
            return _integers(_native(instance, file, index, by_plane), instance, instance.bits_allocated)
        return _compressed(instance, file, index)


def read_pixels(instance: Instance, index: int = 0) -> Shaped[np.ndarray, "Y X"]:
    """Stored integers of one frame of a greyscale instance; see `read_samples`."""
    check_greyscale(instance)
    return read_samples(instance, index)


def read_planes(frames: Sequence[Frame]) -> Iterator[Shaped[np.ndarray, "Y X"]]:
    """Stored integers of greyscale frames, in order; compressed ones are decoded by all workers at once.

    At most two frames a worker are read ahead. Where a frame raises, the iterator ends there.

    Raises:
        DicomError: See `read_samples`.
    """
    if len(frames) < 2 or all(frame.instance.transfer_syntax_uid in NATIVE for frame in frames):
        yield from (read_pixels(frame.instance, frame.index) for frame in frames)
        return
    executor = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="mm-decode")
    ahead: deque[Future[Shaped[np.ndarray, "Y X"]]] = deque()
    try:
        for frame in frames:
            if len(ahead) == 2 * NUM_WORKERS:
                yield ahead.popleft().result()
            ahead.append(executor.submit(read_pixels, frame.instance, frame.index))
        while ahead:
            yield ahead.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def rescaled(frame: Frame, pixels: Shaped[np.ndarray, "Y X"], out: Float[np.ndarray, "Y X"]) -> None:
    """Writes `slope * stored + intercept` into float32 `out`, once (PS3.3 section C.11.1.1.2).

    In float64 where slope or intercept isn't whole, so that the result is right to the last bit of float32.
    """
    slope = 1.0 if frame.slope is None else frame.slope
    intercept = 0.0 if frame.intercept is None else frame.intercept
    if not math.isfinite(slope) or slope == 0 or not math.isfinite(intercept):
        raise PixelError("invalid_rescale")
    if slope == 1 and intercept.is_integer() and frame.instance.bits_stored <= 16 and abs(intercept) < 1 << 20:
        np.add(pixels, np.float32(intercept), out=out, dtype=np.float32, casting="unsafe")
    else:
        out[...] = pixels.astype(np.float64) * slope + intercept
