"""What `mm fit` takes on top of a hand-written loop: Lightning, the data module, logging, the search for NaN.

python benchmarks/training_overhead.py [--rounds 8] [--json FILE]

Both sides train the same model on the same batches of cached encoder output, one thread, process time, every batch
first on one side, then on the other, in turn. `mm fit` is all there is from the end of a step to the end of the next:
drawing and tokenizing texts, the loop's own work, the search for NaN, clipping, the scheduler, the log. The loop by
hand is given its batches ready made, with the seed and the learning rate of the step, and does nothing but forward,
backward, clipping and AdamW. After every step the losses must be equal, and at the end every weight.

As shipped: the recipe's one worker, whose time is its own core's; in this process: `data.workers` 0, so that all that
loading takes is counted. (The peer is our own model: there are no flags in which the two could differ.)
"""

import argparse
import contextlib
import copy
import io
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from side_by_side import keep
from torch import Tensor

from mm.data.datamodule import Numbered
from mm.training.allocator import keep_freed_memory
from mm.training.cached import CachedTask
from mm.training.cli import TrainingCLI, prepare
from mm.training.optim import adamw
from mm.trust import restrict_imports

RECIPES = (("train_report_phantom", 24), ("train_align_phantom", 48))
"""Recipes on cached output, and studies a step; the second's own 96 would make one step of an epoch here."""
STUDIES = 96
WARM = 4
"""Steps at the beginning that don't count."""


class ByHand:
    """The loop one would write: a copy of the task, its losses and AdamW."""

    def __init__(self, task: CachedTask, *, clip: float) -> None:
        self.task = copy.deepcopy(task)
        self.task.log = self.task.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]
        self.optimizer = adamw(self.task, learning_rate=task.learning_rate, weight_decay=task.weight_decay)
        # In the optimizer's order, as Lightning's: another one rounds the norm otherwise.
        self.parameters = [item for group in self.optimizer.param_groups for item in group["params"]]
        self.clip = clip
        self.narrow = True

    def step(self, numbered: Numbered, *, rates: list[float]) -> Tensor:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimizer.zero_grad()
        # Without torch's cache of narrowed weights, as Lightning: with it gradients of shared weights round otherwise.
        with torch.autocast("cpu", torch.bfloat16, enabled=self.narrow, cache_enabled=False):
            loss = torch.stack([item.float() for item in self.task.losses(numbered).values()]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        return loss.detach()


class Alternate(Callback):
    """Every step of `mm fit` once more by hand, before it and after it in turn."""

    def __init__(self, by_hand: ByHand) -> None:
        self.by_hand = by_hand
        self.times: list[tuple[float, float]] = []
        self._since: float | None = None
        self._fit = self._hand = 0.0
        self._loss: Tensor | None = None
        self._rates: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.by_hand.task._caches = pl_module._caches  # noqa: SLF001
        self.by_hand.narrow = trainer.precision == "bf16-mixed"  # else the processor has no instructions for it

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Numbered, batch_idx: int) -> None:
        self._rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        if trainer.global_step % 2 == 0:
            self._run(pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Numbered, batch_idx: int) -> None:
        if trainer.global_step % 2 == 0:  # counted already
            self._run(pl_module, batch, batch_idx)
        else:
            self._pause()
        assert self._loss is not None
        assert torch.equal(self._loss, outputs["loss"]), f"{outputs['loss']} and {self._loss} by hand"
        self.times.append((self._fit, self._hand))
        self._fit, self._since = 0.0, time.process_time()

    def _pause(self) -> float:
        now = time.process_time()
        if self._since is not None:
            self._fit += 1e3 * (now - self._since)
        return now

    def _run(self, task: Any, batch: Numbered, batch_idx: int) -> None:
        start = self._pause()
        task.on_train_batch_start(batch, batch_idx)  # sets the seed of the step
        self._loss = self.by_hand.step(batch, rates=self._rates)
        self._since = time.process_time()
        self._hand = 1e3 * (self._since - start)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        for (name, own), theirs in zip(pl_module.named_parameters(), self.by_hand.task.parameters(), strict=True):
            assert torch.equal(own, theirs), name


def measure(recipe: str, batch: int, workers: int, *, studies: int, rounds: int, folder: Path) -> dict[str, Any]:
    epochs = -(-(2 * rounds + WARM) * batch // studies)
    words, trust = prepare([
        "fit", "-c", recipe, "--model.init_args.init_from", "default", "--model.init_args.cache", str(folder / "cache"),
        "--data.batch_size", str(batch), "--data.workers", str(workers), "--data.train_studies", str(studies),
        "--data.val_studies", "2", "--trainer.max_epochs", str(epochs), "--trainer.accelerator", "cpu",
        "--trainer.check_val_every_n_epoch", str(epochs + 1), "--trainer.default_root_dir", str(folder / "run"),
        "--trainer.logger.init_args.save_dir", str(folder / "run"),
    ])  # fmt: skip
    restrict_imports(trust)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli = TrainingCLI.make(words)
        cli.check()
        alternate = Alternate(ByHand(cli.model, clip=cli.trainer.gradient_clip_val))
        cli.trainer.callbacks.append(alternate)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    times = alternate.times[WARM : WARM + 2 * rounds]
    # A step before and one behind together: whoever meets a batch first pays for what oneDNN prepares for new shapes.
    pairs = [
        (sum(column) / 2 for column in zip(*both, strict=True)) for both in zip(times[::2], times[1::2], strict=True)
    ]
    fits, by_hands = zip(*pairs, strict=True)
    low, middle, high = statistics.quantiles([fit / hand - 1 for fit, hand in zip(fits, by_hands, strict=True)], n=4)
    fit, by_hand = statistics.median(fits), statistics.median(by_hands)
    where = "as shipped (one worker)" if workers else "in this process (no worker)"
    label = f"{recipe}, {batch} studies, {where}"
    print(f"{label:72}{fit:9.1f}{by_hand:9.1f}   {100 * middle:+5.1f} % ({100 * low:+.1f} to {100 * high:+.1f})",
          flush=True)  # fmt: skip
    return {"mm_fit_ms": round(fit, 2), "by_hand_ms": round(by_hand, 2), "overhead": round(middle, 4),
            "quartiles": [round(low, 4), round(high, 4)]}  # fmt: skip


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=8, help="of two steps each")
    parser.add_argument("--tiny", action="store_true", help="to see that it runs, not to measure")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "mm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.2f}, {options.rounds} rounds of two steps")
    print(f"{'milliseconds of process time a step':72}{'mm fit':>9}{'by hand':>9}   overhead (quartiles)", flush=True)
    lines: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for recipe, batch in RECIPES:
            for workers in (1, 0):
                size, studies = (2, 4) if options.tiny else (batch, STUDIES)
                lines[f"{recipe}, {workers} workers"] = measure(
                    recipe, size, workers, studies=studies, rounds=options.rounds, folder=Path(scratch)
                )
    return keep(lines, rounds=options.rounds, path=options.json)


if __name__ == "__main__":
    main()
