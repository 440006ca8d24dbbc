"""Pictures and captions: a canonical head fitted and a decoder trained by `mm fit`, both asked by `mm evaluate`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

import mm
from mm.evaluation.evaluate import run_evaluation
from mm.evaluation.on_texts import TextEvaluation
from mm.training.cli import main

RECIPE = """
seed_everything: 0
model:
  class_path: {task}
  init_args:
    warmup_steps: 2
    modality_dropout: 0.0
    cache: {cache}
    {options}
    model:
      class_path: mm.model.MultimodalModel
      init_args:
        fusion: {{class_path: mm.fusion.alignment.CrossModalAlignment, init_args: {{width: 16, heads: 2}}}}
        image:
          class_path: mm.encoders.timm_image.TimmEncoder
          init_args:
            {{name: resnet10t, weights: {root}/image.safetensors, image_size: 32, token_grid: [2, 2], level: 2}}
        text:
          class_path: mm.encoders.sentence.SentenceEncoder
          init_args: {{weights: {root}/bert}}
        canonical:
          class_path: mm.canonical.CanonicalHead
          init_args: {{image_width: 128, text_width: 24}}
        decoder:
          class_path: mm.decoder.decoder.MoEDecoder
          init_args: {{vocab_size: 300, width: 16, depth: 1, heads: 2, memory_width: 16, num_experts: 2}}
data: {{spec: {root}/spec.yaml, batch_size: 4, workers: 0, vocab_size: 300, inputs: [image], rows: {rows}}}
trainer:
  default_root_dir: {root}/{run}
  accelerator: cpu
  max_epochs: {epochs}
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  logger: false
"""
SPEC = """
kind: jsonl
name: shades
root: {root}
index: rows.jsonl
image: {{column: image}}
target: {{column: caption}}
split: {{column: split}}
"""
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "bright", "on", "the", "left", "right", "above", "below", "."]

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::PendingDeprecationWarning"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that are bright in one of four places, and say so."""
    root = tmp_path_factory.mktemp("shades")
    rows = []
    for number in range(32):
        place = ("left", "right", "above", "below")[number % 4]
        pixels = np.random.default_rng(number).integers(0, 60, (32, 32)).astype(np.uint8)
        part = {"left": np.s_[:, :14], "right": np.s_[:, 18:], "above": np.s_[:14], "below": np.s_[18:]}[place]
        pixels[part] += 180
        PIL.Image.fromarray(pixels).save(root / f"{number}.png")
        split = "train" if number < 20 else "val" if number < 24 else "test"
        rows.append({"image": f"{number}.png", "caption": f"Bright on the {place}.", "split": split})
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "spec.yaml").write_text(SPEC.format(root=root))
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t").state_dict(), root / "image.safetensors")
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(root / "bert")
    (root / "bert" / "vocab.txt").write_text("\n".join(WORDS))
    return root


def fit(root: Path, run: str, **settings: Any) -> int:
    given = {"cache": root / "cache", "options": "", "rows": "[]", "epochs": 0, **settings}
    (root / f"{run}.yaml").write_text(RECIPE.format(root=root, run=run, **given))
    return main(["fit", "-c", str(root / f"{run}.yaml")])


def asked(name: str, root: Path, run: str, *options: str) -> dict[str, Any]:
    given = (f"checkpoint={root / run / 'checkpoint'}", f"spec={root / 'spec.yaml'}", *options)
    run_evaluation(name, root / f"{run}_{name}", overrides=given)
    content: dict[str, Any] = json.loads((root / f"{run}_{name}" / "results.json").read_text(encoding="utf-8"))
    return content


def test_without_a_step_captions_are_found(root: Path) -> None:
    assert fit(root, "aligned", task="AlignTask", options="freeze: [text]") == 0
    found = asked("eval_retrieval", root, "aligned", "source=image")["scores"]["image -> text"]
    assert found["recall_at_1"] > 0.6  # chance: .25, by the four captions
    head = mm.load(root / "aligned" / "checkpoint").model.canonical
    assert head is not None
    assert len(head.pictures) == 20


def test_captions_are_learnt_written_and_scored(root: Path) -> None:
    assert fit(root, "written", task="WriteTask", rows="[caption]", epochs=1) == 0
    found = asked("eval_texts", root, "written", "labeler=null")["scores"]["text"]
    assert list(found)[:3] == ["references", "ours", "baseline: text of the nearest training image"]
    assert found["baseline: text of the nearest training image"]["cider_d"]["value"] > 0


def test_a_caption_is_written_from_the_image_alone(root: Path) -> None:
    """With other captions in the index the same is written."""
    if not (root / "written").exists():
        fit(root, "written", task="WriteTask", rows="[caption]", epochs=1)
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    (root / "lies.jsonl").write_text("\n".join(json.dumps({**row, "caption": "Nothing."}) for row in rows))
    (root / "lies.yaml").write_text(SPEC.format(root=root).replace("rows.jsonl", "lies.jsonl"))
    checkpoint = str(root / "written" / "checkpoint")
    told, lied = (
        TextEvaluation(spec=str(root / f"{name}.yaml"), checkpoint=checkpoint)._described() for name in ("spec", "lies")
    )
    assert told == lied
    assert len(told) == 8


def test_towers_that_learn_are_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(root, "moving", task="AlignTask") == 2
    assert "freeze image and text" in capsys.readouterr().err
    assert fit(root, "fresh", task="AlignTask", options="freeze: [text]", cache="null") == 2
    assert "give a cache" in capsys.readouterr().err
