"""Does the mixture of experts earn its place? Dense and mixed decoders of equal active width, on cached tokens.

python benchmarks/experts_or_dense.py CHECKPOINT CACHE [--steps 246] [--json FILE]

CHECKPOINT is the folder of `mm fit -c train_align_phantom`, CACHE its runs/cache. Only the decoder learns, from fresh
weights: encoders, finding head, fusion and finding tokens stay as they are. All rows of one seed see the same batches
in the same order. A row that is in FILE already is not run again; the test split is never looked at.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cached_studies import Studies, Words, open_studies
from judge_writing import Judge

from mm.batch import Tokens
from mm.decoder.balance import balance
from mm.decoder.counts import parameter_counts
from mm.decoder.decoder import MoEDecoder
from mm.training.optim import adamw, warmup_cosine
from mm.training.routing import BIAS_RATE, writing_losses

LEARNING_RATE, WEIGHT_DECAY, CLIP = 2e-3, 0.05, 1.0
"""As pipelines/train_report_phantom.yaml has them."""
WARMUP = 0.4
"""Share of the steps; the recipe's 100 of 246."""
ROUNDS = 8
"""Of the clock."""
SEEDS, BEST = 3, 2
"""Seeds of the dense row and of the best mixed ones by validation loss; one of all others."""
RESULTS = ("loss", "loss_sentences", "loss_answers", "exact_sentences", "labels_of_sentences", "exact_answers",
           "asked_f1", "load_variation", "dead_experts", "entropy")  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Of a decoder; a token meets 3 * unit hidden channels a layer in every row."""

    width: int
    depth: int
    heads: int
    unit: int


SIZES = {"default": Size(192, 3, 6, 128), "larger": Size(320, 4, 10, 224)}


@dataclass(frozen=True)
class Row:
    """`shared`: two experts of a unit a token beside a shared one; without: two of one unit and a half."""

    num_experts: int
    shared: bool
    bias: bool = False

    @property
    def name(self) -> str:
        if self.num_experts == 1:
            return "dense"
        shared = "with shared" if self.shared else "without shared"
        return f"E{self.num_experts} k2 {shared}, {'bias' if self.bias else 'auxiliary loss'}"

    def decoder(self, size: Size, *, vocab_size: int, memory_width: int) -> MoEDecoder:
        dense = self.num_experts == 1
        routed = size.unit if self.shared else 3 * size.unit // (1 if dense else 2)
        return MoEDecoder(
            vocab_size,
            width=size.width,
            depth=size.depth,
            heads=size.heads,
            memory_width=memory_width,
            num_experts=self.num_experts,
            experts_per_token=1 if dense else 2,
            expert_width=routed,
            shared_expert_width=size.unit if self.shared else 0,
            gates="softmax" if dense else "renormalised",
            selection_bias=self.bias,
        )


DENSE = Row(1, shared=False)
MIXED = (
    Row(8, shared=True),
    Row(8, shared=False),
    Row(16, shared=True),
    Row(16, shared=False),
    Row(8, shared=True, bias=True),
    Row(16, shared=True, bias=True),
)


def active_without_routers(decoder: MoEDecoder) -> int:
    """What is equal in all rows of a size; a router's own map grows with the experts."""
    return parameter_counts(decoder).active - sum(router.logits.weight.numel() for router in decoder.routers())


class Learner:
    """A decoder with its optimizer, as the write stage trains it: AdamW, clipping, bfloat16, balance."""

    def __init__(self, decoder: MoEDecoder) -> None:
        self.decoder, self.routers = decoder.train(), decoder.routers()
        self.optimizer = adamw(decoder, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.biased = self.routers[0].selection_bias is not None

    def step(self, words: Words, memory: Tokens, *, factor: float = 1.0) -> tuple[float, float]:
        """One step at `factor` of the learning rate; its language loss and its seconds of process time."""
        start = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        with torch.autocast("cpu", torch.bfloat16):
            output = self.decoder(words.writing, memory, rows=words.writing.study)
            losses = writing_losses(output)
        if self.biased:
            del losses["balance"]
        self.optimizer.zero_grad()
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), CLIP)
        self.optimizer.step()
        if self.biased:
            for router, load in zip(self.routers, output.expert_load, strict=True):
                balance(router, load, rate=BIAS_RATE)
        return float(losses["writing"].detach()), time.process_time() - start


def train(decoder: MoEDecoder, studies: Studies, batches: list[Words], *, say: str) -> dict[str, float]:
    """One pass over the batches."""
    learner, done, steps = Learner(decoder), [], len(batches)
    for step, words in enumerate(batches):
        factor = warmup_cosine(step=step, warmup_steps=round(WARMUP * steps), done=step / steps)
        done.append(learner.step(words, studies.memory(words.numbers), factor=factor))
        if step % 10 == 9:
            print(f"{say}: step {step + 1} of {steps}, loss {done[-1][0]:.3f}, {done[-1][1]:.2f} s", flush=True)
    losses, seconds = zip(*done, strict=True)
    return {"loss_trained": statistics.mean(losses[-10:]), "seconds_a_step": statistics.median(seconds)}


