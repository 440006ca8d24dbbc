"""Lets glibc keep the memory that tensors free.

By default it returns every large block to the kernel, which hands it out again page by page, zeroed. A step of
train_findings_phantom on one core took 4.5 CPU seconds with that and 3.2 without (docs/results.md, "Speed").
"""

import ctypes
import sys
from typing import Final

# Parameters of mallopt(3).
_TRIM_THRESHOLD: Final = -1
_TOP_PAD: Final = -2
_MMAP_MAX: Final = -4
_TOP_PAD_BYTES: Final = 256 << 20


def keep_freed_memory() -> bool:
    """Switches the return of freed memory off for this process and those it forks; peak memory stays what it is.

    Returns:
        Whether the C library has such a switch (glibc does).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, _TOP_PAD_BYTES))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
