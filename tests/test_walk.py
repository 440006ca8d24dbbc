"""The whole road on phantom patients with a tiny, untrained model: files to reports, and the evaluations."""

import csv
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL.Image
import pytest
import torch

import mm
from mm import ontology
from mm.batch import Modality, Sample
from mm.data.collate import collate
from mm.data.record import parse_record
from mm.data.tokenizer import PLACEHOLDERS
from mm.decoder.generate import Sampling
from mm.dicom.scan import scan
from mm.dicom.volume import read_volume
from mm.evaluation.evaluate import run_evaluation
from mm.phantom.dataset import PhantomDataset
from mm.phantom.write import write_studies
from mm.pipeline.run import run_report
from mm.report.json import read_report, to_json
from mm.report.schema import Report
from mm.training.checkpoint import Loaded

SEED = 1
"""Of two patients, the first with one prior: three studies on disk."""
MODALITIES: tuple[Modality, ...] = ("volume", "image", "audio", "record")


@dataclass(frozen=True)
class Walk:
    """What the first run read and wrote."""

    root: Path
    current: tuple[str, ...]
    out: Path
    code: int
    lines: list[dict[str, Any]]

    def keys(self) -> dict[str, str]:
        """Pseudonym by true UID, studies and instances."""
        with (self.out / "private" / "map.csv").open(newline="", encoding="utf-8") as file:
            return {row["uid"]: row["key"] for row in csv.DictReader(file)}

    def report(self, uid: str) -> Report:
        return read_report(self.out / self.keys()[uid])


def report(root: Path, out: Path, checkpoint: Path) -> tuple[int, list[dict[str, Any]]]:
    told = out.parent / "told.jsonl"
    with told.open("w", encoding="utf-8") as stream:
        code = run_report(root / "studies", out, checkpoint=str(checkpoint), stream=stream)
    return code, [json.loads(line) for line in told.read_text(encoding="utf-8").splitlines()]


