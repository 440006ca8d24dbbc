"""Pretrained towers in a recipe: trained on, sealed without their files, opened and gone on from; what is cached."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import mm
from mm.batch import Batch, Images, Sample
from mm.data.collate import collate
from mm.data.readers import open_split
from mm.data.spec import load_spec
from mm.encoders.sentence import SentenceEncoder
from mm.encoders.timm_image import TimmEncoder
from mm.training.cache import key
from mm.training.cli import TrainingCLI, main, prepare
from mm.training.rebuild import build

RECIPE = """
seed_everything: 0
model:
  class_path: AlignTask
  init_args:
    learning_rate: 1.0e-3
    warmup_steps: 2
    matching: 0.0
    freeze: [text]
    name: photographs
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
            mean: [0.1, 0.2, 0.3]
        text:
          class_path: mm.encoders.sentence.SentenceEncoder
          init_args: {{weights: {root}/bert}}
data: {{spec: {root}/spec.yaml, batch_size: 4, workers: 0, vocab_size: 300, inputs: [image]}}
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
name: photographs
root: .
index: rows.jsonl
image: {column: image, colour: true}
target: {column: captions}
split: {column: split}
"""
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "green", "blue", "square", "##s", "."]


def told(**changes: dict[str, object]) -> str:
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2}
    text = {"context_length": 24, "vocab_size": 300, "width": 32, "heads": 2, "layers": 1}
    whole = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    return json.dumps({key: value | changes.get(key, {}) if key in changes else value for key, value in whole.items()})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with twelve coloured squares, a small network for them and a small BERT."""
    rows = []
    for number in range(12):
        colour = ("red", "green", "blue")[number % 3]
        PIL.Image.new("RGB", (40, 24), colour).save(tmp_path / f"{number}.png")
        split = "train" if number < 8 else "val" if number < 10 else "test"
        rows.append({"image": f"{number}.png", "captions": [f"a {colour} square."], "split": split})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "spec.yaml").write_text(SPEC.replace("root: .", f"root: {tmp_path}"))
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "image.safetensors")
    config = BertConfig(
        vocab_size=11, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(WORDS))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=tmp_path))
    return tmp_path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_recipe_with_towers_is_sealed_without_their_files(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["fit", "-c", str(root / "recipe.yaml")]) == 0
    shards = [file for file in (root / "cache").rglob("*.safetensors") if file.parent.name != "x"]
    cached = max((load_file(file) for file in shards), key=lambda found: len(found["tokens.image.mask"]))
    assert {name: tuple(item.shape) for name, item in cached.items()} == {
        "tokens.image.values": (8, 4, 512),  # pooled, and nothing else of the image: no map, no pixel
        "tokens.image.mask": (8, 4),
    }
    assert cached["tokens.image.values"].dtype == torch.bfloat16
    folder = root / "run" / "checkpoint"
    assert str(root) not in (folder / "config.json").read_text()
    for file in (root / "image.safetensors", *(root / "bert").iterdir()):
        file.unlink()
    opened = mm.load(folder)
    assert isinstance(opened.model.text, SentenceEncoder)
    assert opened.model.image.mean == (0.1, 0.2, 0.3)
    text = collate([Sample("s", text="A red square.")], opened.tokenizer, rows=()).text
    assert text is not None
    assert [WORDS[index] for index in text.values[0].tolist()] == ["[CLS]", "a", "red", "square", ".", "[SEP]"]
    assert opened.model.embed_text(text).norm().item() == pytest.approx(1)
    again = yaml.safe_load((root / "recipe.yaml").read_text())
    del again["model"]["init_args"]["model"]
    again["model"]["init_args"]["init_from"] = str(folder)
    again["trainer"]["default_root_dir"] = str(root / "again")
    (root / "again.yaml").write_text(yaml.safe_dump(again))
    assert main(["fit", "-c", str(root / "again.yaml")]) == 0
    assert mm.load(root / "again" / "checkpoint").tokenizer.texts_size == len(WORDS)


def test_the_caches_key_knows_weights_and_how_images_are_prepared(root: Path) -> None:
    words, _ = prepare(["fit", "-c", str(root / "recipe.yaml")])
    cli = TrainingCLI.make(words)
    model, data = cli.model.model, cli.datamodule
    settings = {"name": "resnet10t", "weights": str(root / "image.safetensors"), "image_size": 32, "token_grid": (2, 2)}

    def made(**changes: object) -> str:
        model.image = TimmEncoder(**settings | {"mean": (0.1, 0.2, 0.3)} | changes)
        return key(model, data, "train")

    first = made()
    model.image.eval()
    model.text = None  # texts are never cached
    assert key(model, data, "train") == made() == first
    others = [made(mean=(0.1, 0.2, 0.4)), made(token_grid=(1, 1)), made(image_size=64), made(weights=None)]
    assert len({first, *others}) == 5


