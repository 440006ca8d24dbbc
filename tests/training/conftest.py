"""A recipe that aligns a dozen pictures with their captions in a second or two."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml

RECIPE = """
seed_everything: 0
model:
  class_path: AlignTask
  init_args:
    learning_rate: 3.0e-3
    warmup_steps: 2
    modality_dropout: 0.2
    name: pictures
    model:
      class_path: mm.model.MultimodalModel
      init_args:
        embedding_width: 8
        fusion: {class_path: mm.fusion.alignment.CrossModalAlignment, init_args: {width: 16, heads: 2, dropout: 0.1}}
        image:
          class_path: mm.encoders.vit.ViTEncoder
          init_args: {patch: 32, width: 16, depth: 2, heads: 2, token_grid: [2, 2]}
        text:
          class_path: mm.encoders.text.TextEncoder
          init_args: {vocab_size: 300, width: 16, depth: 1, heads: 2, context_length: 32}
data: {batch_size: 3, workers: 0, vocab_size: 300, max_text: 32}
trainer:
  accelerator: cpu
  max_epochs: 2
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
"""
SPEC = """
kind: jsonl
name: pictures
root: .
index: rows.jsonl
image: {column: image}
target: {column: captions}
split: {column: split}
"""

Change = Callable[[dict[str, Any]], None]
Words = Callable[..., list[str]]


@pytest.fixture
def aligning(tmp_path: Path) -> Words:
    """Writes data, spec and recipe; gives the command line that runs it, with its losses in run/log."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(16):
        pixels = generator.integers(0, 255, (32, 32), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        captions = ["normal", "nothing is seen"] if number % 2 else [f"spot {number}", f"a round spot {number}"]
        split = "train" if number < 12 else "val"
        rows.append({"image": f"{number}.png", "captions": captions, "split": split})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "spec.yaml").write_text(SPEC)

    def words(name: str = "run", change: Change = lambda _: None) -> list[str]:
        recipe = yaml.safe_load(RECIPE)
        recipe["model"]["init_args"]["cache"] = str(tmp_path / "cache")
        recipe["data"] |= {"spec": str(tmp_path / "spec.yaml"), "root": str(tmp_path)}
        recipe["trainer"] |= {
            "default_root_dir": str(tmp_path / name),
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(tmp_path / name), "name": "log", "version": ""},
            },
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {
                        "dirpath": str(tmp_path / name / "resume"),
                        "filename": "{step}",
                        "every_n_train_steps": 1,
                        "save_top_k": -1,
                        "save_last": True,
                    },
                }
            ],
        }
        change(recipe)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        return ["-c", str(tmp_path / f"{name}.yaml")]

    return words
