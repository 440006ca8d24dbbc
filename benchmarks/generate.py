"""Tokens a second of generation: ours beside transformers, paged beside contiguous, refilled beside static batches.

python benchmarks/generate.py

One thread, process time, sides interleaved; equal tokens are asserted before anything is timed. A speed is the median
of the rounds; a ratio is the median of the rounds' ratios, with the least and the most. Weights are random and every
row is told where to end. Lengths of the 64 are exponential with a mean of 32, from 4 to 128.

Static batches are of 16 rows, in the order of arrival, the next begun when the last of these has ended: "padded" as
transformers' `generate` has it, every row written until the longest ends; "ended rows leave" is the stricter one.

transformers' continuous batching takes, as shipped, all memory for its cache, and on a CPU masks over all of it in
every step (11 tokens/s when it was tried; it can take the machine down). Here its cache is bounded to what the
requests need.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mm.batch import SPECIAL_IDS, Padded, Slots, Tokens, Writing
from mm.decoder.decoder import MoEDecoder
from mm.decoder.engine import Engine
from mm.decoder.generate import NEVER_WRITTEN, Sampling, write
from mm.decoder.huggingface import write_language_model
from mm.decoder.language import LanguageModel
from mm.decoder.language_config import LanguageConfig
from mm.decoder.onednn import onednn_matmul
from mm.decoder.paged_language import PagedLanguageModel
from mm.decoder.request import Request

VOCABULARY, MEMORY, ROUNDS, BATCH = 2048, 64, 3, 16
SHAPES = {
    "dense": {"key_heads": 4, "hidden": 688},
    "OLMoE": {"norm": "all", "gates": "softmax", "num_experts": 16, "experts_per_token": 4, "expert_width": 128},
}
COMMON = {"vocab_size": VOCABULARY, "width": 256, "depth": 4, "heads": 8, "key_heads": 8, "head_width": 32}


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
    engine = Engine(decoder, max_sequences=BATCH, num_blocks=512, group=1)
    rows = engine.requests(writing, memory)
    rows = [replace(row, sampling=Sampling(length)) for row, length in zip(rows, lengths, strict=True)]
    step = len(rows) if refill else BATCH
    batches = [engine.run(rows[start : start + step]) for start in range(0, len(rows), step)]
    return [list(each.ids) for batch in batches for each in batch]


def make_language_model(shape: str) -> LanguageModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = COMMON | {"hidden": 0, "context": 1024} | SHAPES[shape]
    model = LanguageModel(LanguageConfig(**settings)).eval()
    model.init_weights(std=0.06)
    assert model.output is not None
    with torch.no_grad():
        model.output.weight[SPECIAL_IDS.end] = 0  # rows end where they are told to
    return model


def ragged(count: int, longest: int) -> list[list[int]]:
    """Prompts of 8 to `longest` tokens, every length alike."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, longest + 1, (count,), generator=g).tolist()
    return [torch.randint(10, VOCABULARY, (length,), generator=g).tolist() for length in lengths]


def engine(model: LanguageModel, prompts: list[list[int]], lengths: list[int], *, refill: bool = True) -> list[Any]:
    """Ours, from pages, 16 rows at a time."""
    decoder = PagedLanguageModel(model)
    runner = Engine(decoder, max_sequences=BATCH, token_budget=2048, num_blocks=512, group=1)
    rows = [Request(tuple(p), sampling=Sampling(n)) for p, n in zip(prompts, lengths, strict=True)]
    step = len(rows) if refill else BATCH
    batches = [runner.run(rows[start : start + step]) for start in range(0, len(rows), step)]
    return [list(each.ids) for batch in batches for each in batch]


def contiguous(model: LanguageModel, prompts: list[list[int]], lengths: list[int]) -> list[Any]:
    """Ours, padded static batches in a contiguous cache."""
    written = []
    for start in range(0, len(lengths), BATCH):
        part = slice(start, start + BATCH)
        most = max(lengths[part])
        with torch.no_grad():
            logits, state = model.read(Padded.of(prompts[part]), capacity=max(map(len, prompts[part])) + most)
            rows = write(model, logits, state, sampling=Sampling(most)).rows()
        written += [row[:length] for row, length in zip(rows, lengths[part], strict=True)]
    return written