def written(out: Path) -> dict[str, bytes]:
    """The reports, byte by byte."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("*/report.*"))}


def strict(path: Path) -> Any:
    """JSON without NaN, which other readers refuse."""

    def refuse(name: str) -> NoReturn:
        raise AssertionError(f"{path.name} holds {name}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture(scope="session")
def walk(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Walk:
    root, out = tmp_path_factory.mktemp("phantoms"), tmp_path_factory.mktemp("walk") / "reports"
    current = write_studies(root, studies=2, seed=SEED)
    code, lines = report(root, out, tiny_checkpoint)
    return Walk(root, current, out, code, lines)


@pytest.fixture(scope="session")
def loaded(tiny_checkpoint: Path) -> Loaded:
    return mm.load(tiny_checkpoint)


@pytest.fixture(scope="session")
def samples() -> tuple[Sample, ...]:
    patients = PhantomDataset(studies=3, seed=SEED, split="test")
    return tuple(patients[index] for index in range(3))


# ----------------------------------------------------------------------------------------------- reports


def test_every_study_has_its_report(walk: Walk) -> None:
    assert walk.code == 0
    assert walk.lines[-1] == {"event": "end", "done": 3, "failed": 0, "skipped": 0}
    rows = [json.loads(line) for line in (walk.out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    folders = {path.parent.name for path in walk.out.glob("*/report.json")}
    assert {row["study"] for row in rows} == folders == {walk.keys()[path.name] for path in studies(walk)}
    assert {row["status"] for row in rows} == {"done"}
    for name in folders:
        assert {path.name for path in (walk.out / name).iterdir()} == {
            "report.json", "report.md", "report.html", "fingerprint",
        }  # fmt: skip
    assert sorted(path.name for path in walk.out.iterdir() if path.name not in folders) == ["manifest.jsonl", "private"]


def studies(walk: Walk) -> list[Path]:
    return sorted((walk.root / "studies").iterdir())


def test_the_fields_of_report_json(walk: Walk, loaded: Loaded) -> None:
    keys = walk.keys()
    for uid in walk.current:
        path = walk.out / keys[uid] / "report.json"
        content = strict(path)
        assert to_json(read_report(path.parent)) == path.read_text(encoding="utf-8")
        assert content["study"] == keys[uid]
        assert content["model"]["sha256"] == loaded.identity.sha256
        assert (content["model"]["kind"], content["model"]["domain"]) == ("demonstration", "inside")
        volume = content["series"][0]
        assert (volume["role"], volume["modality"], volume["units"]) == ("volume", "CT", "HU")
        assert volume["num_slices"] == len(list((walk.root / "studies" / uid).glob("ct_*.dcm")))
        assert len(volume["spacing_mm"]) == 3
        truth = strict(walk.root / "truth" / uid / "findings.json")
        names = {"code", "present", "probability", "side", "center_mm", "size_mm", "change", "sop_instance_uid"}
        assert names <= set(content["findings"][0])
        assert names <= set(truth["findings"][0])
        assert {item["code"] for item in content["findings"]} == set(ontology.CODES)
        about = {item["finding"] for item in content["sentences"]} - {None}
        assert {content["findings"][index]["code"] for index in about} >= {"nodule", "effusion", "infection"}
        # What an untrained decoder draws can hold a "<" of its own, but no placeholder that wasn't filled.
        assert not any(name in item["text"] for name in PLACEHOLDERS for item in content["sentences"])
        assert {item["language"] for item in content["sentences"]} == {"en", "zh"}


def test_a_finding_lies_on_the_slice_that_it_names(walk: Walk) -> None:
    keys = walk.keys()
    found = {study.study_instance_uid: study for study in scan(walk.root / "studies").studies}
    for uid in walk.current:
        volume = read_volume(next(item for item in found[uid].series if item.kind == "volume"))
        slices = {keys[item]: index for index, item in enumerate(volume.sop_instance_uids) if item in keys}
        placed = [item for item in walk.report(uid).findings if item.center_mm is not None]
        assert placed
        for item in placed:
            assert item.center_mm is not None
            assert item.sop_instance_uid is not None
            assert slices[item.sop_instance_uid] == item.slice_index
            z, y, x = volume.to_index(item.center_mm)
            assert abs(z - item.slice_index) <= 0.6  # centres are rounded to a tenth of a millimetre
            assert -1 <= y <= volume.shape[1]
            assert -1 <= x <= volume.shape[2]


def test_what_lies_beside_the_series_is_read(walk: Walk) -> None:
    for uid, priors in zip(walk.current, (1, 0), strict=True):
        inputs = {row.name: row for row in walk.report(uid).inputs}
        folder = walk.root / "studies" / uid
        record = parse_record(strict(folder / "record.json"))
        assert inputs["record"].count == len(record.values)
        assert inputs["audio"].detail == ontology.SOUND_SITES
        assert (inputs["volume"].count, inputs["image"].count, inputs["priors"].count) == (1, 1, priors)
        sources = {item.code: item.sources for item in walk.report(uid).findings}
        assert sources["airflow_obstruction"] == ("audio",)
        assert "record" in sources["infection"]
    (prior,) = {path.name for path in studies(walk)} - set(walk.current)
    assert {row.name: row.used for row in walk.report(prior).inputs} == {
        "volume": True, "priors": False, "image": False, "audio": False, "record": False,
    }  # fmt: skip


def test_a_rerun_writes_nothing(walk: Walk, tiny_checkpoint: Path) -> None:
    def times() -> dict[str, int]:
        files = [path for path in walk.out.glob("*/*") if path.parent.name != "private"]
        return {str(path): path.stat().st_mtime_ns for path in [*files, *{path.parent for path in files}]}

    before, bytes_before = times(), written(walk.out)
    code, lines = report(walk.root, walk.out, tiny_checkpoint)
    assert code == 0
    assert [line["fresh"] for line in lines if line["event"] == "study"] == [False] * 3
    assert times() == before
    assert written(walk.out) == bytes_before


def test_reports_do_not_know_the_truth(walk: Walk, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Another folder, no truth/ beside the studies, the same secret: the same bytes."""
    shutil.copytree(walk.root / "studies", tmp_path / "in" / "studies")
    (tmp_path / "out" / "private").mkdir(parents=True)
    shutil.copy(walk.out / "private" / "secret", tmp_path / "out" / "private" / "secret")
    assert report(tmp_path / "in", tmp_path / "out", tiny_checkpoint)[0] == 0
    assert written(tmp_path / "out") == written(walk.out)
    assert len(written(walk.out)) == 9


# ------------------------------------------------------------------------------------------------- model


def test_replacing_one_modality_leaves_the_others(loaded: Loaded, samples: tuple[Sample, ...]) -> None:
    first, second, other = samples
    swapped: dict[Modality, Sample] = {
        "volume": replace(first, volumes=other.volumes[:1], days=other.days[:1]),
        "image": replace(first, image=other.image),
        "audio": replace(first, audio=other.audio),
        "record": replace(first, record=other.record),
    }

    def embeddings(sample: Sample) -> dict[Modality, torch.Tensor]:
        with torch.inference_mode():
            return dict(loaded.model.encode(collate([sample, second], loaded.tokenizer)).embeddings.items())

    before = embeddings(first)
    assert tuple(before) == MODALITIES
    for changed, sample in swapped.items():
        after = embeddings(sample)
        for modality in MODALITIES:
            same = torch.equal(before[modality][0], after[modality][0])
            assert same == (modality != changed), (changed, modality)