def test_soft_targets_need_a_text_tower_that_stays_as_it_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    task = recipe["model"]["init_args"]
    task["alike"] = 0.3
    options = task["model"]["init_args"]
    options |= {"projection_hidden": None, "text_hidden": 12, "input_dropout": 0.5, "hidden_dropout": 0.5}
    first = options["image"]
    second = first | {"init_args": first["init_args"] | {"token_grid": [2, 2], "image_size": 64}}
    joined = {"class_path": "mm.encoders.joined.JoinedEncoder", "init_args": {"encoders": [first, second]}}
    options["image"] = joined
    (root / "soft.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "-c", str(root / "soft.yaml")]) == 0
    model = mm.load(root / "run" / "checkpoint").model
    assert isinstance(model.image_projection.project, torch.nn.Linear)
    assert model.text_projection[0].weight.shape == (12, 24)
    del task["freeze"]
    (root / "soft.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "-c", str(root / "soft.yaml")]) == 2
    assert "alike 0.3 needs a text tower that doesn't learn" in capsys.readouterr().err


def test_colour_reaches_the_tower_and_another_one_says_so(root: Path) -> None:
    samples = open_split(load_spec(root / "spec.yaml"), "train")
    batch = collate([samples[0], samples[1]], None)
    assert batch.image is not None
    assert batch.image.values.shape == (2, 3, 256, 256)
    middle = batch.image.values[:, :, 128, 128]
    torch.testing.assert_close(middle, torch.tensor([[1.0, 0.0, 0.0], [0.0, 128 / 255, 0.0]]))
    assert not batch.image.values[:, :, 2].any()  # padded to a square
    model = mm.load("default").model
    with pytest.raises(ValueError, match=r"takes images of 1 channels, the data has 3: set `colour`"):
        model.encode(Batch(2, image=Images(batch.image.values, torch.ones(2, dtype=torch.bool))))


def test_grey_stays_as_it_was(root: Path) -> None:
    (root / "grey.yaml").write_text((root / "spec.yaml").read_text().replace(", colour: true", ""))
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(root / "0.png")
    sample = open_split(load_spec(root / "grey.yaml"), "train")[0]
    assert sample.image is not None
    assert sample.image.shape == (256, 256)
    batch = collate([sample], None)
    assert batch.image is not None
    assert batch.image.values.shape == (1, 1, 256, 256)


def test_a_vocabulary_larger_than_the_tower_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "bert" / "vocab.txt").write_text("\n".join([*WORDS, "more", "words"]))
    assert main(["fit", "-c", str(root / "recipe.yaml")]) == 2
    assert "texts have 13 ids, text has room for 11" in capsys.readouterr().err


def test_weights_of_a_checkpoint_are_never_looked_for(root: Path) -> None:
    config = yaml.safe_load((root / "recipe.yaml").read_text())["model"]["init_args"]["model"]
    config["init_args"]["text"]["init_args"] = {"weights": "/etc", "width": 24, "heads": 2, "depth": 1}
    config["init_args"]["image"]["init_args"]["weights"] = "/etc/passwd"
    made = build(config)
    assert made.text is not None
    assert made.text.texts_from is None


@pytest.mark.parametrize(
    ("architecture", "match"),
    [
        ("{", "is no JSON"),
        ("[]", "must be a JSON object"),
        ('{"embed_dim": 8}', "must have vision_cfg and text_cfg"),
        (f'{{"a": "{"x" * 20_000}"}}', "at most 10,000 characters"),
        (told(vision_cfg={"timm_model_name": "hf-hub:someone/model"}), "plain name"),
        (told(vision_cfg={"image_size": 10**9}), "beyond 65,536"),
        (told(vision_cfg={"layers": 60_000, "width": 8, "head_width": 8}), "far more than there are weights"),
        (told(vision_cfg={"pos_embed_type": "sin_cos_2d"}), "pos_embed_type learnable"),
        (told(text_cfg={"hf_model_name": "someone/model"}), "transformer of open_clip's own"),
    ],
)
def test_a_hostile_architecture_is_refused_before_anything_is_made(architecture: str, match: str) -> None:
    part, tower = "text", "mm.encoders.text.TextEncoder"
    if "60000" in architecture:  # only the tower that is wanted is made in its size
        part, tower = "image", "mm.encoders.clip_image.ClipImageEncoder"
    fusion = {"class_path": "mm.fusion.alignment.CrossModalAlignment", "init_args": {"width": 16, "heads": 2}}
    given = {"fusion": fusion, part: {"class_path": tower, "init_args": {"architecture": architecture}}}
    with pytest.raises(ValueError, match=match):
        build({"class_path": "mm.model.MultimodalModel", "init_args": given}, weights={"fusion.kind.weight": (4, 16)})
