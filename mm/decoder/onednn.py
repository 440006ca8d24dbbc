"""Float32 matrix products through oneDNN, for a while: on CPUs with AVX-512 but no AMX twice as fast, and as exact."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

import torch

TOLERANCE: Final = 1e-5
"""Relative error of a product that still counts as float32; rounding to bfloat16 gives about 3e-3."""


@contextmanager
def onednn_matmul() -> Iterator[bool]:
    """Routes large float32 products to oneDNN inside the block, forward and backward; yields whether it did.

    `fp32_precision = "bf16"` *allows* oneDNN to compute with bfloat16. A CPU without AMX has nothing to gain from
    that and gets the same float32 as before from a better kernel; one with AMX would really round. So the first call
    multiplies two matrices and looks: where the result isn't float32, or the setting is unknown, nothing is changed.

    The setting is the process's, not the thread's: other threads' products inside the block take the same route.
    """
    if not route_is_exact():
        yield False
        return
    with _route():
        yield True


@cache
def route_is_exact() -> bool:
    """Whether this machine multiplies in float32 on that route; measured once a process."""
    if _setting() is None:
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    with _route():
        got = a @ b
    exact = a.double() @ b.double()
    return bool((got.double() - exact).norm() / exact.norm() < TOLERANCE)


def _setting() -> Any:  # torch makes this module by hand, out of sight of type checkers
    return getattr(torch.backends.mkldnn, "matmul", None)


@contextmanager
def _route() -> Iterator[None]:
    setting = _setting()
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