def clock(decoders: dict[str, MoEDecoder], studies: Studies, words: Words) -> dict[str, float]:
    """Process time of one and the same batch, rows in turn; what slows a round slows all of them."""
    learners, memory = {name: Learner(decoder) for name, decoder in decoders.items()}, studies.memory(words.numbers)
    rounds = [{name: item.step(words, memory)[1] for name, item in learners.items()} for _ in range(1 + ROUNDS)]
    return {name: statistics.median(times[name] for times in rounds[1:]) for name in decoders}


class Experiment:
    """Runs what FILE lacks, and keeps each row as soon as it is done."""

    def __init__(self, studies: Studies, judge: Judge, file: Path, settings: dict[str, Any]) -> None:
        self.studies, self.judge, self.file = studies, judge, file
        self.content: dict[str, Any] = {"settings": settings, "references": judge.references(), "rows": {}, "clock": {}}
        self._batches: dict[int, list[Words]] = {}
        if file.is_file():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["settings"] != settings:
                raise SystemExit(f"{file} was made with {kept['settings']}, now asked: {settings}; use another file")
            self.content |= kept

    def run(self, row: Row, *, seed: int, size: str = "default") -> dict[str, Any]:
        """Trains and judges a row."""
        key, rows = f"{size}, {row.name}, seed {seed}", self.content["rows"]
        if key not in rows:
            started, load = time.time(), os.getloadavg()[0]
            torch.manual_seed(seed)
            decoder = self._decoder(row, size)
            counts = parameter_counts(decoder)
            found: dict[str, Any] = {"row": row.name, "size": size, "seed": seed}
            found |= train(decoder, self.studies, self._drawn(seed), say=key) | self.judge(decoder)
            found |= {"parameters": counts.total, "active": counts.active}
            found |= {"minutes": (time.time() - started) / 60, "system_load": load}
            rows[key] = found
            self._keep()
            print(f"{key}: { ({name: round(found[name], 4) for name in RESULTS}) }", flush=True)
        result: dict[str, Any] = rows[key]
        return result

    def time(self, rows: Sequence[Row], *, size: str) -> None:
        """Clocks the rows of a size side by side."""
        if size not in self.content["clock"]:
            decoders = {row.name: self._decoder(row, size) for row in rows}
            self.content["clock"][size] = clock(decoders, self.studies, self._drawn(0)[0])
            self._keep()

    def _decoder(self, row: Row, size: str) -> MoEDecoder:
        width = self.studies.memory([0]).values.shape[-1]
        return row.decoder(SIZES[size], vocab_size=self.content["settings"]["vocab_size"], memory_width=width)

    def _drawn(self, seed: int) -> list[Words]:
        settings = self.content["settings"]
        if seed not in self._batches:
            drawn = self.studies.shuffled(steps=settings["steps"], size=settings["batch_size"], seed=seed)
            self._batches = {seed: drawn}
        return self._batches[seed]

    def _keep(self) -> None:
        scratch = self.file.with_suffix(".new")
        scratch.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self.file)


def best(results: dict[Row, dict[str, Any]], number: int) -> list[Row]:
    """The rows of lowest validation loss."""
    return sorted(results, key=lambda row: float(results[row]["loss"]))[:number]


def table(content: dict[str, Any]) -> str:
    """Markdown: a line a row; mean over seeds and, where there are several, lowest to highest."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in content["rows"].values():
        groups.setdefault((result["size"], result["row"]), []).append(result)
    heads = ("size", "row", "seeds", "parameters, M", "active, M", "seconds a step", *RESULTS)
    lines = [f"| {' | '.join(heads).replace('_', ' ')} |", "| --- " * len(heads) + "|"]
    for (size, name), results in groups.items():
        cells = [size, name, str(len(results)), *(f"{results[0][what] / 1e6:.2f}" for what in ("parameters", "active"))]
        cells.append(f"{content['clock'].get(size, {}).get(name, float('nan')):.2f}")
        for what in RESULTS:
            values = [result[what] for result in results]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--spec", default="phantom_unseen")
    parser.add_argument("--train-studies", type=int)
    parser.add_argument("--val-studies", type=int)
    parser.add_argument("--steps", type=int, default=246)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("experts_or_dense.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train_studies, val_studies = open_studies(
        options.checkpoint, options.cache, spec=options.spec, train=options.train_studies, val=options.val_studies
    )
    settings = {
        "spec": options.spec,
        "studies": len(train_studies),
        "val_studies": len(val_studies),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "threads": options.threads,
        "vocab_size": train_studies.tokenizer.vocab_size,
        "torch": torch.__version__,
    }
    experiment = Experiment(train_studies, Judge(val_studies), options.json, settings)
    experiment.run(DENSE, seed=0)
    first = {row: experiment.run(row, seed=0) for row in MIXED}
    chosen = best(first, BEST)
    for seed in range(1, SEEDS):
        for row in (DENSE, *chosen):
            experiment.run(row, seed=seed)
    for row in (DENSE, chosen[0]):
        experiment.run(row, seed=0, size="larger")
    experiment.time((DENSE, *MIXED), size="default")
    experiment.time((DENSE, chosen[0]), size="larger")
    print(table(experiment.content))


if __name__ == "__main__":
    main()
