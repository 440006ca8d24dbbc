import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mm
from mm import ontology
from mm.data.tokenizer import Tokenizer, train_tokenizer
from mm.model import MultimodalModel
from mm.training import checkpoint
from mm.training.checkpoint import Card, Preprocessing

CONFIG: dict[str, Any] = {
    "class_path": "mm.model.MultimodalModel",
    "init_args": {
        "embedding_width": 8,
        "fusion": {"class_path": "mm.fusion.alignment.CrossModalAlignment", "init_args": {"width": 16, "heads": 2}},
        "record": {
            "class_path": "mm.encoders.record.RecordEncoder",
            "init_args": {"vocab_size": 300, "width": 16, "depth": 1, "heads": 2},
        },
        "text": {
            "class_path": "mm.encoders.text.TextEncoder",
            "init_args": {"vocab_size": 300, "width": 16, "depth": 1, "heads": 2, "context_length": 32},
        },
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["cough and fever"], vocab_size=300)


@pytest.fixture
def model() -> MultimodalModel:
    return checkpoint.build(CONFIG)


@pytest.fixture
def folder(model: MultimodalModel, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    checkpoint.save(model, tmp_path / "c", config=CONFIG, tokenizer=tokenizer, card=Card("test", "made for a test"))
    return tmp_path / "c"


def change_seal(folder: Path, **values: Any) -> None:
    seal = json.loads((folder / "seal.json").read_text())
    (folder / "seal.json").write_text(json.dumps(seal | values))


def test_what_is_saved_is_loaded(folder: Path, model: MultimodalModel, tokenizer: Tokenizer) -> None:
    loaded = mm.load(folder)
    assert not loaded.model.training
    assert loaded.card.name == loaded.identity.name == "test"
    assert loaded.preprocessing == Preprocessing()
    assert loaded.tokenizer.encode("cough 咳嗽") == tokenizer.encode("cough 咳嗽")
    for name, value in model.state_dict().items():
        expected = value.bfloat16().float() if value.ndim >= 2 else value
        assert torch.equal(loaded.model.state_dict()[name], expected), name


def test_the_same_content_has_the_same_hash(
    folder: Path, model: MultimodalModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    card = Card("test", "made for a test")
    again = checkpoint.save(model, tmp_path / "again", config=CONFIG, tokenizer=tokenizer, card=card)
    assert again == mm.load(folder).identity
    with torch.no_grad():
        next(model.parameters()).add_(1)
    other = checkpoint.save(model, tmp_path / "again", config=CONFIG, tokenizer=tokenizer, card=card)
    assert other != again
    assert mm.load(tmp_path / "again").identity == other
    assert sorted(item.name for item in tmp_path.iterdir()) == ["again", "c"]  # nothing half-written is left


def test_inspect_says_what_it_is(folder: Path) -> None:
    text = checkpoint.inspect(folder)
    for part in ("test@", "not for clinical use", "record", "128, 128", "RecordEncoder", "nodule"):
        assert part in text


def test_foreign_and_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'nowhere': no such folder, and no shipped checkpoint"):
        mm.load("nowhere")
    with pytest.raises(ValueError, match=r"no checkpoint folder, it has no seal\.json"):
        mm.load(tmp_path)


def test_another_format_or_ontology_is_refused(folder: Path) -> None:
    change_seal(folder, format=99)
    with pytest.raises(ValueError, match="format version 99; this version of mm reads 1"):
        mm.load(folder)
    change_seal(folder, format=checkpoint.FORMAT, ontology="0" * 64)
    with pytest.raises(ValueError, match=f"another list of findings.*{ontology.digest()[:12]}"):
        mm.load(folder)


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_a_changed_file_is_refused(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match=f"{name} is missing or was changed"):
        mm.load(folder)


def test_a_seal_changed_by_hand_is_refused(folder: Path) -> None:
    change_seal(folder, sha256="0" * 64)
    with pytest.raises(ValueError, match="changed by hand"):
        mm.load(folder)


def test_a_later_stage_starts_from_an_earlier_one(folder: Path, tokenizer: Tokenizer) -> None:
    more = json.loads(json.dumps(CONFIG))
    more["init_args"]["audio"] = {
        "class_path": "mm.encoders.wav2vec.Wav2VecEncoder",
        "init_args": {"width": 32, "depth": 1, "heads": 2, "hidden": 32},
    }
    larger = checkpoint.build(more)
    fresh = checkpoint.initialise(larger, folder)
    assert fresh
    assert all(name.startswith("audio") for name in fresh)
    kept = mm.load(folder).model.state_dict()
    assert all(torch.equal(larger.state_dict()[name], value) for name, value in kept.items())


def test_a_stage_that_has_no_place_for_a_weight_is_refused(folder: Path) -> None:
    less = json.loads(json.dumps(CONFIG))
    del less["init_args"]["text"]
    with pytest.raises(ValueError, match="weights that the model has no place for, such as text"):
        checkpoint.initialise(checkpoint.build(less), folder)
    other = json.loads(json.dumps(CONFIG))
    other["init_args"]["record"]["init_args"]["vocab_size"] = 310
    with pytest.raises(ValueError, match=r"record.word.weight is \(300, 16\), the model's is \(310, 16\)"):
        checkpoint.initialise(checkpoint.build(other), folder)


def test_a_configuration_imports_nothing_foreign() -> None:
    evil = json.loads(json.dumps(CONFIG))
    evil["init_args"]["record"]["class_path"] = "subprocess.Popen"
    with pytest.raises(ValueError, match=r"class 'subprocess\.Popen': subprocess is not among the packages"):
        checkpoint.build(evil)
    mistyped = json.loads(json.dumps(CONFIG))
    mistyped["init_args"]["record"]["init_args"]["wdth"] = 3
    with pytest.raises(ValueError, match="wdth"):
        checkpoint.build(mistyped)
