"""The real model, tiny and untrained, behind the real stages."""

from pathlib import Path

import pytest
import torch
import yaml

import mm
import mm.ontology
from mm.data.tokenizer import train_tokenizer
from mm.pipeline.run import run_report
from mm.report.json import read_report
from mm.training.checkpoint import Card, build, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    recipe = yaml.safe_load(mm.shipped("train_tiny").read_text())
    config = recipe["model"]["init_args"]["model"]
    words = train_tokenizer(["There is a nodule of the left lung. 左肺结节。 " * 4], vocab_size=512)
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save(build(config), folder, config=config, tokenizer=words, card=Card("tiny", "Untrained."))
    return folder


def test_same_bytes_twice_and_honest_about_itself(studies, checkpoint, tmp_path):
    studies.beside(studies.ct(1, 1))
    studies.dx(1, 1)
    studies.ct(1, 2, days=30)
    out = tmp_path / "out"

    def run() -> dict[str, bytes]:
        with (tmp_path / "lines").open("w") as stream:
            assert run_report(studies.root, out, checkpoint=str(checkpoint), stream=stream) == 0
        return {path.parent.name + path.name: path.read_bytes() for path in out.glob("*/report.*")}

    first = run()
    assert len(first) == 6
    for path in out.glob("*/report.*"):
        path.unlink()
    for path in out.glob("*/fingerprint"):
        path.unlink()
    assert run() == first
    report = next(
        found for found in (read_report(path.parent) for path in out.glob("*/report.json")) if len(found.series) == 3
    )
    assert report.model.name == "tiny"
    assert len(report.model.sha256) == 64
    assert [row.used for row in report.inputs] == [True] * 5
    assert {item.code for item in report.findings} == set(mm.ontology.CODES)
    for sentence in report.sentences:
        assert "<size>" not in sentence.text
        assert sentence.text.isprintable()


def test_a_folder_that_is_no_checkpoint(studies, tmp_path):
    studies.ct(1, 1)
    with pytest.raises(ValueError, match=r"no checkpoint folder, it has no seal\.json"):
        run_report(studies.root, tmp_path / "out", checkpoint=str(tmp_path))
    assert not (tmp_path / "out").exists()
