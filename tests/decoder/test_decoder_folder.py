"""The sealed folder of a language model: the round trip, and every way in which it may be wrong."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm.decoder.folder import read_decoder, write_decoder
from mm.decoder.language import LanguageModel
from mm.decoder.language_config import LanguageConfig
from mm.decoder.latent import Latent
from mm.decoder.settings import entries_of, settings_from

PLAIN = LanguageConfig(
    vocab_size=40, width=32, depth=2, heads=4, key_heads=2, head_width=8, hidden=48, context=64, end_ids=(1, 12)
)
CASES = {
    "plain": PLAIN,
    "tied, with a window": replace(PLAIN, tied=True, window=7, norm="head"),
    "experts": replace(PLAIN, num_experts=4, expert_width=16, dense_layers=(0,), gates="softmax"),
    "latent": replace(PLAIN, latent=Latent(rank=16, plain_width=8, turned_width=4, value_width=8, query_rank=12)),
}


class Words:
    """As much of a tokenizer as the folder knows."""

    vocab_size = 39

    def save(self, path: Path) -> None:
        path.write_text("words")


def model_of(config: LanguageConfig) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(config)
    model.init_weights(std=0.2)
    return model.eval()


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_survives_the_round_trip(config: LanguageConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(config).to(dtype)
    write_decoder(model, Words(), tmp_path / "deep" / "decoder")
    again, vocabulary = read_decoder(tmp_path / "deep" / "decoder")
    assert again.config == config
    assert not again.training
    assert vocabulary.read_text() == "words"
    found, expected = again.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == dtype for name in expected)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["decoder"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_decoder(model_of(PLAIN), Words(), tmp_path / "decoder")
    return tmp_path / "decoder"


def reseal(folder: Path, **entries: Any) -> None:
    """As somebody would who means to deceive."""
    content = json.loads((folder / "config.json").read_text()) | entries
    content.pop("seal")
    content["files"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "tokenizer.json")
    }
    content["seal"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "config.json").write_text(json.dumps(content))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        read_decoder(folder)
    assert "decoder'" in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_changed_file_is_named(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    refused(folder, rf"{name} was changed after it was sealed")
    (folder / name).unlink()
    with pytest.raises(OSError, match=name):
        read_decoder(folder)


def test_a_changed_configuration_is_refused(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["config"]["rotary_base"] = 5e5
    (folder / "config.json").write_text(json.dumps(content))
    refused(folder, r"config\.json was changed by hand")


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"format": "llama"}, "not of the format 'mm decoder': `mm import-decoder` makes such a folder"),
        ({"version": 2}, "format version 2; this version of mm reads 1"),
        ({"config": []}, r"config must be an object, got \[\]"),
    ],
)
def test_other_formats_are_refused(folder: Path, entries: dict[str, Any], match: str) -> None:
    reseal(folder, **entries)
    refused(folder, match)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"magic": 1}, r"config\.magic: unknown; known are vocab_size, width"),
        ({"width": None}, r"config\.width must be a int, got None"),
        ({"width": True}, r"config\.width must be a int, got True"),
        ({"width": 10**30}, r"config\.width must be a int"),
        ({"width": 64}, r"embedding.weight must have the shape \[40, 64\], got \[40, 32\]"),
        ({"width": 2**40, "vocab_size": 2**40}, "tensors that are too large"),
        ({"depth": 10**9}, "depth 1000000000 asks for more tensors than the 21"),
        ({"depth": 3}, r"doesn't hold the tensors of config\.json: missing layers\.2\.attention\.k\.weight"),
        ({"depth": 1}, r"unknown layers\.1"),
        ({"heads": 3}, r"config: key_heads must divide heads"),
        ({"norm": "some"}, r"config\.norm must be one of none, head, all, got 'some'"),
        ({"norm_eps": "small"}, r"config\.norm_eps must be a float"),
        ({"rotary_base": float("nan")}, r"config\.rotary_base must be a float"),
        ({"end_ids": 3}, r"config\.end_ids must be a list"),
        ({"end_ids": ["x"]}, r"config\.end_ids must be a int"),
        ({"latent": {"rank": 4}}, r"config\.latent\.plain_width is missing"),
        ({"latent": 4}, r"config\.latent must be an object"),
    ],
)
def test_a_configuration_that_is_wrong_is_named(folder: Path, entries: dict[str, Any], match: str) -> None:
    config = json.loads((folder / "config.json").read_text())["config"]
    reseal(folder, config=config | entries)
    refused(folder, match)


def test_weights_of_other_names_and_types_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"norm.weight": weights["norm.weight"].to(torch.int32)}, folder / "model.safetensors")
    reseal(folder)
    refused(folder, r"norm\.weight must be of BF16, F16, F32, got I32")
    (folder / "model.safetensors").write_bytes(b"\x80\x04K\x01.")
    reseal(folder)
    refused(folder, r"model\.safetensors: not a safetensors file")


def test_nothing_that_stands_there_is_overwritten(folder: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match=r"decoder' must be a new or empty folder"):
        write_decoder(model_of(PLAIN), Words(), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    small = model_of(replace(PLAIN, vocab_size=38))
    with pytest.raises(ValueError, match="the tokenizer has 39 ids, the model room for 38"):
        write_decoder(small, Words(), tmp_path / "small")
    assert not (tmp_path / "small").exists()
    (tmp_path / "empty").mkdir()
    write_decoder(model_of(PLAIN), Words(), tmp_path / "empty")
    assert read_decoder(tmp_path / "empty")[0].config == PLAIN


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Broken(Words):
        def save(self, path: Path) -> None:
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_decoder(model_of(PLAIN), Broken(), tmp_path / "decoder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_settings_survive_json(config: LanguageConfig) -> None:
    assert settings_from(json.loads(json.dumps(entries_of(config))), LanguageConfig, where="config") == config
