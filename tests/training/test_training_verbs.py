"""validate, test and predict on a finished checkpoint folder, tiny and untrained."""

import json
import logging
from pathlib import Path

import pytest
import torch

import mm
from mm import ontology
from mm.data.collate import collate
from mm.data.readers import open_split
from mm.data.spec import load_spec
from mm.training.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

CHEAP = "[image,audio,record]"


def words(verb: str, stage: str, checkpoint: Path, folder: Path, *, inputs: str = CHEAP) -> list[str]:
    recipe = [verb, "-c", f"train_{stage}_phantom", "--model.init_args.init_from", str(checkpoint)]
    if stage == "findings":
        recipe += ["--model.init_args.model", "null"]
    else:
        recipe += ["--model.init_args.cache", str(folder / "cache")]
    settings = {
        "data.inputs": inputs, "data.val_studies": "2", "data.test_studies": "3", "data.workers": "0",
        "trainer.accelerator": "cpu", "trainer.precision": "32-true", "trainer.logger": "false",
        "trainer.enable_progress_bar": "false", "trainer.default_root_dir": str(folder / "run"),
    }  # fmt: skip
    return [*recipe, *(word for name, value in settings.items() for word in (f"--{name}", value))]


@pytest.mark.parametrize("stage", ["findings", "align", "report"])
@pytest.mark.parametrize(("verb", "split", "studies"), [("validate", "val", 2), ("test", "test", 3)])
def test_a_folder_is_scored(
    stage: str,
    verb: str,
    split: str,
    studies: int,
    tiny_checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    assert main(words(verb, stage, tiny_checkpoint, tmp_path)) == 0
    told = capsys.readouterr().out
    assert f"{split}_loss" in told
    assert ("test_" if split == "val" else "val_") not in told
    assert "step 0" in caplog.text
    assert not (tmp_path / "run" / "checkpoint").exists()  # only `fit` writes one
    if stage == "findings":
        assert f"{studies} studies" in caplog.text
    else:
        assert f"encoding studies 0 to {studies} of split {split}" in caplog.text


@pytest.mark.parametrize(("stage", "inputs"), [("findings", "[volume,image,audio,record]"), ("report", CHEAP)])
def test_predict_writes_the_findings_of_the_test_split(
    stage: str, inputs: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert main(words("predict", stage, tiny_checkpoint, tmp_path, inputs=inputs)) == 0
    lines = (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["study"] for row in rows] == [0, 1, 2]
    assert not (tmp_path / "cache").exists()

    loaded, spec = mm.load(tiny_checkpoint), load_spec("phantom")
    studies = open_split(spec, "test", inputs=tuple(inputs.strip("[]").split(",")), studies=3)
    batch = collate([studies[index] for index in range(3)], loaded.tokenizer)
    with torch.no_grad():
        expected = loaded.model.findings.decode(loaded.model.find(loaded.model.encode(batch)))
    for row, findings in zip(rows, expected, strict=True):
        assert {item["code"] for item in row["findings"]} == set(ontology.CODES)
        assert [item["code"] for item in row["findings"]] == [item.code for item in findings]
        assert [item["present"] for item in row["findings"]] == [item.present for item in findings]
        probabilities = [item["probability"] for item in row["findings"]]
        assert probabilities == pytest.approx([item.probability for item in findings], abs=1e-4)
