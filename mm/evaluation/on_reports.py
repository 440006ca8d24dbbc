"""Report evaluation on phantom patients of an unseen seed, held-out paraphrases included."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import mm
from mm.batch import Batch, DetectedFinding, GeneratedReport, Language, Sample, Volumes
from mm.data.augment import mirror
from mm.data.collate import collate
from mm.decoder.generate import Sampling
from mm.evaluation import baselines
from mm.evaluation.evaluate import Evaluation, Results, batches, tracked
from mm.evaluation.heard import Heard
from mm.evaluation.items import Items
from mm.evaluation.report_baselines import drawn_template, nearest_texts, one_template, side_by_side
from mm.evaluation.report_sections import bars, sections
from mm.evaluation.reports import Judged, head_labels, text_labels
from mm.evaluation.split import ids_digest
from mm.evaluation.subsets import Answers
from mm.phantom.dataset import PhantomDataset
from mm.phantom.table import table_digest
from mm.phantom.text import filled
from mm.phantom.text import report as reference_report
from mm.report.text import fill, join
from mm.training.checkpoint import Loaded

NEIGHBOURS: Final = 400
"""Training patients, at most, among whom the nearest is looked for: each has to be encoded."""


class ReportEvaluation(Evaluation):
    """Findings from the head and from the text, by size and by input, places, sizes, sides, change and overlap.

    Args:
        checkpoint: A checkpoint folder, or the name of a shipped one.
        studies: Test patients.
        seed: Of the test patients; no training recipe uses it.
        baseline_studies: Training patients of the baselines.
        baseline_seed: Of those.
        language: Of the reports.
        batch_size: Studies a batch.
        audit: Which scores notice it when the model's reports are made wrong, beside the references.
        samples: Drawn for each sentence, as in `GenerateReport`.
    """

    checkpoint: str

    def __init__(
        self,
        *,
        checkpoint: str = "default",
        studies: int = 200,
        seed: int = 3,
        baseline_studies: int = 1000,
        baseline_seed: int = 1,
        language: Language = "en",
        batch_size: int = 8,
        audit: bool = False,
        samples: int = 1,
    ) -> None:
        if min(studies, baseline_studies, batch_size, samples) < 1:
            raise ValueError("studies, baseline_studies, batch_size and samples must be at least 1")
        self.checkpoint, self.studies, self.seed = checkpoint, studies, seed
        self.baseline_studies, self.baseline_seed = baseline_studies, baseline_seed
        self.language: Language = language
        self.batch_size, self.audit, self.samples = batch_size, audit, samples

    def run(self) -> Results:
        """Generates, reads and scores every report."""
        loaded = mm.load(self.checkpoint)
        patients = PhantomDataset(studies=self.studies, seed=self.seed, split="test")
        heard, seen, vectors = Heard(self.language, Answers()), list[np.ndarray](), list[Tensor]()
        for part in tracked(batches(self.studies, self.batch_size), what="reports"):
            samples = [patients[index] for index in part]
            batch = self._batch(loaded, samples)
            seen += [baselines.shallow_features(sample) for sample in samples]
            heard.ids += [sample.study for sample in samples]
            heard.judged += self._judge(loaded, samples)
            heard.mirrored += self._mirrored(loaded, samples)
            vectors.append(side_by_side(heard.answers.add(loaded, batch, samples)))
            heard.now += self._alone(loaded, batch, visit=0)
            heard.before += self._alone(loaded, batch, visit=1)
        heard.references += [self._reference(item, number) for number, item in enumerate(heard.judged)]
        self._baselines(loaded, np.stack(seen), torch.cat(vectors), heard)
        scores, tables = sections(heard, loaded.preprocessing.volume_grid.spacing_mm, audited=self.audit)
        truth = heard.answers.labels()
        right = {"text": text_labels(heard.judged) == truth, "head": head_labels(heard.judged) == truth}
        each = {f"share of findings right, from the {name}": values.mean(1) for name, values in right.items()}
        return Results(
            title=f"Reports on {self.studies} phantom patients",
            facts={
                "checkpoint": str(loaded.identity),
                "test patients": f"{self.studies}, seed {self.seed}, split test (held-out paraphrases included)",
                "phantom table": table_digest()[:16],
                "baselines trained on": f"{self.baseline_studies} patients, seed {self.baseline_seed}",
                "language": self.language,
                "sentences": "greedy" if self.samples == 1 else f"consensus of {self.samples} drawn",
                "split": f"test of phantom, {len(heard.ids)} items, sha256 of their ids {ids_digest(heard.ids)}",
            },
            scores=scores,
            tables=tables,
            bars=bars(scores),
            axis="macro-F1 over findings (line: 95 % bootstrap interval)",
            items=Items(tuple(heard.ids), each),
        )

    def _batch(self, loaded: Loaded, samples: Sequence[Sample]) -> Batch:
        kept = loaded.preprocessing
        return collate(samples, loaded.tokenizer, rows=(), max_words=kept.max_words, max_text=kept.max_text)

    def _write(self, loaded: Loaded, samples: Sequence[Sample]) -> list[tuple[GeneratedReport, tuple[str, ...]]]:
        """Reports and their sentences, filled. The model never sees the truth: it is taken off before."""
        blind = [replace(sample, truth=None, report=(), text="", questions=()) for sample in samples]
        sampling = Sampling.consensus_of(self.samples)
        with torch.inference_mode():
            written = loaded.model.generate(
                self._batch(loaded, blind), tokenizer=loaded.tokenizer, language=self.language, sampling=sampling
            )
        return [
            (
                report,
                tuple(
                    fill(
                        sentence.text,
                        finding=None if sentence.finding is None else report.findings[sentence.finding],
                        findings=report.findings,
                        days=_days(sample),
                        language=self.language,
                    )
                    for sentence in report.sentences
                ),
            )
            for sample, report in zip(samples, written, strict=True)
        ]

    def _judge(self, loaded: Loaded, samples: Sequence[Sample]) -> list[Judged]:
        judged = []
        for sample, (report, sentences) in zip(samples, self._write(loaded, samples), strict=True):
            assert sample.truth is not None
            centers = sample.truth.visits[0].centers if sample.truth.visits else (None,) * len(sample.truth.findings)
            judged.append(Judged(report, sentences, _days(sample), sample.truth.findings, centers))
        return judged

    def _mirrored(self, loaded: Loaded, samples: Sequence[Sample]) -> list[str | None]:
        """The report of each mirrored study; None where its record can't be mirrored truly."""
        blind = [replace(sample, truth=None, report=(), text="", questions=()) for sample in samples]
        turned = [mirror(sample) for sample in blind]
        kept = [sample for sample in turned if sample is not None]
        texts = iter(self._write(loaded, kept) if kept else [])
        return [None if sample is None else join(next(texts)[1], self.language) for sample in turned]

    def _alone(self, loaded: Loaded, batch: Batch, *, visit: int) -> list[tuple[DetectedFinding, ...]]:
        """What the head finds in one volume of each study, as if there were nothing else; nothing without it."""
        volumes = batch.volumes
        found: list[tuple[DetectedFinding, ...]] = [()] * batch.size
        if volumes is None or not bool((volumes.count > visit).any()):
            return found
        rows = (volumes.count > visit).nonzero()[:, 0]
        values = volumes.values[rows, visit : visit + 1]
        one = Volumes(values, torch.ones_like(volumes.count[rows]), torch.zeros_like(volumes.days[rows, :1]))
        assert loaded.model.findings is not None
        with torch.inference_mode():
            outputs = loaded.model.find(loaded.model.encode(Batch(size=len(rows), volumes=one)))
            assert outputs is not None
            for row, findings in zip(rows.tolist(), loaded.model.findings.decode(outputs), strict=True):
                found[row] = findings
        return found

    def _reference(self, item: Judged, number: int) -> str:
        rng = np.random.default_rng([self.seed, number])
        sentences = reference_report(item.findings, language=self.language, days=item.days, split="test", rng=rng)
        return filled(sentences, item.findings, days=item.days, language=self.language)

    def _baselines(
        self, loaded: Loaded, shallow: Float[np.ndarray, "N F"], vectors: Float[Tensor, "N E"], heard: Heard
    ) -> None:
        """What each baseline calls present, and what it writes."""
        patients = PhantomDataset(studies=self.baseline_studies, seed=self.baseline_seed, split="train")
        features, known, near, texts = [], [], list[Tensor](), heard.training
        for index in tracked(range(self.baseline_studies), what="baselines"):
            sample = patients[index]
            features.append(baselines.shallow_features(sample))
            known.append(baselines.truth_labels([sample])[0])
            if sample.language != self.language:
                continue
            texts.append(sample.text)
            if len(near) < NEIGHBOURS:
                with torch.inference_mode():
                    near.append(side_by_side(loaded.model.encode(self._batch(loaded, [sample])).embeddings))
        train, train_labels, truth = np.stack(features), np.stack(known), heard.answers.labels()
        record = slice(64 + 512, None)
        heard.rivals |= {
            "constant normal": baselines.constant(truth, positive=False),
            "all positive": baselines.constant(truth, positive=True),
            "prevalence random": baselines.prevalence_random(truth, train_labels, seed=0),
            "record only": baselines.logistic(train[:, record], train_labels, shallow[:, record]),
            "shallow": baselines.logistic(train, train_labels, shallow),
        }
        rng = np.random.default_rng([self.seed, 1])
        said = [(item.report.findings, item.days) for item in heard.judged]
        heard.written |= {
            "label -> template": [one_template(found, language=self.language, days=days) for found, days in said],
            "label -> template, drawn": [
                drawn_template(found, language=self.language, days=days, rng=rng) for found, days in said
            ],
            "constant normal": [self._normal_report()] * len(said),
        }
        if texts:
            heard.written["nearest training patient"] = nearest_texts(vectors, torch.cat(near), texts[: len(near)])

    def _normal_report(self) -> str:
        rng = np.random.default_rng(0)
        sentences = reference_report((), language=self.language, days=None, split="train", rng=rng)
        return filled(sentences, (), days=None, language=self.language)


def _days(sample: Sample) -> float | None:
    return sample.days[1] if len(sample.days) > 1 else None
