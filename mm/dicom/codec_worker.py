"""The child process that runs decoders: codestreams in by stdin, pixels out by stdout, limited in memory and time.

Run as a script by `mm.dicom.codecs`. It imports a decoder when the first frame for it comes, and nothing of ours, so
that it starts quickly. It is sent a codestream and numbers only, ends when its stdin does (the parent has gone), and
may die at any frame: the parent then starts another.
"""

import contextlib
import importlib
import io
import os
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

REQUEST: Final = struct.Struct("<BQBdQQ")
"""Decoder, pixels, bits a sample, seconds of processor time, bytes of memory, bytes of codestream (follows).

An empty codestream asks only that the decoder is loaded.
"""
REPLY: Final = struct.Struct("<BBQ")
"""Status, layout, bytes of pixels (follow)."""

DONE, FAILED, MISSING = range(3)
BY_PIXEL, BY_PLANE = range(2)
DECODERS: Final = ("jpeg_ls", "libjpeg", "openjpeg", "rle", "PIL")
"""By import name; a request holds the place in this tuple."""

BROKEN: Final = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError)
"""What decoders raise on broken input, besides ValueError."""

Pixels = tuple[int, "bytes | bytearray | memoryview"]


def _jpeg_ls(codestream: bytes, _num_pixels: int, _bits: int) -> Pixels:
    decoder = importlib.import_module("jpeg_ls")
    pixels, info = decoder.decode_pixel_data(codestream)
    by_plane = info["components"] > 1 and info["interleave_mode"] == 0
    return BY_PLANE if by_plane else BY_PIXEL, pixels


def _libjpeg(codestream: bytes, _num_pixels: int, _bits: int) -> Pixels:
    decoder = importlib.import_module("libjpeg")
    return BY_PIXEL, decoder.decode(codestream, colour_transform=0, reshape=False).data


def _pillow(codestream: bytes, _num_pixels: int, _bits: int) -> Pixels:
    picture = importlib.import_module("PIL.Image").open(io.BytesIO(codestream), formats=("JPEG",))
    return BY_PIXEL, picture.tobytes()


def _openjpeg(codestream: bytes, _num_pixels: int, _bits: int) -> Pixels:
    decoder = importlib.import_module("openjpeg")
    return BY_PIXEL, decoder.decode(codestream, reshape=False).data


def _rle(codestream: bytes, num_pixels: int, bits: int) -> Pixels:
    decoder = importlib.import_module("rle.rle")
    return BY_PLANE, decoder.decode_frame(codestream, num_pixels, bits, "<")


DECODE: Final[dict[str, Callable[[bytes, int, int], Pixels]]] = {
    "jpeg_ls": _jpeg_ls,
    "libjpeg": _libjpeg,
    "openjpeg": _openjpeg,
    "rle": _rle,
    "PIL": _pillow,
}


def limit(seconds: float, num_bytes: int) -> None:
    """From here on this much more processor time (then the system kills us) and address space (then malloc fails).

    macOS doesn't enforce that of memory, Windows has neither; there the parent's clock and its
    checks of the codestream's header are what is left.
    """
    with contextlib.suppress(AttributeError):
        signal.setitimer(signal.ITIMER_PROF, seconds)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + num_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))


def unlimit() -> None:
    """Takes the limits away, for reading the next request."""
    with contextlib.suppress(AttributeError):
        signal.setitimer(signal.ITIMER_PROF, 0)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answers requests until the source ends."""
    while len(head := source.read(REQUEST.size)) == REQUEST.size:
        decoder, num_pixels, bits, seconds, num_bytes, length = REQUEST.unpack(head)
        status, layout, pixels = DONE, BY_PIXEL, memoryview(b"")
        try:
            if length:
                codestream = source.read(length)
                limit(seconds, num_bytes)
                layout, content = DECODE[DECODERS[decoder]](codestream, num_pixels, bits)
                pixels = memoryview(content).cast("B")
            else:
                importlib.import_module(DECODERS[decoder])
        except ImportError:
            status = MISSING
        except (ValueError, *BROKEN):
            status = FAILED
        unlimit()
        sink.write(REPLY.pack(status, layout, pixels.nbytes))
        sink.write(pixels)
        sink.flush()


def main() -> None:
    """Keeps the two pipes to itself: what a decoder prints goes nowhere."""
    with os.fdopen(os.dup(0), "rb") as source, os.fdopen(os.dup(1), "wb") as sink:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nowhere, descriptor)
        with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
            serve(source, sink)


if __name__ == "__main__":
    main()
    sys.exit(0)
