"""Two steps timed in turn, used by the scripts beside it: process time, every round in another order.

Milliseconds are the median of the rounds; ratios the median of each round's own, with the quartiles beside them: what
slows a round slows both sides.
"""

import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Step = Callable[[], object]


def milliseconds(step: Step) -> float:
    """Process time of one call, children's apart."""
    start = time.process_time()
    step()
    return 1e3 * (time.process_time() - start)


def heading(ours: str, peer: str, *, rounds: int) -> None:
    """Prints versions, load and the names of the columns."""
    import torch

    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.2f}, {rounds} rounds")
    print(f"{'milliseconds of process time':58}{ours:>9}{peer:>11}   ours is faster (quartiles)", flush=True)


def compare(label: str, ours: Step, peer: Step, *, rounds: int, warm: int = 1) -> dict[str, Any]:
    """Times both in turn, after so many calls that don't count, and prints a line."""
    times: dict[bool, list[float]] = {True: [], False: []}
    sides = [(True, ours), (False, peer)]
    for _, step in sides * warm:
        step()
    for _ in range(rounds):
        random.shuffle(sides)
        for own, step in sides:
            times[own].append(milliseconds(step))
    ratios = [theirs / own for own, theirs in zip(times[True], times[False], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    own, theirs = statistics.median(times[True]), statistics.median(times[False])
    print(f"{label:58}{own:9.2f}{theirs:11.2f}   {middle:5.2f}x ({low:.2f} to {high:.2f})", flush=True)
    return {
        "ours_ms": round(own, 3),
        "peer_ms": round(theirs, 3),
        "ratio": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
    }


def keep(lines: dict[str, Any], *, rounds: int, path: Path | None, **more: Any) -> dict[str, Any]:
    """The figures of a run with what they were measured on, written to a file where one is named."""
    import torch

    found = {"torch": torch.__version__, "load": os.getloadavg()[0], "rounds": rounds, "lines": lines, **more}
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found
