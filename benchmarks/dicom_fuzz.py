"""Changes small good DICOM files at random, reads what comes out, and counts what it ends in.

python benchmarks/dicom_fuzz.py --inputs 100000        or --seconds 600, and --first N to go on from a number

Input N is the same file in every run. Workers are processes, so that a decoder that crashes costs one input.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "dicom"))

from fuzzing import try_numbers

PART = 50
"""Inputs that a worker takes at once."""
HANGS = 30.0
"""Seconds after which an input counts as one that never ends."""


def work(pipe: Connection) -> None:
    """Takes ranges, gives tallies; tells the number before each input."""
    while (numbers := pipe.recv()) is not None:
        tally = try_numbers(numbers, before=lambda number: pipe.send(number))
        pipe.send((tally, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))


class Worker:
    """A process, and what it is at."""

    def __init__(self) -> None:
        self.pipe, other = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=work, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.numbers = range(0)
        self.number = -1
        self.since = time.monotonic()

    def give(self, numbers: range) -> None:
        """The next range."""
        self.numbers, self.since = numbers, time.monotonic()
        self.pipe.send(numbers)


def main() -> None:
    """Runs until all inputs are tried or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    start, last = time.monotonic(), options.first + options.inputs
    following, tried, longest, memory = options.first, 0, 0.0, 0
    reasons: Counter[str] = Counter()
    uncaught: list[tuple[int, str]] = []
    slow: list[tuple[int, float]] = []
    leaks: list[int] = []
    idle, busy = [Worker() for _ in range(options.workers)], []

    while True:
        while idle and following < last and time.monotonic() - start < options.seconds:
            worker = idle.pop()
            worker.give(range(following, min(last, following + PART)))
            following += len(worker.numbers)
            busy.append(worker)
        if not busy:
            break
        ready = wait([worker.pipe for worker in busy], timeout=1)
        for worker in list(busy):
            lost = ""
            if worker.pipe in ready:
                try:
                    told = worker.pipe.recv()
                except EOFError:
                    worker.process.join()
                    lost = f"the process ended with {worker.process.exitcode}"
                else:
                    worker.since = time.monotonic()
                    if isinstance(told, int):
                        worker.number = told
                        continue
                    tally, peak = told
                    reasons += tally.reasons
                    uncaught += tally.uncaught
                    slow += tally.slow
                    leaks += tally.leaks
                    longest, memory = max(longest, tally.longest), max(memory, peak)
                    tried += len(worker.numbers)
                    busy.remove(worker)
                    idle.append(worker)
                    if tried % (20 * PART) == 0:
                        seconds = round(time.monotonic() - start)
                        print(f"{tried} tried, {seconds} s, {len(uncaught)} uncaught", flush=True)
            elif time.monotonic() - worker.since > HANGS:
                worker.process.kill()
                lost = "no end"
            if lost:
                uncaught.append((worker.number, lost))
                busy.remove(worker)
                fresh = Worker()
                rest = range(worker.number + 1, worker.numbers.stop)
                tried += len(worker.numbers) - len(rest)
                if rest:
                    fresh.give(rest)
                    busy.append(fresh)
                else:
                    idle.append(fresh)
    for worker in idle:
        worker.pipe.send(None)
    print(
        json.dumps(
            {
                "inputs": tried,
                "numbers": [options.first, following],
                "uncaught": uncaught,
                "over_2_s": slow,
                "canary_told": leaks,
                "longest_s": round(longest, 3),
                "peak_mib": memory,
                "seconds": round(time.monotonic() - start, 1),
                "reasons": dict(reasons.most_common()),
            },
            indent=1,
        )
    )
    sys.exit(1 if uncaught or slow or leaks else 0)


if __name__ == "__main__":
    main()
