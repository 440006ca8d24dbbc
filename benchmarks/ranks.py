"""Ranks of pairs in both directions against faiss and against a full argsort.

python benchmarks/ranks.py [--rounds 3] [--json FILE]      (needs faiss-cpu, and Linux for the memory)

One thread, process time, interleaved, every round in another order. Embeddings of 512, matches among noise so that
ranks lie below 10 and above. Ranks are asserted equal first (a rounding may exchange neighbours: where two
sides differ, the products in float64 must be equal to 1e-6).

faiss: `IndexFlatIP`, the nearest 10 of each query, once a direction; what it doesn't find is only known to rank lower.
Full argsort: the whole matrix of scores, sorted by rows and by columns, as CLIP's own evaluation does it (at 8,000
pairs: at 25,000 it would want 8 GB).

As shipped: ours takes the route of float32 products through oneDNN (`mm.decoder.onednn`). Same flags: without it, since
faiss brings a BLAS of its own that has none; for the argsort, whose products are torch's, with it on both sides.
"""

import argparse
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from side_by_side import compare, heading, keep
from torch import Tensor

from mm.decoder.onednn import onednn_matmul
from mm.evaluation.both_ways import rank_pairs

WIDTH = 512
NUMBER, SORTED = 25_000, 8_000
"""Pairs; pairs whose scores are sorted whole."""
K = 10

Ranks = Callable[[], tuple[np.ndarray, np.ndarray]]
"""The rank of the match of every query, both ways; of one that isn't found, K + 1."""


def embeddings(number: int) -> tuple[Tensor, Tensor]:
    """Partners whose cosine is about that of the best stranger, so that ranks lie on both sides of K."""
    generator = torch.Generator().manual_seed(0)
    first, noise = (F.normalize(torch.randn(number, WIDTH, generator=generator), dim=-1) for _ in range(2))
    return first, F.normalize(first + (WIDTH / (2 * math.log(number))) ** 0.5 * noise, dim=-1)


def ours(first: Tensor, second: Tensor, *, route: bool = True) -> Ranks:
    def run() -> tuple[np.ndarray, np.ndarray]:
        with nullcontext() if route else mock.patch("mm.evaluation.both_ways.onednn_matmul", nullcontext):
            there, back = rank_pairs(first, second)
        return there.rank, back.rank

    return run


def faiss(first: Tensor, second: Tensor) -> Ranks:
    import faiss as peer

    peer.omp_set_num_threads(1)

    def one_way(queries: Tensor, items: Tensor) -> np.ndarray:
        index = peer.IndexFlatIP(WIDTH)
        index.add(items.numpy())
        _, nearest = index.search(queries.numpy(), K)
        hit = nearest == np.arange(len(queries))[:, None]
        return np.where(hit.any(1), hit.argmax(1) + 1, K + 1)

    return lambda: (one_way(first, second), one_way(second, first))


def argsort(first: Tensor, second: Tensor, *, route: bool = False) -> Ranks:
    def one_way(scores: Tensor) -> np.ndarray:
        order = torch.argsort(scores, descending=True)
        return (torch.where(order == torch.arange(len(scores))[:, None])[1] + 1).numpy()

    def run() -> tuple[np.ndarray, np.ndarray]:
        with onednn_matmul() if route else nullcontext():
            scores = first @ second.T
        return one_way(scores), one_way(scores.T)

    return run


def assert_equal(own: Ranks, peer: Ranks, pair: tuple[Tensor, Tensor], *, most: int | None = None) -> int:
    """Returns how many ranks differ, all of them between scores that are the same to 1e-6."""
    exchanged = 0
    for mine, theirs, (queries, items) in zip(own(), peer(), (pair, pair[::-1]), strict=True):
        mine = mine if most is None else np.minimum(mine, most)
        differ = np.flatnonzero(mine != theirs)
        for n in differ.tolist():
            scores = items.double() @ queries[n].double()
            low, high = (1 + int((scores > scores[n] + slack).sum()) for slack in (1e-6, -1e-6))
            assert low <= mine[n] <= high, f"query {n}: {mine[n]}, {theirs[n]}"
            assert low <= theirs[n] <= high, f"query {n}: {mine[n]}, {theirs[n]}"
        exchanged += len(differ)
        share = float((mine <= K).mean())
        assert 0.1 < share < 0.98, f"too easy or too hard to tell: {share:.2f} of the ranks are at most {K}"
    return exchanged


PEAKS: dict[str, Callable[[Tensor, Tensor], Ranks]] = {"ours": ours, "faiss": faiss, "argsort": argsort}


def peak(name: str, number: int) -> float:
    """MB above the inputs at the worst, in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, str(number)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_peak(name: str, number: int) -> None:
    def most() -> float:  # of this process: ru_maxrss would begin at its parent's
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]

    for warm in (ours, faiss) if name == "faiss" else (ours,):  # what libraries take once isn't of a size
        warm(*embeddings(64))()
    ranks = PEAKS[name](*embeddings(number))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = most()
    ranks()
    print(most() - before)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="to see that it runs, not to measure")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "PAIRS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    random.seed(0)
    if options.peak is not None:
        measure_peak(options.peak[0], int(options.peak[1]))
        return {}
    number, few = (600, 400) if options.tiny else (NUMBER, SORTED)
    heading("ours", "peer", rounds=options.rounds)
    lines: dict[str, Any] = {}
    exchanged: dict[str, int] = {}
    pair = embeddings(number)
    exchanged["faiss"] = assert_equal(ours(*pair), faiss(*pair), pair, most=K + 1)
    for column, route in (("as shipped", True), ("same flags (no oneDNN)", False)):
        line = f"{number} pairs both ways, faiss's best {K}, {column}"
        lines[line] = compare(line, ours(*pair, route=route), faiss(*pair), rounds=options.rounds, warm=0)
    pair = embeddings(few)
    exchanged["argsort"] = assert_equal(ours(*pair), argsort(*pair), pair)
    for column, route in (("as shipped", False), ("same flags (oneDNN)", True)):
        line = f"{few} pairs both ways, full argsort, {column}"
        lines[line] = compare(line, ours(*pair), argsort(*pair, route=route), rounds=options.rounds, warm=0)
    peaks = {f"{name}, {size} pairs": round(peak(name, size), 1)
             for name, size in (("ours", number), ("faiss", number), ("ours", few), ("argsort", few))}  # fmt: skip
    for name, megabytes in peaks.items():
        print(f"peak memory above inputs, {name}: {megabytes:.1f} MB")
    print(f"ranks exchanged by rounding: {exchanged}")
    more = {"peak_mb": peaks, "exchanged_by_rounding": exchanged}
    return keep(lines, rounds=options.rounds, path=options.json, **more)


if __name__ == "__main__":
    main()
