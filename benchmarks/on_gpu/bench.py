"""What all sections share: a clock that knows CUDA, rows that may say why they weren't measured, the memory's speed."""

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PEAKS = (
    ("B200", 2250.0),
    ("GH200", 989.5),
    ("H200", 989.5),
    ("H100 PCIe", 756.0),
    ("H100", 989.5),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A10", 125.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
"""Dense bfloat16 TFLOP/s with fp32 accumulation, from the makers' data sheets; the first name that fits counts."""


class OutOfTimeError(RuntimeError):
    """The section has used its share of the minutes."""


@dataclass
class Bench:
    """One section's surroundings.

    Attributes:
        device: CUDA, or the CPU where only the logic is tried.
        tiny: Smallest sizes.
        deadline: `time.monotonic()` at which no further case is begun.
        peak: TFLOP/s of the device in bfloat16; None where unknown.
        lines: File that every row is appended to at once, as a line of JSON.
        rows: The same.
    """

    device: torch.device
    tiny: bool
    deadline: float
    peak: float | None = None
    lines: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def row(self, section: str, case: str, **figures: object) -> None:
        """Records and prints one line of a table."""
        row = {"section": section, "case": case, **figures}
        self.rows.append(row)
        print(f"  {case}: " + ", ".join(f"{name} {value}" for name, value in figures.items()), flush=True)
        if self.lines is not None:
            with self.lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def attempt(self, section: str, case: str, run: Callable[[], object]) -> None:
        """What fails in there is recorded by its last line, and the next case can be tried."""
        try:
            if time.monotonic() > self.deadline:
                raise OutOfTimeError("the section's share of the minutes is used up")
            run()
        except Exception as error:  # noqa: BLE001  # whatever it is, it is told, and the other rows are worth having
            self.row(section, case, not_measured=last_line(error))
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def times(self, sides: dict[str, Callable[[], object]], *, seconds: float = 1.0) -> dict[str, float]:
        """Median milliseconds of each side, measured in turns after a warm-up, for about so many seconds together."""
        for run in sides.values():
            for _ in range(1 if self.tiny else 3):
                run()
        start = time.monotonic()
        for run in sides.values():
            self._once(run)
        spent = max(time.monotonic() - start, 1e-4)
        rounds = 1 if self.tiny else max(5, min(100, int(seconds / spent)))
        spans: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, run in sides.items():
                spans[name].append(self._once(run))
        return {name: statistics.median(values) for name, values in spans.items()}

    def _once(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def bandwidth(self) -> float:
        """Bytes a second that a large copy reads and writes."""
        size = 2**20 if self.tiny else 2**30
        source, target = (torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        ms = self.times({"copy": lambda: target.copy_(source)}, seconds=0.3)["copy"]
        return 2 * size / ms * 1e3


def last_line(error: BaseException) -> str:
    """Of the traceback, no longer than fits a table."""
    line = traceback.format_exception_only(error)[-1].strip().splitlines()
    return " ".join(line)[:200]


def assert_near(got: Tensor, expected: Tensor, *, within: float, what: str) -> float:
    """Relative difference in norm; an AssertionError where it is above `within`, or no number."""
    got, expected = got.detach(), expected.detach()
    difference = float((got.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12))
    if not difference <= within:
        raise AssertionError(f"{what} differ by {difference:.2e}, allowed {within:.0e}")
    return difference


def peak_of(name: str) -> float | None:
    """TFLOP/s by the device's name."""
    return next((peak for part, peak in PEAKS if part.lower() in name.lower()), None)


def three(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")