def test_the_target_is_never_an_input(loaded: Loaded, samples: tuple[Sample, ...]) -> None:
    first, second, other = samples
    labels = {"report": other.report, "text": other.text, "questions": other.questions, "truth": other.truth}
    cases = [first, replace(first, **labels), replace(first, report=(), text="", questions=(), truth=None)]
    said = [
        loaded.model.generate(
            collate([case, second], loaded.tokenizer),
            tokenizer=loaded.tokenizer,
            sampling=Sampling(max_new_tokens=12),
        )
        for case in cases
    ]
    assert said[0] == said[1] == said[2]


# ------------------------------------------------------------------------------------------- evaluations


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, Path]:
    folders = {}
    for name in ("eval_report", "eval_retrieval", "eval_vqa"):
        options = [f"checkpoint={tiny_checkpoint}", "studies=4", "batch_size=3"]
        if name != "eval_retrieval":
            options.append("baseline_studies=12")
        folders[name] = tmp_path_factory.mktemp(name)
        page = run_evaluation(name, folders[name], overrides=options)
        assert page == (folders[name] / "results.md").read_text(encoding="utf-8")
    return folders


def test_results_are_written(evaluated: dict[str, Path], loaded: Loaded) -> None:
    for folder in evaluated.values():
        assert sorted(path.name for path in folder.iterdir()) == ["results.json", "results.md", "results.png"]
        facts = strict(folder / "results.json")["facts"]
        assert facts["checkpoint"] == str(loaded.identity)
        page = (folder / "results.md").read_text(encoding="utf-8")
        assert "not a medical device" in page
        assert all(f"{name}: {value}" in page for name, value in facts.items())
        with PIL.Image.open(folder / "results.png") as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # bars and words, no empty page


def test_report_scores(evaluated: dict[str, Path]) -> None:
    content = strict(evaluated["eval_report"] / "results.json")["scores"]
    macro = content["macro_f1"]
    assert set(macro) == {
        "text", "head", "constant normal", "all positive", "prevalence random", "record only", "shallow",
    }  # fmt: skip
    assert macro["constant normal"]["value"] == 0.0
    assert all(0 <= item["low"] <= item["high"] <= 1 for item in macro.values())
    assert content["labeler_on_references_macro_f1"] == 1.0
    assert content["findings"]["nodule"]["head"]["recall"] == 1.0  # its threshold is 0
    assert {item["chance"] for item in content["bound"]} == {0.5, 0.25, 0.2}
    for item in content["bound"][-2:]:
        assert item["with_it"]["value"] is not None
    assert sum(number for _, number in content["nodule_recall"].values()) > 0


def test_retrieval_scores(evaluated: dict[str, Path]) -> None:
    scores = strict(evaluated["eval_retrieval"] / "results.json")["scores"]
    assert {"volume -> report", "report -> volume", "control: shuffled pairs"} <= set(scores)
    for row in scores.values():
        assert row["recall_at_1"] <= row["recall_at_5"] == row["recall_at_10"]["value"] == row["chance_at_10"] == 1.0
        assert 1 <= row["median_rank"] <= 4


@pytest.mark.slow
def test_vqa_scores_repeat(evaluated: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = evaluated["eval_vqa"] / "results.json"
    scores = strict(first)["scores"]
    assert set(scores) >= {"ours", "baseline: most frequent answer", "baseline: question only"}
    named = [row for name, row in scores.items() if name == "ours" or name.startswith("baseline: ")]
    assert all({"overall", "closed", "open"} == set(row) for row in named)
    torch.manual_seed(123)  # the baselines' training questions must not hang on what ran before
    options = [f"checkpoint={tiny_checkpoint}", "studies=4", "batch_size=3", "baseline_studies=12"]
    run_evaluation("eval_vqa", tmp_path, overrides=options)
    assert (tmp_path / "results.json").read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("studies=0", "studies"),
        ("studie=3", "studie"),
        ("studies=many", "studies"),
        ("studies", "KEY=VALUE"),
        ("language=de", "language"),
        ("checkpoint=nowhere", "checkpoint 'nowhere': no such folder"),
    ],
)
def test_mistyped_options_of_an_evaluation(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run_evaluation("eval_report", tmp_path / "out", overrides=[override])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_evaluation_reads_chinese(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = [f"checkpoint={tiny_checkpoint}", "studies=3", "baseline_studies=6", "language=zh"]
    run_evaluation("eval_report", tmp_path, overrides=options)
    scores = strict(tmp_path / "results.json")["scores"]
    assert scores["labeler_on_references_macro_f1"] == 1.0
