"""AnswerTask: a decoder trained and a head fitted by `mm fit`, both asked by `mm evaluate`."""

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
from mm.training.cli import main

RECIPE = """
seed_everything: 0
model:
  class_path: AnswerTask
  init_args:
    warmup_steps: 2
    modality_dropout: 0.0
    cache: {root}/cache
    model:
      class_path: mm.model.MultimodalModel
      init_args:
        embedding_width: 8
        fusion: {{class_path: mm.fusion.alignment.CrossModalAlignment, init_args: {{width: 16, heads: 2}}}}
        image:
          class_path: mm.encoders.timm_image.TimmEncoder
          init_args:
            name: resnet10t
            weights: {root}/image.safetensors
            image_size: 32
            token_grid: [2, 2]
            level: 2
        text:
          class_path: mm.encoders.sentence.SentenceEncoder
          init_args: {{weights: {root}/bert}}
        decoder:
          class_path: mm.decoder.decoder.MoEDecoder
          init_args:
            vocab_size: 300
            width: 16
            depth: 1
            heads: 2
            memory_width: 16
            num_experts: 2
            expert_width: 8
            shared_expert_width: 8
        answers:
          class_path: mm.answers.AnswerHead
          init_args: {{text_width: 24, image_width: 128}}
data: {{spec: {root}/spec.yaml, batch_size: 4, workers: 0, vocab_size: 300, inputs: [image], rows: [questions]}}
trainer:
  default_root_dir: {root}/run
  accelerator: cpu
  max_epochs: 1
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
prompt: {{column: question}}
target: {{column: answer}}
closed: {{column: closed, equals: "true"}}
split: {{column: split}}
"""
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "is", "it", "on", "the", "left", "or", "right", "where", "bright", "?"]
ASKED = ("Is it on the left?", "Is it left or right?", "Where is it?")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares that are bright on the left or on the right, three questions on each, and a run over them."""
    root = tmp_path_factory.mktemp("shades")
    rows = []
    for number in range(16):
        left = number % 2 == 0
        pixels = np.zeros((32, 32), dtype=np.uint8)
        pixels[number // 2 % 4 : 24, :12] = 250 if left else 20
        pixels[number // 2 % 4 : 24, 20:] = 20 if left else 250
        PIL.Image.fromarray(pixels).save(root / f"{number}.png")
        side = "left" if left else "right"
        split = "train" if number < 10 else "val" if number < 12 else "test"
        for question, answer in zip(ASKED, ("yes" if left else "no", side, f"The {side}."), strict=True):
            rows.append({"image": f"{number}.png", "question": question, "answer": answer, "closed": answer in
                         ("yes", "no"), "split": split})  # fmt: skip
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
    (root / "recipe.yaml").write_text(RECIPE.format(root=root))
    assert main(["fit", "-c", str(root / "recipe.yaml")]) == 0
    return root


def asked(root: Path, out: Path, *options: str) -> dict[str, Any]:
    given = (f"checkpoint={root / 'run' / 'checkpoint'}", f"spec={root / 'spec.yaml'}", *options)
    run_evaluation("eval_vqa", out, overrides=given)
    content: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return content


pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::PendingDeprecationWarning"
)


def test_the_head_knows_the_training_answers(trained: Path) -> None:
    opened = mm.load(trained / "run" / "checkpoint")
    head = opened.model.answers
    assert head is not None
    assert head.answers == ("left", "no", "right", "yes")  # "The left." is "left"
    assert len(head.sentences) == 30
    assert head.coefficients.abs().max() > 0


def test_answers_fit_the_question(trained: Path, tmp_path: Path) -> None:
    found = asked(trained, tmp_path / "head", "answers=head", "candidates=fitting")
    # Every image of the test split is as bright as some training image: what is asked is seen.
    assert found["scores"]["ours"]["overall"]["value"] == 1.0
    assert "the answer head scores highest" in found["facts"]["answers"]
    free = found["scores"]["baseline: most frequent answer"]["overall"]["value"]
    both = asked(trained, tmp_path / "both", "answers=both", "candidates=fitting")
    assert both["scores"]["ours"]["overall"]["value"] > free


def test_what_can_not_be_asked_is_told(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs answers: listed, head or both"):
        asked(trained, tmp_path, "candidates=fitting")
    with pytest.raises(ValueError, match="has no answer head"):
        run_evaluation("eval_vqa", tmp_path, overrides=("checkpoint=default", "answers=head"))
