"""From frames to a volume's memory: every plane decoded, rescaled once, and written where it belongs.

Uncompressed little endian pixels need no decoder: positional reads into a small buffer that stays in the cache, and
from there rescaled into place, by two threads (reads and arithmetic both release the GIL). Everything else, and
whatever isn't as the scan found it, goes through `read_planes`, which also says what is wrong.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from jaxtyping import Float
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from mm.dicom.errors import DicomError, PixelError
from mm.dicom.header import pixel_element
from mm.dicom.instance import Frame
from mm.dicom.pixels import check_greyscale, read_planes, rescaled

BUFFER_BYTES: Final = 512 << 10
STORED: Final = {
    (signed, bits): np.dtype(f"<{'i' if signed else 'u'}{bits // 8}")
    for signed in (False, True)
    for bits in (8, 16, 32)
}
POSITIONAL: Final = hasattr(os, "preadv")


def _is_plain(frame: Frame, shape: tuple[int, ...]) -> bool:
    """True where the pixels lie in the file as they lie in memory."""
    instance = frame.instance
    try:
        check_greyscale(instance)
    except PixelError:
        return False
    plain = instance.transfer_syntax_uid in (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
    return POSITIONAL and plain and instance.bits_allocated >= 8 and shape == (instance.rows, instance.columns)


def _read_plane(frame: Frame, out: Float[np.ndarray, "Y X"], buffer: bytearray) -> bool:
    """Rescaled values of one frame straight from its file; False where the file isn't as it was."""
    instance = frame.instance
    row_bytes = instance.columns * instance.bits_allocated // 8
    rows = max(1, len(buffer) // max(1, row_bytes))
    kind = STORED[instance.signed, instance.bits_allocated]
    view = memoryview(buffer if rows * row_bytes <= len(buffer) else bytearray(row_bytes))
    before = 8 if instance.transfer_syntax_uid == ImplicitVRLittleEndian else 12
    head = bytearray(before)
    unused, above = instance.bits_allocated - instance.bits_stored, instance.bits_allocated - 1 - instance.high_bit
    descriptor = os.open(instance.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        position = instance.pixel_offset + before + frame.index * instance.rows * row_bytes
        if frame.index:
            os.preadv(descriptor, [head], instance.pixel_offset)
        for row in range(0, instance.rows, rows):
            part = out[row : row + rows]
            size = len(part) * row_bytes
            if row or frame.index:
                complete = os.preadv(descriptor, [view[:size]], position + row * row_bytes) == size
            else:
                complete = os.preadv(descriptor, [head, view[:size]], instance.pixel_offset) == before + size
            if not complete or (row == 0 and not _starts_pixels(head, frame)):
                return False
            pixels = np.frombuffer(view, kind, part.size).reshape(part.shape)
            if above:
                np.left_shift(pixels, above, out=pixels)
            if unused:  # bits outside BitsStored (old overlays) are shifted out (PS3.5 section 8.1.1)
                np.right_shift(pixels, unused, out=pixels)
            rescaled(frame, pixels, part)
    finally:
        os.close(descriptor)
    return True


def _starts_pixels(head: bytearray, frame: Frame) -> bool:
    element = pixel_element(bytes(head).ljust(12, b"\0"), frame.instance.transfer_syntax_uid)
    return element is not None and element[0] == len(head) and element[1] != 0xFFFFFFFF


def _work(take: Callable[[], tuple[int, Frame]], out: Float[np.ndarray, "Z Y X"]) -> list[int]:
    """Takes frames until none is left (IndexError); returns the indices of those it couldn't read."""
    buffer = bytearray(BUFFER_BYTES)
    left: list[int] = []
    while True:
        try:
            z, frame = take()
        except IndexError:
            return left
        try:
            done = _is_plain(frame, out.shape[1:]) and _read_plane(frame, out[z], buffer)
        except (OSError, DicomError):
            done = False
        if not done:
            left.append(z)


def fill(out: Float[np.ndarray, "Z Y X"], frames: Sequence[Frame]) -> None:
    """Rescaled values of `frames[z]` in `out[z]`.

    Raises:
        DicomError: A frame can't be read; the place names it, counted from 1.
    """
    # From both ends: neighbouring slices share a (huge) page of memory, and where two threads touch one for the first
    # time at once, both clear 2 MiB for it and one of them in vain.
    todo = deque(enumerate(frames))
    with ThreadPoolExecutor(2) as pool:
        left = sorted(z for part in pool.map(_work, (todo.popleft, todo.pop), (out, out)) for z in part)
    if not left:
        return
    decoded = read_planes([frames[z] for z in left])
    for z in left:
        try:
            rescaled(frames[z], next(decoded), out[z])
        except DicomError as error:
            raise type(error)(error.reason, f"slice {z + 1} of {len(frames)}") from None