def settings_of_theirs(most: int) -> Any:
    import transformers

    return transformers.GenerationConfig(
        max_new_tokens=most,
        do_sample=False,
        pad_token_id=SPECIAL_IDS.pad,
        eos_token_id=SPECIAL_IDS.end,
        suppress_tokens=list(NEVER_WRITTEN),
    )


def theirs(peer: Any, prompts: list[list[int]], lengths: list[int]) -> list[Any]:
    """transformers' `generate`, padded static batches."""
    written = []
    for start in range(0, len(lengths), BATCH):
        some, part = prompts[start : start + BATCH], lengths[start : start + BATCH]
        width = max(map(len, some))
        ids = torch.tensor([[SPECIAL_IDS.pad] * (width - len(row)) + row for row in some])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in some])
        with torch.no_grad():
            rows = peer.generate(ids, attention_mask=mask, generation_config=settings_of_theirs(max(part)))
        written += [row[width : width + length] for row, length in zip(rows.tolist(), part, strict=True)]
    return written


def their_continuous(peer: Any, prompts: list[list[int]], lengths: list[int], **options: Any) -> list[Any]:
    """transformers' continuous batching."""
    import transformers

    config = transformers.ContinuousBatchingConfig(max_requests_per_batch=BATCH, **options)
    manager = peer.init_continuous_batching(
        generation_config=settings_of_theirs(max(lengths)), continuous_batching_config=config
    )
    manager.start()
    try:
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            manager.add_request(prompt, request_id=str(row), max_new_tokens=length)
        got: dict[int, list[int]] = {}
        while len(got) < len(prompts):
            result = manager.get_result(timeout=120)
            assert result is not None, "no answer in two minutes"
            if result.is_finished():
                got[int(result.request_id)] = list(result.generated_tokens)
    finally:
        manager.stop(block=True)
    return [got[row] for row in range(len(prompts))]


def routed(run: Callable[[], object]) -> Callable[[], object]:
    """Float32 products through oneDNN."""

    def inside() -> object:
        with onednn_matmul():
            return run()

    return inside


Seconds = dict[str, list[float]]


def timed(sides: dict[str, Callable[[], object]], *, rounds: int = ROUNDS) -> Seconds:
    """Process seconds of each side, measured in turns."""
    seconds: Seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return seconds


def speeds(seconds: Seconds, tokens: int) -> dict[str, int]:
    return {f"{name}, tokens/s": round(tokens / statistics.median(values)) for name, values in seconds.items()}


