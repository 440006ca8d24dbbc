"""Tokens a second of generation: paged against contiguous cache, continuous refill against static batches.

python benchmarks/generate.py

One thread, process time, sides interleaved, median of rounds; equal tokens are asserted before anything is timed.
Weights are random; every row is told where to end. Lengths of the 64 are exponential with a mean of 32.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from mm.batch import SPECIAL_IDS, Padded, Slots, Tokens, Writing
from mm.decoder.decoder import MoEDecoder
from mm.decoder.engine import Engine
from mm.decoder.generate import Sampling

VOCABULARY, MEMORY, ROUNDS, BATCH = 2048, 64, 3, 16


def make_decoder() -> MoEDecoder:
    """Today's default size."""
    torch.manual_seed(0)
    decoder = MoEDecoder(VOCABULARY).eval()
    with torch.no_grad():
        decoder.embedding.weight.mul_(4)  # sharp, as a trained decoder is: else every choice is a tie
        decoder.embedding.weight[SPECIAL_IDS.end] = 0  # rows end where they are told to
    return decoder


def make_rows(count: int) -> tuple[Writing, Tokens]:
    """Ragged prompts of 3 to 42 tokens, one study a row."""
    g = torch.Generator().manual_seed(1)
    prompts = []
    for _ in range(count):
        words = torch.randint(10, VOCABULARY, (int(torch.randint(0, 40, (), generator=g)),), generator=g).tolist()
        prompts.append([SPECIAL_IDS.en, SPECIAL_IDS.slot, *words, SPECIAL_IDS.answer])
    slots = Slots(*torch.zeros(5, count, dtype=torch.long))
    memory = Tokens(torch.randn(count, MEMORY, 192, generator=g), torch.ones(count, MEMORY, dtype=torch.bool))
    return Writing(torch.arange(count), slots, Padded.of(prompts), None), memory


def some(writing: Writing, memory: Tokens, rows: slice) -> tuple[Writing, Tokens]:
    parts = (writing.slots.kind, writing.slots.code, writing.slots.side, writing.slots.change, writing.slots.grade)
    length = int(writing.prompt.lengths[rows].max())
    prompt = Padded(writing.prompt.values[rows, :length], writing.prompt.lengths[rows])
    writing = Writing(writing.study[rows], Slots(*(part[rows] for part in parts)), prompt, None)
    return writing, Tokens(memory.values[rows], memory.mask[rows])


def static(decoder: MoEDecoder, writing: Writing, memory: Tokens, lengths: list[int]) -> list[list[int]]:
    """`generate`, 16 rows at a time, each until the longest of its batch ends; what is too much is thrown away."""
    written = []
    for start in range(0, len(lengths), BATCH):
        part = slice(start, start + BATCH)
        rows = decoder.generate(*some(writing, memory, part), sampling=Sampling(max(lengths[part]))).rows()
        written += [row[:length] for row, length in zip(rows, lengths[part], strict=True)]
    return written


def continuous(
    decoder: MoEDecoder, writing: Writing, memory: Tokens, lengths: list[int], *, refill: bool = True
) -> list[list[int]]:
    """The engine, 16 rows at a time; without refill the next 16 begin when the last of these has ended."""
    engine = Engine(decoder, max_sequences=BATCH, num_blocks=512, group=4, max_wait=0.05)
    rows = engine.requests(writing, memory)
    rows = [replace(row, sampling=Sampling(length)) for row, length in zip(rows, lengths, strict=True)]
    step = len(rows) if refill else BATCH
    batches = [engine.run(rows[start : start + step]) for start in range(0, len(rows), step)]
    return [list(each.ids) for batch in batches for each in batch]


def timed(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median process seconds of each side, measured in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, run in sides.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    torch.set_num_threads(1)
    result: dict[str, object] = {"machine": platform.processor() or platform.machine(), "load": os.getloadavg()}

    decoder = make_decoder()
    writing, memory = make_rows(BATCH)
    lengths = [64] * BATCH
    assert continuous(decoder, writing, memory, lengths) == static(decoder, writing, memory, lengths)
    seconds = timed(
        {
            "contiguous": lambda: static(decoder, writing, memory, lengths),
            "paged": lambda: continuous(decoder, writing, memory, lengths),
        }
    )
    result["16 ragged prompts, 64 tokens each"] = {
        **{f"{name}, tokens/s": round(sum(lengths) / value) for name, value in seconds.items()},
        "paged / contiguous (target 0.9)": round(seconds["contiguous"] / seconds["paged"], 2),
    }

    writing, memory = make_rows(64)
    drawn = torch.empty(64).exponential_(1 / 32, generator=torch.Generator().manual_seed(2))
    lengths = drawn.long().clamp(4, 128).tolist()
    assert continuous(decoder, writing, memory, lengths) == static(decoder, writing, memory, lengths)
    seconds = timed(
        {
            "static, padded": lambda: static(decoder, writing, memory, lengths),
            "static, ended rows leave": lambda: continuous(decoder, writing, memory, lengths, refill=False),
            "continuous": lambda: continuous(decoder, writing, memory, lengths),
        }
    )
    computed = BATCH * sum(max(lengths[start : start + BATCH]) for start in range(0, 64, BATCH))
    result["64 requests of unequal lengths"] = {
        "lengths: least, median, most": [min(lengths), statistics.median(lengths), max(lengths)],
        "tokens wanted, computed by padded static batches": [sum(lengths), computed],
        **{f"{name}, tokens/s": round(sum(lengths) / value) for name, value in seconds.items()},
        "continuous / padded static (target 2)": round(seconds["static, padded"] / seconds["continuous"], 2),
        "continuous / static": round(seconds["static, ended rows leave"] / seconds["continuous"], 2),
    }

    # The comparison with transformers' `generate` and its continuous batching belongs here: the same weights on both
    # sides (a dense and an OLMoE shape, exported from our decoder), the same prompts, tokens asserted equal.
    result["transformers"] = "not measured: needs a decoder that both can load"
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
