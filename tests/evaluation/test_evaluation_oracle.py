"""A model that knows the truth scores full marks, and loses exactly the fact whose modality is taken away."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mm
from mm import ontology
from mm.batch import Batch, BySource, DetectedFinding, GeneratedReport, GeneratedSentence, Sample
from mm.data.augment import mirror
from mm.evaluation.evaluate import run_evaluation
from mm.phantom import text
from mm.phantom.dataset import PhantomDataset
from mm.training.checkpoint import Loaded

STUDIES, SEED = 14, 3
SURE = 20.0


class Seen(Batch):
    """A batch that stands for what encoders say of it."""

    @property
    def embeddings(self) -> BySource[torch.Tensor]:
        return BySource(volume=torch.ones(self.size, 1))


class Oracle:
    """Tells patients by the print of their volumes, mirrored or not, or of the X-ray where there is no volume."""

    def __init__(self) -> None:
        patients = PhantomDataset(studies=STUDIES, seed=SEED, split="test")
        self.samples: dict[float, tuple[Sample, int]] = {}
        for index in range(STUDIES):
            sample = patients[index]
            turned = mirror(replace(sample, report=(), text="", questions=()))
            for one in (sample, *([] if turned is None else [turned])):
                pictures = [torch.from_numpy(volume) for volume in one.volumes]
                self.samples |= {self._print(picture): (one, visit) for visit, picture in enumerate(pictures)}

    @staticmethod
    def _print(volume: torch.Tensor) -> float:
        weights = torch.arange(volume.shape[-1], dtype=torch.float64)  # tells a volume from its mirror image
        return float((volume.double().sum((0, 1)) * weights).sum())

    def _known(self, batch: Batch) -> list[Sample]:
        return [sample for sample, _ in self._visits(batch)]

    def _visits(self, batch: Batch) -> list[tuple[Sample, int]]:
        assert batch.volumes is not None
        return [self.samples[self._print(batch.volumes.values[b, 0, 0])] for b in range(batch.size)]

    def generate(self, batch: Batch, *, tokenizer: object, language: str, sampling: object) -> list[GeneratedReport]:
        assert batch.targets is None
        assert batch.writing is None
        return [self._report(sample, language) for sample in self._known(batch)]

    def _report(self, sample: Sample, language: str) -> GeneratedReport:
        assert sample.truth is not None
        findings = tuple(
            DetectedFinding(item.code, item.present, 1.0, item.side, center, None, item.size, item.change)
            for item, center in zip(sample.truth.findings, sample.truth.visits[0].centers, strict=True)
        )
        days = sample.days[1] if len(sample.days) > 1 else None
        rng = np.random.default_rng(0)
        made = text.report(sample.truth.findings, language=language, days=days, split="train", rng=rng)
        sentences = tuple(GeneratedSentence(item.kind, item.text, item.finding, -0.1) for item in made)
        return GeneratedReport(language, findings, sentences)

    def encode(self, batch: Batch) -> Seen:
        return Seen(**vars(batch))

    def decode(self, outputs: SimpleNamespace) -> list[tuple[DetectedFinding, ...]]:
        """Of one volume alone."""
        found = []
        for sample, number in outputs.visits:
            assert sample.truth is not None
            visit = sample.truth.visits[number]
            found.append(
                tuple(
                    DetectedFinding(item.code, item.present, 1.0, item.side, center, None, item.size, "unknown")
                    for item, center in zip(visit.findings, visit.centers, strict=True)
                )
            )
        return found

    def find(self, batch: Batch) -> SimpleNamespace:
        if batch.volumes is None:  # nobody to be told
            nothing = torch.full((batch.size, len(ontology.CODES)), -SURE)
            change = torch.zeros(batch.size, len(ontology.CODES), len(ontology.CHANGES))
            return SimpleNamespace(presence=nothing, change=change, assessable=None)
        known = self._known(batch)
        presence = torch.full((batch.size, len(ontology.CODES)), -SURE)
        change = torch.zeros(batch.size, len(ontology.CODES), len(ontology.CHANGES))
        for b, sample in enumerate(known):
            assert sample.truth is not None
            for item in sample.truth.findings:
                given = {"volume": batch.volumes, "image": batch.image, "audio": batch.audio, "record": batch.record}
                seen = [name for name in item.sources if given[name] is not None]
                if item.present and seen:
                    presence[b, ontology.INDEX[item.code]] = SURE
                if batch.volumes is not None and int(batch.volumes.count[b]) > 1:
                    change[b, ontology.INDEX[item.code], ontology.CHANGES.index(item.change)] = SURE
        return SimpleNamespace(presence=presence, change=change, assessable=None, visits=self._visits(batch))


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_truth_scores_full_marks(
    language: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: Loaded = mm.load(tiny_checkpoint)
    oracle = Oracle()
    for name in ("generate", "encode", "find"):
        setattr(loaded.model, name, getattr(oracle, name))
    assert loaded.model.findings is not None
    loaded.model.findings.threshold.fill_(0.5)
    loaded.model.findings.decode = oracle.decode
    monkeypatch.setattr(mm, "load", lambda _path="default": loaded)
    options = [f"studies={STUDIES}", f"seed={SEED}", "baseline_studies=6", f"language={language}"]
    run_evaluation("eval_report", tmp_path, overrides=options)
    scores = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["scores"]
    assert scores["macro_f1"]["head"]["value"] == 1.0
    assert scores["macro_f1"]["text"]["value"] == 1.0
    assert scores["copied_facts"]["share"] == 1.0
    assert scores["copied_facts"]["num"] > STUDIES
    assert scores["nodules_8mm"]["total"] == scores["nodules_8mm"]["found"] > 0
    assert scores["nodules_8mm"]["key_slice_within_one"] == 1.0
    assert scores["nodules_8mm"]["median_error_mm"] == 0.0
    assert all(share in (1.0, None) for share, _ in scores["nodule_recall"].values())
    assert all(item["median"] in (0.0, None) for item in scores["nodule_size"].values())
    clear = scores["conspicuous"]["macro_f1"]["ours, from the text"]
    assert clear["conspicuous"]["value"] == clear["all_sizes"]["value"] == 1.0
    assert scores["mirror"]["statements"]["value"] == scores["mirror"]["texts"]["value"] == 1.0
    assert scores["calibration"]["pooled"]["value"] < 1e-6
    assert scores["grid"][-1]["macro_f1"]["value"] == 1.0 > scores["grid"][1]["macro_f1"]["value"]
    for item in scores["change"].values():
        assert item["ours"]["value"] == 1.0 >= item["by_sizes"]["value"] > 0.8
    for name in ("label -> template", "label -> template, drawn"):
        assert scores["text_macro_f1"][name]["value"] == 1.0
    assert scores["overlap"]["ours"][1] > scores["overlap"]["constant normal"][1]
    scored = [item for item in scores["bound"] if item["with_it"]["value"] is not None]
    assert {item["modality"] for item in scored} >= {"audio", "priors"}
    for item in scored:
        assert item["with_it"]["value"] == 1.0, item["fact"]
        if item["modality"] != "priors":
            assert item["without"]["value"] == 0.5, item["fact"]
        else:
            assert item["without"]["value"] <= 0.5, item["fact"]