def times(seconds: Seconds, fast: str, slow: str) -> str:
    """How many times faster, over the rounds."""
    ratios = sorted(b / a for a, b in zip(seconds[fast], seconds[slow], strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def waste(model: LanguageModel, prompts: list[list[int]], lengths: list[int]) -> float:
    """The most slots of a sequence's blocks that no token lay in, in blocks, over all steps."""
    runner = Engine(PagedLanguageModel(model), max_sequences=BATCH, num_blocks=512)
    for prompt, length in zip(prompts, lengths, strict=True):
        runner.submit(Request(tuple(prompt), sampling=Sampling(length)))
    most, page = 0.0, runner.cache.page_size
    while runner.scheduler.waiting or runner.scheduler.running:
        runner.step()
        tables: Sequence[Any] = [sequence.table for sequence in runner.scheduler.running]
        most = max([most, *(len(table.blocks) - table.length / page for table in tables)])
    return most


def our_decoder() -> dict[str, object]:
    """`MoEDecoder` of today's default size, each row with a memory of its own."""
    decoder = make_decoder()
    writing, memory = make_rows(BATCH)
    lengths = [64] * BATCH
    assert continuous(decoder, writing, memory, lengths) == static(decoder, writing, memory, lengths)
    first = timed(
        {
            "contiguous": lambda: static(decoder, writing, memory, lengths),
            "paged": lambda: continuous(decoder, writing, memory, lengths),
        }
    )
    result: dict[str, object] = {
        "16 ragged prompts, 64 tokens each": {
            **speeds(first, sum(lengths)),
            "paged / contiguous (target 0.9)": times(first, "paged", "contiguous"),
        }
    }
    writing, memory = make_rows(64)
    lengths = unequal(64)
    assert continuous(decoder, writing, memory, lengths) == static(decoder, writing, memory, lengths)
    seconds = timed(
        {
            "static, padded": lambda: static(decoder, writing, memory, lengths),
            "static, ended rows leave": lambda: continuous(decoder, writing, memory, lengths, refill=False),
            "continuous": lambda: continuous(decoder, writing, memory, lengths),
        }
    )
    result["64 requests of unequal lengths"] = {
        **speeds(seconds, sum(lengths)),
        "continuous / padded static (target 2)": times(seconds, "continuous", "static, padded"),
        "continuous / static, ended rows leave": times(seconds, "continuous", "static, ended rows leave"),
    }
    return result


def unequal(count: int) -> list[int]:
    drawn = torch.empty(count).exponential_(1 / 32, generator=torch.Generator().manual_seed(2))
    return drawn.long().clamp(4, 128).tolist()


def beside_transformers(shape: str) -> dict[str, object]:
    """The same weights on both sides, exported from ours."""
    import transformers

    model = make_language_model(shape)
    with tempfile.TemporaryDirectory() as folder:
        write_language_model(model, folder)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts, lengths = ragged(BATCH, 128), [64] * BATCH
    assert engine(model, prompts, lengths) == theirs(peer, prompts, lengths) == contiguous(model, prompts, lengths)
    sides: dict[str, Callable[[], object]] = {
        "transformers generate": lambda: theirs(peer, prompts, lengths),
        "ours, contiguous": lambda: contiguous(model, prompts, lengths),
        "ours, paged": lambda: engine(model, prompts, lengths),
    }
    first = timed(sides)
    names = ("transformers generate", "ours, paged")
    route = timed({name: routed(sides[name]) for name in names}, rounds=1)
    result: dict[str, object] = {
        "16 ragged prompts of 8 to 128, 64 tokens each": {
            **speeds(first, sum(lengths)),
            "ours / transformers as shipped (target 1.5)": times(first, "ours, paged", "transformers generate"),
            "ours / transformers, both by oneDNN": times(route, "ours, paged", "transformers generate"),
            "paged / contiguous (target 0.9)": times(first, "ours, paged", "ours, contiguous"),
        }
    }
    many, ends = ragged(64, 64), unequal(64)
    bounded = {"page_size": 32, "num_blocks": 256, "max_batch_tokens": 256}
    expected = theirs(peer, many, ends)
    assert engine(model, many, ends) == expected == contiguous(model, many, ends)
    assert their_continuous(peer, many[:8], ends[:8], **bounded) == expected[:8]
    seconds = timed(
        {
            "transformers generate, static": lambda: theirs(peer, many, ends),
            "ours, static, padded": lambda: contiguous(model, many, ends),
            "ours, static, ended rows leave": lambda: engine(model, many, ends, refill=False),
            "ours, continuous": lambda: engine(model, many, ends),
        }
    )
    slow = timed({"cache bounded": lambda: their_continuous(peer, many, ends, **bounded)}, rounds=1)
    ours = sum(ends) / statistics.median(seconds["ours, continuous"])
    bounded_speed = sum(ends) / slow["cache bounded"][0]
    result["64 requests of unequal lengths, prompts of 8 to 64"] = {
        **speeds(seconds, sum(ends)),
        "transformers continuous, cache bounded, tokens/s": round(bounded_speed),
        "ours / our padded static (target 2)": times(seconds, "ours, continuous", "ours, static, padded"),
        "ours / our static, ended rows leave": times(seconds, "ours, continuous", "ours, static, ended rows leave"),
        "ours / transformers static": times(seconds, "ours, continuous", "transformers generate, static"),
        "ours / transformers continuous, cache bounded (target 10)": round(ours / bounded_speed, 1),
        "most slots of a sequence's blocks unused, in blocks (target: at most 1)": waste(model, many, ends),
    }
    return result


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    ends = unequal(64)
    computed = BATCH * sum(max(ends[start : start + BATCH]) for start in range(0, 64, BATCH))
    result: dict[str, object] = {
        "machine": platform.processor() or platform.machine(),
        "load": os.getloadavg(),
        "unequal lengths: least, median, most": [min(ends), statistics.median(ends), max(ends)],
        "tokens wanted, computed by padded static batches": [sum(ends), computed],
        "shapes": {name: COMMON | settings for name, settings in SHAPES.items()},
        "MoEDecoder": our_decoder(),
    }
    for shape in SHAPES:
        result[f"LanguageModel, {shape}"] = beside_transformers(shape)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
