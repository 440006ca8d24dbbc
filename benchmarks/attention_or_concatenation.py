"""Does attention across modalities earn its place? The decoder's memory with it, and with tokens side by side.

python benchmarks/attention_or_concatenation.py CHECKPOINT CACHE [--train-studies 400] [--steps 200] [--json FILE]

Fusion, finding tokens and decoder learn together from fresh weights, as in the write stage; encoders, finding head and
adapters stay as CHECKPOINT (the folder of a model with every part) has them, their output lies in CACHE. Both rows of a
seed see the same batches in the same order. Judged on validation patients; the test split is never looked at.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, Final, Literal

import torch
from cached_studies import Studies, open_both, remembered
from judge_writing import Judge
from torch import nn

import mm
from mm.decoder.decoder import MoEDecoder
from mm.fusion.alignment import CrossModalAlignment
from mm.model import MultimodalModel
from mm.training.cache import Cache
from mm.training.cache import build as build_cache
from mm.training.checkpoint import build, load
from mm.training.optim import adamw, warmup_cosine
from mm.training.routing import writing_losses
from mm.training.write import WriteTask

Row = Literal["cross-modal attention", "concatenation"]
ROWS: Final[tuple[Row, ...]] = ("cross-modal attention", "concatenation")
LEARNING_RATE, WEIGHT_DECAY, CLIP, WARMUP = 2e-3, 0.05, 1.0, 0.4
"""As pipelines/train_report_phantom.yaml has them; the last is a share of the steps."""


def fresh(checkpoint: Path, row: Row, *, seed: int) -> MultimodalModel:
    """The checkpoint's model with what the write stage trains made anew, and nothing else that learns."""
    loaded = load(str(checkpoint))
    torch.manual_seed(seed)
    new, model = build(loaded.config), loaded.model
    for name in WriteTask.trains:
        setattr(model, name, getattr(new, name))
    assert isinstance(model.fusion, CrossModalAlignment)
    if row == "concatenation":
        model.fusion.layers = nn.ModuleList()  # tokens keep their modality's mark and the norm, and read no other
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in WriteTask.trains)
    return model


def train(model: MultimodalModel, kept: Cache, words: Studies, *, steps: int, size: int, seed: int, say: str) -> float:
    """One run; process seconds a step."""
    model.train()
    for part in (model.volume, model.image, model.audio, model.record, model.findings, model.text):
        if part is not None:
            part.eval()
    optimizer = adamw(model, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    started, decoder = time.process_time(), model.decoder
    assert decoder is not None
    for step, batch in enumerate(words.shuffled(steps=steps, size=size, seed=seed)):
        factor = warmup_cosine(step=step, warmup_steps=round(WARMUP * steps), done=step / steps)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        encoded = kept.select(torch.tensor(batch.numbers), "cpu")
        with torch.autocast("cpu", torch.bfloat16):
            memory = model.fuse(encoded, model.find(encoded))
            losses = writing_losses(decoder(batch.writing, memory, rows=batch.writing.study))
        optimizer.zero_grad()
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
        optimizer.step()
        if step % 20 == 19:
            print(f"{say}: step {step + 1} of {steps}, loss {float(losses['writing'].detach()):.3f}", flush=True)
    return (time.process_time() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--spec", default="phantom_unseen")
    parser.add_argument("--train-studies", type=int, default=400)
    parser.add_argument("--val-studies", type=int, default=100)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    opened, data = open_both(
        options.checkpoint, spec=options.spec, train=options.train_studies, val=options.val_studies
    )
    kept = {split: build_cache(opened, data, split, options.cache) for split in ("train", "val")}
    words = remembered(opened, kept["train"], data, "train")
    rows: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
    for seed in range(options.seeds):
        for row in ROWS:
            model = fresh(options.checkpoint, row, seed=seed)
            learning = sum(
                p.numel() for name, p in model.named_parameters() if p.requires_grad and "matches" not in name
            )
            sizes = {"steps": options.steps, "size": options.batch_size}
            seconds = train(model, kept["train"], words, **sizes, seed=seed, say=f"{row}, seed {seed}")
            judge = Judge(remembered(model, kept["val"], data, "val"))
            assert isinstance(model.decoder, MoEDecoder)
            found = judge(model.decoder) | {"seconds_a_step": seconds, "parameters": learning}
            rows[row].append(found)
            print(row, seed, {name: round(value, 4) for name, value in found.items()}, flush=True)
            result = {"settings": {k: str(v) for k, v in vars(options).items()}, "mm": mm.__version__,
                      "references": judge.references(), "rows": rows}  # fmt: skip
            if options.json is not None:
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
