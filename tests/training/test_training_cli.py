import csv
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

import mm
from mm import ontology
from mm.batch import SLOT_KINDS
from mm.cli import main as command
from mm.data.spec import describe, load_spec
from mm.training.cache import key
from mm.training.checkpoint import Card, find
from mm.training.cli import TrainingCLI, main, prepare
from mm.training.experts import by_modality, expert_visits
from mm.training.precision import affordable
from mm.training.routing import BIAS_RATE
from mm.training.write import questions

RECIPE = """
seed_everything: 0
model:
  class_path: WriteTask
  init_args:
    learning_rate: 3.0e-3
    warmup_steps: 2
    name: pictures
    model:
      class_path: mm.model.MultimodalModel
      init_args:
        embedding_width: 8
        fusion: {class_path: mm.fusion.alignment.CrossModalAlignment, init_args: {width: 16, heads: 2}}
        image:
          class_path: mm.encoders.vit.ViTEncoder
          init_args: {patch: 32, width: 16, depth: 1, heads: 2, token_grid: [2, 2]}
        decoder:
          class_path: mm.decoder.decoder.MoEDecoder
          init_args:
            vocab_size: 300
            width: 16
            depth: 1
            heads: 2
            num_experts: 4
            expert_width: 8
            shared_expert_width: 8
data: {batch_size: 4, workers: 0, vocab_size: 300}
trainer:
  accelerator: cpu
  max_epochs: 2
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  logger: false
"""
SPEC = """
kind: jsonl
name: pictures
root: .
index: rows.jsonl
image: {column: image}
prompt: {column: question}
target: {column: answer}
split: {column: split}
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A command line that trains on twelve pictures in a second."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(12):
        pixels = generator.integers(0, 255, (32, 32), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        split = "train" if number < 8 else "val" if number < 10 else "test"
        row = {"image": f"{number}.png", "question": "is it bright?", "answer": "yes", "split": split}
        rows.append(row)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "spec.yaml").write_text(SPEC)
    recipe = yaml.safe_load(RECIPE)
    recipe["model"]["init_args"]["cache"] = str(tmp_path / "cache")
    recipe["data"] |= {"spec": str(tmp_path / "spec.yaml"), "root": str(tmp_path)}
    recipe["trainer"]["default_root_dir"] = str(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["-c", str(tmp_path / "recipe.yaml")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_recipe_trains_caches_exports_and_goes_on(
    words: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert main(["fit", *words]) == 0
    folder = tmp_path / "run" / "checkpoint"
    first = mm.load(folder)
    assert first.card.stages[0]["steps"] == 4
    assert first.card.stages[0]["data"]["name"] == "pictures"
    assert str(tmp_path) not in json.dumps(first.card.stages)  # the machine's paths are nobody's business
    assert (tmp_path / "run" / "resume" / "last.ckpt").is_file()
    caches = {file.parent.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(caches) == 2  # train and val

    assert main(["fit", *words, "--ckpt_path", "last", "--trainer.max_epochs", "4"]) == 0
    again = mm.load(folder)
    assert again.card.stages[0]["steps"] == 8
    assert again.identity != first.identity
    after = {file.parent.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert after == caches  # frozen encoders, same cache

    # The next stage builds the same model from the folder; what it doesn't train stays bit by bit.
    next_stage = ["--model.init_args.model", "null", "--model.init_args.init_from", str(folder)]
    assert main(["fit", *words, *next_stage, "--trainer.default_root_dir", str(tmp_path / "next")]) == 0
    last = mm.load(tmp_path / "next" / "checkpoint")
    assert [stage["steps"] for stage in last.card.stages] == [8, 4]
    for name, value in last.model.state_dict().items():
        frozen = name.split(".")[0] not in ("fusion", "decoder")
        if frozen:
            assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--trainer.max_epoch", "3"], "did you mean max_epochs"),
        (["--model.init_args.learning_rte", "3"], "Option 'learning_rte' is not accepted; did you mean learning_rate"),
        (["--data.batch_size", "0"], "data.batch_size must be at least 1, got 0"),
        (["--data.batch_size", "many"], "data.batch_size: Expected a <class 'int'>"),
        (
            ["--model.init_args.model.init_args.decoder.init_args.vocab_size", "270"],
            "decoder has room for 270: give both the same vocab_size",
        ),
        (["--data.spec", "nix"], "no shipped YAML 'nix'"),
        (["--model.init_args.init_from", "nowhere"], "checkpoint 'nowhere': no such folder"),
        (["--model.init_args.freeze", "[nix]"], "freeze names parts of the model"),
        (["--model.init_args.model", "null"], "give `model`"),
        (["--model.class_path", "subprocess.Popen"], "if you trust it: --trust subprocess"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], extra: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["fit", *words, *extra]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert said.startswith("mm fit: ")
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "/data/runs"), "mm fit: no right to write or read /data/runs"),
        (ValueError("row 3 has\nno column"), "mm fit: row 3 has no column"),
    ],
)
def test_a_run_that_fails_is_one_line(
    words: list[str],
    error: Exception,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_: TrainingCLI) -> None:
        raise error

    monkeypatch.setattr(TrainingCLI, "run", fails)
    assert main(["fit", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(message)
    assert "\n" not in said


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        change(row)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_validation_is_looked_at_before_training(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(tmp_path, lambda row: row.update(split="train" if row["split"] == "val" else row["split"]))
    assert main(["fit", *words]) == 2
    assert "no row of the index belongs to split 'val'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_patient_in_two_splits_is_told_before_training(
    words: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed(tmp_path, lambda row: row.update(patient="one"))
    with (tmp_path / "spec.yaml").open("a") as file:
        file.write("group: {column: patient}\n")
    TrainingCLI.make(["fit", "--config", words[1]]).check()
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(line.startswith("leak: 1 of the 1 groups of val are in train too (") for line in told)


def test_an_index_that_changes_is_encoded_anew(words: list[str], tmp_path: Path) -> None:
    cli = TrainingCLI.make(["fit", "--config", words[1]])

    def made() -> str:
        return key(cli.model.model, cli.datamodule, "train")

    before = made()
    assert made() == before
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("bright", "dark"))
    assert made() != before
    (tmp_path / "rows.jsonl").write_text(rows)
    assert made() == before


def test_a_demonstration_that_learns_from_real_data_is_none_any_more(words: list[str]) -> None:
    task = TrainingCLI.make(["fit", "--config", words[1]]).model
    phantoms = {"data": describe(load_spec("phantom"))}
    pictures = {"data": {"name": "pictures", "index": "rows.jsonl"}}
    assert task._kind((phantoms,)) == "trained"  # neither said nor inherited
    task.earlier = Card("earlier", kind="demonstration")
    assert task._kind((phantoms, phantoms)) == "demonstration"
    assert task._kind((phantoms, pictures)) == "trained"
    assert task._kind((pictures, phantoms)) == "trained"
    task.card_kind = "demonstration"
    assert task._kind((pictures,)) == "demonstration"


@pytest.mark.parametrize("part", ["image", "decoder"])
def test_a_part_is_taken_away_by_null(words: list[str], part: str) -> None:
    given = ["fit", "--config", words[1]]
    assert getattr(TrainingCLI.make(given).model.model, part) is not None
    task = TrainingCLI.make([*given, f"--model.init_args.model.init_args.{part}", "null"]).model
    assert getattr(task.model, part) is None
    assert task.model_config["init_args"][part] is None


def test_an_unknown_recipe_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "train_nix"]) == 2
    assert "shipped: " in capsys.readouterr().err


def test_trust_comes_from_the_command_line_only() -> None:
    words, trust = prepare(["fit", "-c", "train_tiny", "--trust", "mine", "--trust=yours", "--data.seed=3"])
    assert trust == ["mine", "yours"]
    assert words[0] == "fit"
    assert words[1] == "--config"
    assert Path(words[2]).is_file()
    assert words[3:] == ["--data.seed=3"]
    with pytest.raises(ValueError, match="--trust takes a package"):
        prepare(["fit", "--trust"])


def test_questions_are_told_from_sentences() -> None:
    from mm.batch import Padded, Slots, Writing

    kind = torch.tensor([0, SLOT_KINDS.index("answer")])
    none = torch.zeros(2, dtype=torch.long)
    rows = Padded.of([[1, 2], [3]])
    asked = questions(Writing(torch.tensor([0, 1]), Slots(kind, none, none, none, none), rows, rows))
    assert asked is not None
    assert asked.study.tolist() == [1]
    assert asked.prompt.lengths.tolist() == [1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_router_is_logged_every_step_balanced_by_its_bias_and_drawn(words: list[str], tmp_path: Path) -> None:
    recipe = yaml.safe_load(Path(words[1]).read_text())
    recipe["model"]["init_args"]["model"]["init_args"]["decoder"]["init_args"] |= {
        "selection_bias": True,
        "gates": "sigmoid_renormalised",
    }
    recipe["trainer"] |= {
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(tmp_path), "name": "log", "version": ""},
        },
        "log_every_n_steps": 1,
        "accumulate_grad_batches": 2,
    }
    Path(words[1]).write_text(yaml.safe_dump(recipe))
    assert main(["fit", *words]) == 0
    with next((tmp_path / "log").rglob("metrics.csv")).open(encoding="utf-8") as file:
        steps = [row for row in csv.DictReader(file) if row.get("loss")]
    names = ("load_variation", "dropped", "dead", "entropy")
    assert len(steps) == 2
    assert all(np.isfinite(float(step[f"router_{name}"])) for step in steps for name in names)
    assert 0.9 < float(steps[0]["router_entropy"]) <= 1.0001
    assert not steps[0].get("loss_balance")  # the bias keeps it

    folder = tmp_path / "run" / "checkpoint"
    model = mm.load(folder)
    bias = model.model.decoder.layers[0].experts.router.selection_bias
    steps_of_rate = (bias / BIAS_RATE).round()
    torch.testing.assert_close(bias, steps_of_rate * BIAS_RATE)
    assert 0 < steps_of_rate.abs().max() <= 2  # one a step of the optimizer, not one a batch
    counts = expert_visits(folder)
    assert counts.shape == (1, 1 + len(ontology.CODES), 4)
    assert counts[0, 0].sum() > 0
    assert counts[0, 1:].sum() == 0  # these questions name no finding
    with pytest.raises(SystemExit) as done:
        command(["inspect", str(folder), "--experts", str(tmp_path / "experts.png")])
    assert done.value.code == 0
    with PIL.Image.open(tmp_path / "experts.png") as picture:
        assert min(picture.size) > 100


def test_modalities_share_the_visits_of_the_findings_they_show() -> None:
    counts = torch.zeros(2, 1 + len(ontology.CODES), 3, dtype=torch.long)
    counts[0, 0] = 100  # about nothing: of no modality
    for place, finding in enumerate(ontology.FINDINGS):
        counts[1, 1 + place, 2] = len(finding.sources)
    got = by_modality(counts)
    assert got[0].sum() == 0
    expected = [
        sum(len(finding.sources) for finding in ontology.FINDINGS if source in finding.sources)
        for source in ("volume", "image", "audio", "record")
    ]
    assert got[1, :, 2].tolist() == expected


def test_a_checkpoint_without_counts_says_so(tmp_path: Path) -> None:
    assert int(expert_visits("default").sum()) > 0
    folder = shutil.copytree(find("default"), tmp_path / "uncounted")
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    for stage in card["stages"]:
        stage.pop("experts", None)
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(ValueError, match="keeps no counts of experts"):
        expert_visits(folder)


def test_bfloat16_is_asked_of_processors_that_have_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert affordable("bf16-mixed", accelerator="cpu") == "bf16-mixed"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert affordable("bf16-mixed", accelerator="cpu") == "32-true"
    assert affordable("bf16-mixed", accelerator="cuda") == "bf16-mixed"
    assert affordable("32-true", accelerator="cpu") == "32-true"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert affordable("bf16-mixed", accelerator="auto") == "bf16-mixed"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert affordable("bf16-mixed", accelerator="auto") == "32-true"
