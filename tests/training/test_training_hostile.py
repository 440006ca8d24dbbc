"""Checkpoint folders whose seal is right and whose content is wrong: one line, no network, no memory."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mm.data.tokenizer import train_tokenizer
from mm.training import checkpoint
from mm.training.checkpoint import Card, Preprocessing

CONFIG: dict[str, Any] = {
    "class_path": "mm.model.MultimodalModel",
    "init_args": {
        "embedding_width": 8,
        "fusion": {"class_path": "mm.fusion.alignment.CrossModalAlignment", "init_args": {"width": 16, "heads": 2}},
        "image": {
            "class_path": "mm.encoders.vit.ViTEncoder",
            "init_args": {"patch": 32, "width": 16, "depth": 1, "heads": 2, "token_grid": [2, 2]},
        },
        "record": {
            "class_path": "mm.encoders.record.RecordEncoder",
            "init_args": {"vocab_size": 300, "width": 16, "depth": 1, "heads": 2},
        },
    },
}
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "c"
    words = train_tokenizer(["cough and fever"], vocab_size=300)
    checkpoint.save(checkpoint.build(CONFIG), folder, config=CONFIG, tokenizer=words, card=Card("test"))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    (tmp_path / "c").mkdir()
    for file in whole.iterdir():
        (tmp_path / "c" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "c"


def seal(folder: Path) -> None:
    """As anybody can: over whatever lies there."""
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in checkpoint.FILES}
    content = json.loads((folder / "seal.json").read_text())
    unsigned = {"format": content["format"], "ontology": content["ontology"], "files": files}
    digest = hashlib.sha256(json.dumps(unsigned, sort_keys=True).encode()).hexdigest()
    (folder / "seal.json").write_text(json.dumps(unsigned | {"sha256": digest}))


def edit(name: str, *keys: str | int, value: Any = None, remove: bool = False) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        if remove:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value
        (folder / name).write_text(json.dumps(content))

    return change


def write(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content) and None


def other_weights(folder: Path) -> None:
    save_file({"foreign": torch.zeros(3)}, folder / "model.safetensors")


IMAGE, RECORD = ("init_args", "image", "init_args"), ("init_args", "record", "init_args")
BAD: dict[str, tuple[Change, str]] = {
    "weights are noise": (write("model.safetensors", b"\xff" * 64), r"model\.safetensors can't be read"),
    "weights are empty": (write("model.safetensors", b""), r"model\.safetensors can't be read"),
    "weights of another model": (other_weights, "weights do not fit the model: .* are missing and 1 have no place"),
    "card key": (edit("card.json", "evil", value=1), r"card\.json: unknown key 'evil'; accepted: name, description"),
    "card without name": (edit("card.json", "name", remove=True), r"card\.json: no 'name'"),
    "card name": (edit("card.json", "name", value=["x"]), r"card\.json: name must be text"),
    "card stages": (edit("card.json", "stages", value=[3]), r"stages must be a list of objects"),
    "card kind": (edit("card.json", "kind", value="real"), "kind must be one of demonstration, trained"),
    "no grid": (edit("preprocessing.json", "grid", remove=True), r"preprocessing\.json: no 'grid'"),
    "huge grid": (edit("preprocessing.json", "grid", value=[9, 10**9, 9]), "grid must be whole numbers from 1 to 1,0"),
    "flat grid": (edit("preprocessing.json", "grid", value=[9, 9]), "grid must have three values"),
    "spacing": (edit("preprocessing.json", "spacing_mm", value=[0, 1, 1]), "spacing_mm must be positive"),
    "JSON": (write("config.json", b"{"), r"config\.json can't be read as JSON"),
    "nest": (write("config.json", b"[" * 100_000), r"config\.json can't be read as JSON"),
    "list": (write("card.json", b"[]"), r"card\.json must be a JSON object"),
    "merges": (edit("tokenizer.json", "model", "merges", value=[["q", "nope"]]), "a merge joins what is not in its"),
    "no merges": (edit("tokenizer.json", "model", "merges", remove=True), "not BPE with vocab and merges"),
    "pattern": (
        edit("tokenizer.json", "pre_tokenizer", value={"type": "Split", "pattern": {"Regex": "(a+)+$"}}),
        "its pre_tokenizer is not ByteLevel",
    ),
    "unknown option": (
        edit("tokenizer.json", "model", "dropout", value="x"), "tokenizer.json is not a vocabulary written by",
    ),
    "unknown class": (edit("config.json", "init_args", "record", "class_path", value="os.system"), "if you trust it"),
    "unknown option of the model": (edit("config.json", "init_args", "evil", value=1), "evil"),
    "heads": (edit("config.json", *RECORD, "heads", value=0), "no network can be made of it"),
    "negative": (edit("config.json", *RECORD, "width", value=-16), "no network can be made of it"),
    "network": (edit("config.json", *IMAGE, "name", value="hf-hub:evil/model"), "'hf-hub:evil/model' would fetch"),
    "disk": (edit("config.json", *IMAGE, "name", value="local-dir:/etc"), "'local-dir:/etc' would fetch"),
    "hidden": (
        edit("config.json", "init_args", "image", value='{"class_path": "mm.encoders.vit.ViTEncoder",'
             ' "init_args": {"name": "hf-hub:evil/model", "pretrained": true}}'),
        "'hf-hub:evil/model' would fetch",
    ),
    "memory": (edit("config.json", *RECORD, "vocab_size", value=10**12), "vocab_size is 1000000000000, and no weight"),
    "deep": (edit("config.json", *RECORD, "depth", value=60_000), "far more than there are weights"),
    "large": (edit("config.json", *RECORD, "vocab_size", value=60_000), r"word.weight is \(300, 16\), the model"),
    "more tokens": (edit("config.json", *IMAGE, "token_grid", value=[9000, 9000]), "token_grid must be at most"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_one_line_that_names_the_folder(folder: Path, case: str) -> None:
    change, message = BAD[case]
    change(folder)
    seal(folder)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load(folder)
    assert time.perf_counter() - start < 60  # hours without a bound
    said = str(error.value)
    assert said.startswith(f"checkpoint {str(folder)!r}: ")
    assert said.endswith("copy the folder anew, or train it again")
    assert "\n" not in said
    assert len(said) < 1200


@pytest.mark.parametrize("case", ["weights are noise", "card key", "no grid", "list"])
def test_inspect_says_the_same(folder: Path, case: str) -> None:
    change, message = BAD[case]
    change(folder)
    seal(folder)
    with pytest.raises(ValueError, match=message):
        checkpoint.inspect(folder)


def test_a_stage_does_not_start_from_noise(folder: Path) -> None:
    model = checkpoint.build(CONFIG)
    change, message = BAD["weights are noise"]
    change(folder)
    seal(folder)
    with pytest.raises(ValueError, match=message):
        checkpoint.initialise(model, folder)


@pytest.mark.parametrize("files", [None, [], {}, {"card.json": "0"}])
def test_a_seal_without_files(folder: Path, files: Any) -> None:
    edit("seal.json", "files", value=files)(folder)
    with pytest.raises(ValueError, match=r"seal\.json must have 'files' with a hash of each of model\.safetensors"):
        checkpoint.load(folder)
    edit("seal.json", "files", remove=True)(folder)
    with pytest.raises(ValueError, match=r"seal\.json must have 'files'"):
        checkpoint.inspect(folder)


def test_pretrained_counts_as_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    asked = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: asked.append(k["pretrained"]) or create(*a, **k))
    edit("config.json", *IMAGE, "pretrained", value=True)(folder)
    seal(folder)
    checkpoint.load(folder)
    assert asked
    assert not any(asked)


def test_constants_are_real_after_the_check(folder: Path) -> None:
    """Rotary frequencies aren't in the weights: a model made without memory must not be the one that is used."""
    model = checkpoint.load(folder).model
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    fresh = dict(checkpoint.build(CONFIG).named_buffers())
    constant = [name for name, _ in model.named_buffers() if name not in model.state_dict()]
    assert any("frequencies" in name for name in constant)
    assert all(torch.equal(dict(model.named_buffers())[name], fresh[name]) for name in constant)


def test_a_card_without_kind_is_a_demonstration(folder: Path) -> None:
    assert checkpoint.load(folder).card.kind == "trained"
    edit("card.json", "kind", remove=True)(folder)
    seal(folder)
    assert checkpoint.load(folder).card.kind == "demonstration"
    assert "Demonstration model" in checkpoint.inspect(folder)


def test_preprocessing_survives(folder: Path) -> None:
    assert checkpoint.load(folder).preprocessing == Preprocessing()
