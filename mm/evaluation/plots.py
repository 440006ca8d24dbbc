"""The pictures beside results.json: bars of ours and the baselines, and a confusion matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_WORDS: Final = 30
"""Classes; of more, neither counts nor names can be read."""


@dataclass(frozen=True)
class Confusion:
    """How often each class was taken for which: a row a true class, a column a predicted one."""

    classes: tuple[str, ...]
    counts: Int[np.ndarray, "K K"]


def plot_bars(bars: Sequence[tuple[str, float, float, float]], file: Path, *, title: str, axis: str) -> None:
    """Draws (label, value, low, high); baselines and controls are paler.

    Raises:
        ImportError: matplotlib isn't installed (extra `evaluate`).
    """
    figure = _figure(7.0, 0.42 * len(bars) + 1.2)
    axes = figure.subplots()
    for place, (label, value, low, high) in enumerate(bars):
        rival = label.startswith(("baseline", "control"))
        axes.barh(place, value, color="#9db4c0" if rival else "#1f6f8b", height=0.65)
        if low < high:
            axes.plot([low, high], [place, place], color="#222", linewidth=1.2)
        axes.text(max(value, high) + 0.01, place, f"{value:.3f}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.08, *(1.08 * bar[3] for bar in bars)))
    axes.set_xlabel(axis)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    figure.savefig(file, dpi=130)


def plot_confusion(confusion: Confusion, file: Path, *, title: str) -> None:
    """Draws shares of each true class, and the counts where there is room.

    Raises:
        ImportError: matplotlib isn't installed (extra `evaluate`).
    """
    number = len(confusion.classes)
    side = min(2.5 + 0.4 * number, 16.0)
    figure = _figure(side, side)
    axes = figure.subplots()
    shares = confusion.counts / confusion.counts.sum(1, keepdims=True).clip(min=1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if number <= _MOST_WORDS:
        for row, column in zip(*confusion.counts.nonzero(), strict=True):
            colour = "white" if shares[row, column] > 0.6 else "#222"
            count = str(confusion.counts[row, column])
            axes.text(column, row, count, ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(number), confusion.classes, rotation=90, fontsize=7)
        axes.set_yticks(range(number), confusion.classes, fontsize=7)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=9, loc="left")
    figure.savefig(file, dpi=130)


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'mm-report[evaluate]'") from error
    return Figure(figsize=(width, height), layout="constrained")
