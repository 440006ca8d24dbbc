"""Every YAML that ships goes through the parser that the user's command would use."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

import mm
from mm.data.spec import PhantomSpec, load_spec
from mm.evaluation.evaluate import build as build_evaluation
from mm.pipeline.build import build_pipeline
from mm.training.cli import TASKS, VERBS, TrainingCLI, prepare

ROOT = Path(mm.__file__).parent.parent
PIPELINES = sorted(file.stem for file in (ROOT / "pipelines").glob("*.yaml"))
SPECS = sorted(file.stem for file in (ROOT / "data_specs").glob("*.yaml"))
TRAIN = [name for name in PIPELINES if name.startswith("train_")]
REPORT = [name for name in PIPELINES if name.startswith("report")]
EVAL = [name for name in PIPELINES if name.startswith("eval_")]


class Parsed(TrainingCLI):
    """Stops behind the parser: nothing is made."""

    def instantiate_classes(self) -> None:
        self.model, self.datamodule = None, None


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that leaves something behind leaves it here; its relative paths lead nowhere."""
    monkeypatch.chdir(tmp_path)


def recipe(name: str) -> dict[str, Any]:
    content = yaml.safe_load(mm.shipped(name).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def test_there_is_nothing_else() -> None:
    assert sorted(TRAIN + REPORT + EVAL) == PIPELINES
    assert PIPELINES
    assert SPECS


@pytest.mark.parametrize("name", SPECS)
def test_data_specs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_DATA", str(tmp_path))
    given = yaml.safe_load((ROOT / "data_specs" / f"{name}.yaml").read_text(encoding="utf-8"))
    if "root" in given:
        Path(os.path.expandvars(given["root"])).mkdir(parents=True)
    spec = load_spec(name)
    assert spec.name == name
    if isinstance(spec, PhantomSpec):
        seeds = [spec.train.seed, spec.val.seed, spec.test.seed]
        assert len(set(seeds)) == len(seeds)  # or the splits would share patients


@pytest.mark.parametrize(
    ("name", "verb"), [*((name, "fit") for name in TRAIN), *(("train_tiny", v) for v in VERBS[1:])]
)
def test_training_recipes_parse(name: str, verb: str) -> None:
    words, _ = prepare([verb, "-c", name])
    cli = Parsed.make(words)
    config = cli.config[verb]
    assert config.model.class_path.rpartition(".")[2] in {task.__name__ for task in TASKS}
    given = recipe(name)
    assert config.data.spec == given["data"]["spec"] in SPECS
    assert config.trainer.max_epochs == given["trainer"]["max_epochs"]
    assert list(Path().iterdir()) == []


# The others want weights that docs/towers.md says how to come by.
MADE_HERE = [name for name in TRAIN if "digits" in name or name.endswith(("_phantom", "_tiny"))]


@pytest.mark.parametrize("name", MADE_HERE)
def test_training_recipes_make_their_task(
    name: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recipe(name)["data"]["spec"] == "fsdd":  # recordings that are none: only their names are read here
        monkeypatch.setenv("MM_DATA", str(tmp_path / "data"))
        (tmp_path / "data/audio/fsdd").mkdir(parents=True)
        for take in range(50):
            (tmp_path / f"data/audio/fsdd/7_theo_{take}.flac").touch()
    words, _ = prepare(["fit", "-c", name, "--data.tokenizer", str(tiny_checkpoint)])
    if "init_from" in recipe(name)["model"]["init_args"]:
        words += ["--model.init_args.init_from", str(tiny_checkpoint)]  # in the place of a stage that hasn't run
    cli = TrainingCLI.make(words)
    cli.check()
    frozen = recipe(name)["model"]["init_args"].get("freeze", [])
    made = {part for part, _ in cli.model.model.named_modules()}
    unfrozen = recipe(name)["model"]["init_args"].get("unfreeze", [])
    expected = (set(type(cli.model).trains) & made) - set(frozen) | set(unfrozen)
    assert set(cli.model.learning) == expected
    # Those are of models of sounds and words alone, and of volumes with statistics, which the tiny model hasn't.
    if "digits" not in name and name != "train_small_phantom":
        assert set(type(cli.model).trains) <= made  # nothing it would train is missing


def test_recipes_on_photographs_take_their_weights_from_one_place() -> None:
    """Those that docs/towers.md says how to come by."""
    for name in ("train_flickr8k", "train_medpix"):
        task = recipe(name)["model"]["init_args"]
        parts = task["model"]["init_args"]
        towers = [*parts["image"]["init_args"]["encoders"], parts["text"]]
        assert all(tower["init_args"]["weights"].startswith("weights/") for tower in towers)


def test_questions_with_and_without_images_are_the_same_recipe() -> None:
    """The baseline differs in nothing but the image and what hangs on it."""
    seen, blind = (recipe(name) for name in ("train_vqa_rad", "train_vqa_rad_question"))
    task, other = seen["model"]["init_args"], blind["model"]["init_args"]
    parts, fewer = task["model"]["init_args"], other["model"]["init_args"]
    aligned = recipe("train_align_medpix")
    assert {name: parts[name] for name in ("fusion", "image", "text")} == {
        name: aligned["model"]["init_args"]["model"]["init_args"][name] for name in ("fusion", "image", "text")
    }
    del parts["image"], parts["answers"]["init_args"]["image_width"]
    assert fewer == parts
    own = {"init_from", "unfreeze", "name", "description", "model"}
    assert {key: task[key] for key in set(task) - own} == {key: other[key] for key in set(other) - own - {"cache"}}
    assert {**seen["data"], "inputs": []} == blind["data"]


def test_stages_follow_each_other() -> None:
    """Each stage starts where the one before writes, and the first of them makes all parts."""
    folders = []
    for name in ("xray", "sound", "findings", "mirror", "small", "reading", "history", "align", "report"):
        content = recipe(f"train_{name}_phantom")
        start = content["model"]["init_args"].get("init_from")
        assert start == (folders[-1] if folders else None)
        folders.append(content["trainer"]["default_root_dir"] + "/checkpoint")


def test_the_default_model_is_small() -> None:
    words, _ = prepare(["fit", "-c", "train_xray_phantom"])
    model = TrainingCLI.make(words).model.model
    parts = ("volume", "image", "audio", "record", "text", "findings", "decoder")
    assert all(getattr(model, part) is not None for part in parts)
    assert sum(item.numel() for item in model.parameters()) <= 9_000_000


@pytest.mark.parametrize("name", REPORT)
def test_report_pipelines(name: str) -> None:
    built = build_pipeline(name)
    assert built.generate.checkpoint == "default"
    assert built.pipeline.wanted()


@pytest.mark.parametrize("name", EVAL)
def test_evaluations(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_DATA", str(tmp_path))  # a data spec asks for its root and reads nothing of it
    for folder in ("audio/fsdd", "iu_xray_reports"):
        (tmp_path / folder).mkdir(parents=True)
    made = build_evaluation(mm.shipped(name))
    options = recipe(name)["evaluation"]["init_args"]
    assert {key: getattr(made, key) for key in options if key != "spec"} == {
        key: value for key, value in options.items() if key != "spec"
    }
