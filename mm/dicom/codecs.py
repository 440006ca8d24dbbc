"""Decoding in child processes: one table of decoders, two workers, limits of time and memory, no surprises.

A decoder is C or C++ fed with bytes that nobody vouches for. It runs in a process of its own (`codec_worker`), is
killed when it takes too long, and takes nothing with it when it dies. Two of them also halve the time, because the
decoders hold Python's global lock.
"""

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Final, cast

import numpy as np
from jaxtyping import UInt8
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from mm.dicom import codec_worker
from mm.dicom.codec_worker import BY_PLANE, DECODERS, DONE, MISSING, REPLY, REQUEST
from mm.dicom.errors import PixelError

DECODER: Final[dict[str, str]] = {
    str(RLELossless): "rle",  # pylibjpeg-rle
    str(JPEGBaseline8Bit): "libjpeg",  # pylibjpeg-libjpeg
    str(JPEGExtended12Bit): "libjpeg",
    str(JPEGLossless): "libjpeg",
    str(JPEGLosslessSV1): "libjpeg",
    str(JPEGLSLossless): "jpeg_ls",  # pyjpegls
    str(JPEGLSNearLossless): "jpeg_ls",
    str(JPEG2000Lossless): "openjpeg",  # pylibjpeg-openjpeg
    str(JPEG2000): "openjpeg",
    str(HTJ2KLossless): "openjpeg",
    str(HTJ2KLosslessRPCL): "openjpeg",
    str(HTJ2K): "openjpeg",
}
"""The fastest decoder of every compressed transfer syntax that may be had, by import name.

libjpeg is in the extra `dicom` (its licence is the GPL), the others come with the package.
"""

NUM_WORKERS: Final = min(2, os.cpu_count() or 1)
SCRIPT: Final = Path(codec_worker.__file__)
PIPE_BYTES: Final = 1 << 20
START_SECONDS: Final = 60.0
OUT_OF_TIME: Final = int(getattr(signal, "SIGPROF", 0))
SECONDS: Final = 0.5
SECONDS_A_SAMPLE: Final = 2e-6
"""Processor time of a frame; the slowest decoder takes 1.6e-7 a sample."""
PATIENCE: Final = 20
"""Wall time of a frame over its processor time, for machines that do other things too."""
BYTES: Final = 64 << 20
BYTES_A_SAMPLE: Final = 40
"""Memory of a decoder; OpenJPEG takes under 20 bytes."""


@dataclass(frozen=True)
class Job:
    """One frame to decode: numbers only.

    Attributes:
        decoder: One of `DECODERS`.
        rows: Of the frame.
        columns: Of the frame.
        samples: A pixel.
        bits: A decoded sample takes: 8, 16 or 32.
    """

    decoder: str
    rows: int
    columns: int
    samples: int
    bits: int

    @property
    def num_samples(self) -> int:
        """Of the whole frame."""
        return self.rows * self.columns * self.samples

    @property
    def num_bytes(self) -> int:
        """Of the whole frame, decoded."""
        return self.num_samples * self.bits // 8


@dataclass(frozen=True)
class Decoded:
    """Little-endian samples as the decoder gave them, pixel by pixel or plane by plane."""

    samples: UInt8[np.ndarray, " N"]
    by_plane: bool


