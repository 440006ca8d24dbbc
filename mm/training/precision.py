"""Where bfloat16 would be computed without instructions for it, float32 takes its place."""

import logging
from typing import Any

import torch

log = logging.getLogger(__name__)


def slow_in_bfloat16(device: str) -> bool:
    """Whether a device has no instructions for bfloat16: a processor with AVX2 alone.

    A 3-D convolution of 16 channels in bfloat16 takes two hundred times as long there as in float32 (Zen 3).

    Args:
        device: Its type, such as `cpu`.
    """
    return device == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "NO AVX")


def affordable(precision: Any, *, accelerator: str) -> Any:
    """The precision that was asked for, or float32.

    Args:
        precision: As Lightning's `Trainer` takes it.
        accelerator: Likewise.
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    if not on_cpu or not str(precision).startswith("bf16") or not slow_in_bfloat16("cpu"):
        return precision
    log.info("float32 in the place of precision %s: this processor has no instructions for bfloat16", precision)
    return "32-true"
