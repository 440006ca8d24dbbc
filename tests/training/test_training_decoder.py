"""Decoders in training: an imported model that needs its folder no more, routers in every stage, hostile settings."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from test_model import make_batch, make_model

import mm
from mm import ontology
from mm.batch import Padded, Slots, Tokens, Writing
from mm.data.tokenizer import train_tokenizer
from mm.decoder.decoder import MoEDecoder
from mm.decoder.generate import Sampling
from mm.decoder.language import LanguageModel
from mm.decoder.language_config import LanguageConfig
from mm.decoder.latent import Latent
from mm.decoder.writing import WritingModel
from mm.training import checkpoint
from mm.training.checkpoint import Card
from mm.training.cli import main
from mm.training.experts import expert_visits
from mm.training.joint import JointTask
from mm.training.routing import BIAS_RATE

quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
TOKENIZER = train_tokenizer(["is it bright? yes", "no"], vocab_size=300)
SIZES = {"width": 16, "depth": 2, "heads": 2, "key_heads": 1, "head_width": 8, "hidden": 24, "context": 100_000}
CONFIG = LanguageConfig(vocab_size=300, **SIZES, end_ids=(11,))
EXPERTS = LanguageConfig(
    vocab_size=300, **SIZES, num_experts=4, expert_width=8, dense_layers=(0,), window=90_000,
    latent=Latent(rank=8, plain_width=8, turned_width=4, value_width=8),
)  # fmt: skip


def model_config(**decoder: Any) -> dict[str, Any]:
    return {
        "class_path": "mm.model.MultimodalModel",
        "init_args": {
            "embedding_width": 8,
            "fusion": {"class_path": "mm.fusion.alignment.CrossModalAlignment", "init_args": {"width": 16, "heads": 2}},
            "image": {
                "class_path": "mm.encoders.vit.ViTEncoder",
                "init_args": {"patch": 32, "width": 16, "depth": 1, "heads": 2, "token_grid": [2, 2]},
            },
            "decoder": {"class_path": "mm.decoder.writing.WritingModel", "init_args": {"memory_width": 16} | decoder},
        },
    }


@pytest.fixture
def words(tmp_path: Path) -> Callable[..., list[str]]:
    """A command line that trains a decoder on eight pictures and answers."""

    def make(**decoder: Any) -> list[str]:
        rows = []
        for number in range(8):
            pixels = np.full((32, 32), 250 * (number % 2), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
            answer = "yes" if number % 2 else "no"
            split = "train" if number < 6 else "val"
            rows.append({"image": f"{number}.png", "question": "is it bright?", "answer": answer, "split": split})
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        spec = {"kind": "jsonl", "name": "pictures", "root": ".", "index": "rows.jsonl", "image": {"column": "image"}}
        spec |= {"prompt": {"column": "question"}, "target": {"column": "answer"}, "split": {"column": "split"}}
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
        task = {"warmup_steps": 1, "cache": str(tmp_path / "cache"), "model": model_config(**decoder)}
        data = {"spec": str(tmp_path / "spec.yaml"), "root": str(tmp_path), "batch_size": 3, "workers": 0}
        trainer = {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, "logger": False}
        trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
        recipe = {
            "model": {"class_path": "WriteTask", "init_args": task},
            "data": data | {"vocab_size": 300},
            "trainer": trainer | {"default_root_dir": str(tmp_path / "run")},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return ["fit", "-c", str(tmp_path / "recipe.yaml")]

    return make


@quiet
def test_an_imported_decoder_trains_and_then_opens_without_its_folder(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "imported"
    folder.mkdir()
    TOKENIZER.save(folder / "tokenizer.json")
    model = LanguageModel(CONFIG)
    model.init_weights()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = []

    def read_decoder(path: str) -> tuple[LanguageModel, Path]:
        asked.append(Path(path))
        return model, Path(path) / "tokenizer.json"

    monkeypatch.setitem(sys.modules, "mm.decoder.folder", SimpleNamespace(read_decoder=read_decoder))
    assert main(words(folder=str(folder), reads="prefix")) == 0
    assert asked == [folder]
    shutil.rmtree(folder)
    checkpoint_folder = tmp_path / "run" / "checkpoint"
    assert str(folder) not in (checkpoint_folder / "config.json").read_text()
    made = mm.load(checkpoint_folder)
    assert made.tokenizer.encode("is it bright?") == TOKENIZER.encode("is it bright?")
    decoder = made.model.decoder
    assert isinstance(decoder, WritingModel)
    assert (decoder.config, decoder.reads) == (CONFIG, "prefix")
    after = decoder.language.state_dict()
    assert before.keys() == after.keys()
    moved = max(float((after[name] - value).abs().max()) for name, value in before.items())
    assert 0 < moved < 0.1  # it went on from there
    assert asked == [folder]


@quiet
def test_a_dense_language_model_trains_without_router_losses(words: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main(words(config={"vocab_size": 300, **SIZES}, every=2)) == 0
    made = mm.load(tmp_path / "run" / "checkpoint")
    scores = made.card.stages[-1]["scores"]
    assert np.isfinite(scores["val_loss_writing"])
    assert "val_loss_balance" not in scores
    assert "experts" not in made.card.stages[-1]


@quiet
def test_experts_of_a_language_model_are_watched(words: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main(words(config=asdict(EXPERTS) | {"dense_layers": [0], "end_ids": []}, reads="prefix")) == 0
    assert mm.load(tmp_path / "run" / "checkpoint").model.decoder.config == EXPERTS
    counts = expert_visits(tmp_path / "run" / "checkpoint")
    assert counts.shape == (1, 1 + len(ontology.CODES), 4)
    assert counts.sum() > 0


def test_the_joint_stage_takes_the_write_stage_s_losses_and_moves_the_bias_by_the_whole_step() -> None:
    decoder = {"width": 32, "depth": 1, "heads": 2, "num_experts": 4, "expert_width": 16, "shared_expert_width": 16}
    model = make_model(decoder=MoEDecoder(64, **decoder, gates="sigmoid_renormalised", selection_bias=True))
    task, said, loads = JointTask(model=model).train(), {}, []
    task._trainer = SimpleNamespace(global_step=0, strategy=SimpleNamespace(reduce=lambda load, reduce_op: load))
    task.log_dict = lambda numbers, **_: said.update(numbers)  # type: ignore[method-assign]
    (router,) = model.decoder.routers()
    router.register_forward_hook(lambda _, __, routing: loads.append(routing.load))
    task.on_train_start()
    for seed in (0, 1):  # two batches a step
        losses = task.losses((torch.arange(3), make_batch(seed=seed)))
        assert {"writing", "router_z"} <= losses.keys()
        assert "balance" not in losses
        assert (router.selection_bias == 0).all()
        task._trainer.global_step = seed
        task.on_train_batch_end(None, None, seed)
    load = torch.stack(loads).mean(0)
    torch.testing.assert_close(router.selection_bias, BIAS_RATE * (load.mean() - load).sign())
    assert said.keys() == {f"router_{name}" for name in ("load_variation", "dropped", "dead", "entropy")}


@pytest.mark.slow
@quiet
def test_the_joint_stage_watches_and_balances_like_the_write_stage(tmp_path: Path) -> None:
    recipe = yaml.safe_load(mm.shipped("train_tiny").read_text(encoding="utf-8"))
    decoder = recipe["model"]["init_args"]["model"]["init_args"]["decoder"]["init_args"]
    decoder |= {"selection_bias": True, "gates": "sigmoid_renormalised"}
    recipe["data"] |= {"train_studies": 4, "val_studies": 1, "batch_size": 1, "workers": 0, "tokenizer_studies": 9}
    recipe["trainer"] |= {"default_root_dir": str(tmp_path / "run"), "log_every_n_steps": 1, "precision": "32-true"}
    recipe["trainer"] |= {"accumulate_grad_batches": 2, "enable_progress_bar": False, "enable_model_summary": False}
    recipe["trainer"]["logger"]["init_args"] |= {"save_dir": str(tmp_path), "version": ""}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "-c", str(tmp_path / "recipe.yaml")]) == 0
    with next((tmp_path / "logs").rglob("metrics.csv")).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row.get("loss")]
    names = ("load_variation", "dropped", "dead", "entropy")
    assert len(steps) == 2
    assert all(np.isfinite(float(step[f"router_{name}"])) for step in steps for name in names)
    assert not steps[0].get("loss_balance")  # the bias keeps it
    folder = tmp_path / "run" / "checkpoint"
    made = mm.load(folder)
    assert np.isfinite(made.card.stages[-1]["scores"]["val_loss_writing"])
    bias = made.model.decoder.layers[0].experts.router.selection_bias
    torch.testing.assert_close(bias, (bias / BIAS_RATE).round() * BIAS_RATE)
    assert 0 < (bias / BIAS_RATE).round().abs().max() <= 2  # one a step of the optimizer, not one a batch
    counts = expert_visits(folder)
    assert counts.shape == (1, 1 + len(ontology.CODES), 4)
    assert counts[0, 1:].sum() > 0  # sentences about findings


class TestConfiguration:
    """A checkpoint's configuration may be anybody's."""

    @pytest.mark.parametrize("reads", ["prefix", "cross_attention"])
    @pytest.mark.parametrize("config", [CONFIG, EXPERTS], ids=["dense", "experts"])
    def test_it_makes_the_same_decoder_again(self, config: LanguageConfig, reads: str, tmp_path: Path) -> None:
        made = checkpoint.build(model_config(config=asdict(config), reads=reads))
        checkpoint.save(
            made, tmp_path / "c", config=model_config(config=asdict(config), reads=reads), tokenizer=TOKENIZER,
            card=Card("test"),
        )  # fmt: skip
        again = mm.load(tmp_path / "c").model
        assert again.decoder.config == config
        one = torch.zeros(1, dtype=torch.long)
        writing = Writing(one, Slots(one, one, one, one, one), Padded.of([[2, 4, 40]]), None)
        memory = Tokens(torch.randn(1, 3, 16), torch.ones(1, 3, dtype=torch.bool))
        checkpoint.weights(made.eval(), tmp_path / "c")  # rounded alike
        rows = [model.decoder.generate(writing, memory, sampling=Sampling(5)).rows() for model in (made, again)]
        assert rows[0] == rows[1]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"folder": "/etc"}, "give either config or folder, got neither"),
            ({"config": asdict(CONFIG) | {"vocab_size": 10**9}}, "vocab_size is 1000000000, and no weight is as large"),
            ({"config": asdict(CONFIG) | {"depth": 60_000}}, "far more than there are weights"),
            ({"config": asdict(CONFIG) | {"context": 2**40}}, "context is 1099511627776, and no weight"),
            ({"config": asdict(CONFIG) | {"width": 24}}, "weights do not fit the model"),
            ({"config": asdict(CONFIG) | {"heads": 0}}, "heads must be at least 1, got 0"),
            ({"config": asdict(CONFIG) | {"evil": 1}}, "evil"),
            ({"config": asdict(CONFIG), "memory_width": 24}, "decoder.memory_width must be the fusion's width 16"),
        ],
    )
    def test_sizes_are_compared_before_anything_is_made(self, change: dict[str, Any], message: str) -> None:
        good = checkpoint.build(model_config(config=asdict(CONFIG)))
        shapes = {name: tuple(tensor.shape) for name, tensor in good.state_dict().items()}
        checkpoint.build(model_config(config=asdict(CONFIG)), weights=shapes)
        with pytest.raises(ValueError, match=message):
            checkpoint.build(model_config(**change), weights=shapes)

    def test_a_vocabulary_too_large_for_the_decoder_is_refused(self) -> None:
        from mm.training.rebuild import check_vocabulary

        with pytest.raises(ValueError, match="the tokenizer has 301 ids, decoder has room for 300"):
            check_vocabulary(checkpoint.build(model_config(config=asdict(CONFIG))), 301)