class Worker:
    """One child process. Not for two threads at once."""

    def __init__(self) -> None:
        path = os.pathsep.join(item for item in sys.path if item)
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
        self._process = subprocess.Popen(  # noqa: S603 (no argument comes from a file)
            # Its path is ours, so that it finds the same decoders, and nothing is imported but them (-S).
            [sys.executable, "-S", "-P", "-s", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=os.sep,
            env=kept | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        self._requests = cast("BinaryIO", self._process.stdin)
        self._replies = cast("BufferedReader", self._process.stdout)
        with contextlib.suppress(ImportError, AttributeError, OSError):  # Linux: a frame goes through in one go
            import fcntl

            for pipe in (self._requests, self._replies):
                fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._loaded: set[str] = set()
        self.num_frames = 0

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it still answers."""
        return self._process.poll() is None

    def decode(self, job: Job, codestream: bytes) -> Decoded:
        """One frame; a worker that fails with `decoder_crashed` or `decoder_timeout` is dead.

        Raises:
            PixelError: `missing_decoder`, `decoder_failed`, `decoder_crashed` or `decoder_timeout`.
        """
        if job.decoder not in self._loaded:
            self._ask(job, b"", START_SECONDS, START_SECONDS)
            self._loaded.add(job.decoder)
        self.num_frames += 1
        seconds = SECONDS + SECONDS_A_SAMPLE * job.num_samples
        return self._ask(job, codestream, seconds, PATIENCE * seconds)

    def _ask(self, job: Job, codestream: bytes, seconds: float, patience: float) -> Decoded:
        deadline = time.monotonic() + patience
        clock = threading.Timer(patience, self._process.kill)
        clock.daemon = True
        clock.start()
        try:
            return self._exchange(job, codestream, seconds)
        except (OSError, EOFError):
            late = self.close() == -OUT_OF_TIME or time.monotonic() >= deadline
            raise PixelError("decoder_timeout" if late else "decoder_crashed") from None
        except BaseException:  # interrupted between request and reply: the next reply would be another frame's
            self.close()
            raise
        finally:
            clock.cancel()

    def _exchange(self, job: Job, codestream: bytes, seconds: float) -> Decoded:
        memory = BYTES + BYTES_A_SAMPLE * job.num_samples + 4 * len(codestream)
        place = DECODERS.index(job.decoder)
        self._requests.write(
            REQUEST.pack(place, job.rows * job.columns, job.bits, seconds, memory, len(codestream)),
        )
        self._requests.write(codestream)
        self._requests.flush()
        head = self._replies.read(REPLY.size)
        if len(head) < REPLY.size:
            raise EOFError
        status, layout, length = REPLY.unpack(head)
        if (status == DONE and codestream and length != job.num_bytes) or (length and not codestream):
            self.close()  # whatever it is, it isn't read
            raise PixelError("codestream_mismatch")
        samples = np.empty(length, np.uint8)
        if self._replies.readinto(samples.data) != length:
            raise EOFError
        if status != DONE:
            raise PixelError("missing_decoder" if status == MISSING else "decoder_failed")
        return Decoded(samples, layout == BY_PLANE)

    def close(self) -> int:
        """Ends it, unless it has ended already, and gives its exit status."""
        self.release()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        return self._process.returncode

    def release(self) -> None:
        """Closes our ends of its pipes: an idle worker then ends by itself."""
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                pipe.close()


@dataclass(eq=False)
class Pool:
    """Workers that wait for frames, at most `NUM_WORKERS`; started when first needed."""

    idle: list[Worker] = field(default_factory=list)
    places: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(NUM_WORKERS))

    @contextlib.contextmanager
    def worker(self, *, fresh: bool = False) -> Iterator[Worker]:
        """A worker for this thread alone, that has seen no frame yet if it is to be fresh; a dead one isn't kept."""
        with self.places:
            worker = None
            with contextlib.suppress(IndexError):  # two threads may find the same last one
                worker = self.idle.pop()
            if worker is not None and (fresh or not worker.is_alive):
                worker.close()
                worker = None
            worker = worker or Worker()
            try:
                yield worker
            finally:
                if worker.is_alive:
                    self.idle.append(worker)

    def close(self) -> None:
        """Ends the workers that wait."""
        while self.idle:
            self.idle.pop().close()


_pool = Pool()
_left: list[Pool] = []


def _forget() -> None:
    """In a forked child: the workers are the parent's, and two can't talk through one pipe."""
    global _pool
    for worker in _pool.idle:
        worker.release()
    _left.append(_pool)  # never collected: they aren't our children
    _pool = Pool()


def close() -> None:
    """Ends the workers; the next frame starts others."""
    _pool.close()


atexit.register(close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@lru_cache
def is_installed(decoder: str) -> bool:
    """Whether a decoder can be imported; it isn't imported here."""
    return find_spec(decoder) is not None


def decode(job: Job, codestream: bytes) -> Decoded:
    """One frame in a child process; safe to call from several threads.

    Raises:
        PixelError: `missing_decoder`, `codestream_mismatch`, `decoder_failed`, `decoder_crashed` or `decoder_timeout`.
    """
    if not is_installed(job.decoder):
        raise PixelError("missing_decoder")
    with _pool.worker() as worker:
        is_used = worker.num_frames > 0
        try:
            return worker.decode(job, codestream)
        except PixelError as error:
            if not is_used or error.reason != "decoder_crashed":
                raise
    with _pool.worker(fresh=True) as worker:  # an earlier frame may have broken that one
        return worker.decode(job, codestream)
