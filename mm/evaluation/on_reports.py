"""Report evaluation on phantom patients of an unseen seed, held-out paraphrases included."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Bool

import mm
from mm import ontology
from mm.batch import Batch, Language, Modality, Sample
from mm.data.collate import collate
from mm.evaluation import baselines
from mm.evaluation.audits import audit
from mm.evaluation.balanced import balanced_accuracy
from mm.evaluation.bootstrap import Score, bootstrap
from mm.evaluation.evaluate import Evaluation, Results, batches, table, tracked
from mm.evaluation.items import Items
from mm.evaluation.labels import labels
from mm.evaluation.reports import (
    Agreement,
    Judged,
    bleu4,
    copied_facts,
    head_labels,
    macro_f1,
    nodule_places,
    nodule_recall,
    rouge_l,
    text_labels,
)
from mm.evaluation.split import ids_digest
from mm.evaluation.text_scores import audit_table, text_scores, text_table
from mm.phantom.dataset import PhantomDataset
from mm.phantom.table import table_digest
from mm.phantom.text import report as reference_report
from mm.report.text import fill, join
from mm.training.checkpoint import Loaded

_CHANGES: Final = tuple(name for name in ontology.CHANGES if name != "unknown")


@dataclass(frozen=True)
class Bound:
    """A fact that one modality carries: balanced accuracy with it and without, and chance."""

    fact: str
    modality: str
    with_it: Score
    without: Score
    chance: float


class ReportEvaluation(Evaluation):
    """Findings from the head and from the text, places, copied facts, single-modality facts and overlap.

    Args:
        checkpoint: A checkpoint folder, or the name of a shipped one.
        studies: Test patients.
        seed: Of the test patients; no training recipe uses it.
        baseline_studies: Training patients of the baselines.
        baseline_seed: Of those.
        language: Of the reports.
        batch_size: Studies a batch.
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
    ) -> None:
        if min(studies, baseline_studies, batch_size) < 1:
            raise ValueError("studies, baseline_studies and batch_size must be at least 1")
        self.checkpoint, self.studies, self.seed = checkpoint, studies, seed
        self.baseline_studies, self.baseline_seed = baseline_studies, baseline_seed
        self.language: Language = language
        self.batch_size = batch_size

    def run(self) -> Results:
        """Generates, reads and scores every report."""
        loaded = mm.load(self.checkpoint)
        patients = PhantomDataset(studies=self.studies, seed=self.seed, split="test")
        seen, judged, answers, ids = [], [], _Answers(), list[str]()
        for part in tracked(batches(self.studies, self.batch_size), what="reports"):
            samples = [patients[index] for index in part]
            seen += [baselines.shallow_features(sample) for sample in samples]
            judged += self._judge(loaded, samples)
            ids += [sample.study for sample in samples]
            answers.add(loaded, self._batch(loaded, samples), samples)
        truth = answers.labels()
        references = [self._reference(item, number) for number, item in enumerate(judged)]
        rivals, training = self._baselines(np.stack(seen), truth)
        results = self._results(loaded, judged, references, truth, rivals, answers.bound(), training)
        split = f"test of phantom, {len(ids)} items, sha256 of their ids {ids_digest(ids)}"
        right = {"text": text_labels(judged) == truth, "head": head_labels(judged) == truth}
        each = {f"share of findings right, from the {name}": values.mean(1) for name, values in right.items()}
        return replace(results, facts={**results.facts, "split": split}, items=Items(tuple(ids), each))

    def _batch(self, loaded: Loaded, samples: Sequence[Sample]) -> Batch:
        kept = loaded.preprocessing
        return collate(samples, loaded.tokenizer, rows=(), max_words=kept.max_words, max_text=kept.max_text)

    def _judge(self, loaded: Loaded, samples: Sequence[Sample]) -> list[Judged]:
        # The model never sees the truth: it is taken off before the batch is made.
        blind = [replace(sample, truth=None, report=(), text="", questions=()) for sample in samples]
        with torch.inference_mode():
            written = loaded.model.generate(
                self._batch(loaded, blind), tokenizer=loaded.tokenizer, language=self.language
            )
        judged = []
        for sample, report in zip(samples, written, strict=True):
            assert sample.truth is not None
            days = sample.days[1] if len(sample.days) > 1 else None
            sentences = tuple(
                fill(
                    sentence.text,
                    finding=None if sentence.finding is None else report.findings[sentence.finding],
                    findings=report.findings,
                    days=days,
                    language=self.language,
                )
                for sentence in report.sentences
            )
            centers = sample.truth.visits[0].centers if sample.truth.visits else (None,) * len(sample.truth.findings)
            judged.append(Judged(report, sentences, days, sample.truth.findings, centers))
        return judged

    def _reference(self, item: Judged, number: int) -> str:
        rng = np.random.default_rng([self.seed, number])
        sentences = reference_report(item.findings, language=self.language, days=item.days, split="test", rng=rng)
        texts = [
            fill(
                sentence.text,
                finding=None if sentence.finding is None else item.findings[sentence.finding],
                findings=item.findings,
                days=item.days,
                language=self.language,
            )
            for sentence in sentences
        ]
        return join(texts, self.language)

    def _baselines(
        self, shallow: np.ndarray, truth: Bool[np.ndarray, "N K"]
    ) -> tuple[dict[str, Bool[np.ndarray, "N K"]], list[str]]:
        """What each baseline calls present, and the reports of the training patients in this language."""
        patients = PhantomDataset(studies=self.baseline_studies, seed=self.baseline_seed, split="train", priors=0)
        features, known, texts = [], [], []
        for index in tracked(range(self.baseline_studies), what="baselines"):
            sample = patients[index]
            features.append(baselines.shallow_features(sample))
            known.append(baselines.truth_labels([sample])[0])
            texts += [sample.text] if sample.language == self.language else []
        train, train_labels = np.stack(features), np.stack(known)
        record = slice(64 + 512, None)
        rivals = {
            "constant normal": baselines.constant(truth, positive=False),
            "all positive": baselines.constant(truth, positive=True),
            "prevalence random": baselines.prevalence_random(truth, train_labels, seed=0),
            "record only": baselines.logistic(train[:, record], train_labels, shallow[:, record]),
            "shallow": baselines.logistic(train, train_labels, shallow),
        }
        return rivals, texts

    def _results(
        self,
        loaded: Loaded,
        judged: list[Judged],
        references: list[str],
        truth: Bool[np.ndarray, "N K"],
        rivals: dict[str, Bool[np.ndarray, "N K"]],
        bound: list[Bound],
        training: list[str],
    ) -> Results:
        spacing = loaded.preprocessing.volume_grid.spacing_mm
        text, head = text_labels(judged), head_labels(judged)
        macro = {name: _macro(found, truth) for name, found in (("text", text), ("head", head), *rivals.items())}
        facts_right, num_facts = copied_facts(judged)
        places, recall = nodule_places(judged, spacing), nodule_recall(judged, spacing)
        candidates = [join(item.sentences, self.language) for item in judged]
        normal = [self._normal_report()] * len(judged)
        overlap = {
            name: (bleu4(texts, references, self.language), rouge_l(texts, references, self.language))
            for name, texts in (("ours", candidates), ("constant normal", normal))
        }
        each = {
            code: (Agreement.of(text[:, k], truth[:, k]), Agreement.of(head[:, k], truth[:, k]))
            for k, code in enumerate(ontology.CODES)
        }
        reference_labels = np.array(
            [[labels(item, self.language)[code] == "present" for code in ontology.CODES] for item in references]
        )
        written = text_scores(
            {"ours": candidates, "constant normal": normal}, references, self.language, training=training
        )
        audited = audit(references, references, self.language)
        scores: dict[str, Any] = {
            "macro_f1": {name: asdict(score) for name, score in macro.items()},
            "labeler_on_references_macro_f1": macro_f1(reference_labels, truth),
            "findings": {code: {"text": asdict(a), "head": asdict(b)} for code, (a, b) in each.items()},
            "copied_facts": {"share": facts_right, "num": num_facts},
            "nodules_8mm": asdict(places),
            "nodule_recall": recall,
            "bound": [asdict(item) for item in bound],
            "overlap": overlap,
            "text": written,
            "audit_of_references": {
                name: {title: asdict(found) for title, found in row.items()} for name, row in audited.items()
            },
        }
        shallow = {code: Agreement.of(rivals["shallow"][:, k], truth[:, k]) for k, code in enumerate(ontology.CODES)}
        tables = {
            "Macro-F1 over findings": table(
                ("who", "macro-F1 [95 %]"),
                [("ours, from the text", str(macro["text"])), ("ours, from the head", str(macro["head"]))]
                + [(f"baseline: {name}", str(macro[name])) for name in rivals],
            ),
            "Each finding": table(
                ("finding", "positives", "text P / R / F1", "head F1", "shallow F1"),
                [
                    (
                        code,
                        str(text_f1.positives),
                        f"{text_f1.precision:.2f} / {text_f1.recall:.2f} / {text_f1.f1:.2f}",
                        f"{head_f1.f1:.2f}",
                        f"{shallow[code].f1:.2f}",
                    )
                    for code, (text_f1, head_f1) in each.items()
                ],
            ),
            "Nodules": table(
                ("what", "value"),
                [(f"recall {name}", f"{share:.2f} of {number}") for name, (share, number) in recall.items()]
                + [
                    (">= 8 mm: key slice within one, of all", f"{places.key_slice_within_one:.2f} of {places.total}"),
                    (">= 8 mm: median centre error of the found", f"{places.median_error_mm:.1f} mm"),
                ],
            ),
            "Facts that one modality carries (balanced accuracy)": table(
                ("fact", "modality", "with it", "without", "chance"),
                [(b.fact, b.modality, str(b.with_it), str(b.without), f"{b.chance:.2f}") for b in bound],
            ),
            "Text": table(
                ("what", "value"),
                [
                    ("numbers and sides equal to the head's", f"{facts_right:.4f} of {num_facts}"),
                    ("labeler on the reference reports, macro-F1", f"{scores['labeler_on_references_macro_f1']:.3f}"),
                    *(
                        (f"BLEU-4 / ROUGE-L, {name}", f"{bleu:.3f} / {rouge:.3f}")
                        for name, (bleu, rouge) in overlap.items()
                    ),
                ],
            ),
            "Overlap as captions are scored, and collapse (p: of the CIDEr-D difference)": text_table(written),
            "Share of the score lost when the reference reports are made wrong (bold: noticed)": audit_table(audited),
        }  # fmt: skip
        return Results(
            title=f"Reports on {self.studies} phantom patients",
            facts={
                "checkpoint": str(loaded.identity),
                "test patients": f"{self.studies}, seed {self.seed}, split test (held-out paraphrases included)",
                "phantom table": table_digest()[:16],
                "baselines trained on": f"{self.baseline_studies} patients, seed {self.baseline_seed}",
                "language": self.language,
            },
            scores=scores,
            tables=tables,
            bars=[("ours, from the text", *_bar(macro["text"])), ("ours, from the head", *_bar(macro["head"]))]
            + [(f"baseline: {name}", *_bar(macro[name])) for name in rivals],
            axis="macro-F1 over findings (line: 95 % bootstrap interval)",
        )

    def _normal_report(self) -> str:
        rng = np.random.default_rng(0)
        sentences = reference_report((), language=self.language, days=None, split="train", rng=rng)
        return join(
            [fill(s.text, finding=None, findings=(), days=None, language=self.language) for s in sentences],
            self.language,
        )


def _macro(found: Bool[np.ndarray, "N K"], truth: Bool[np.ndarray, "N K"]) -> Score:
    return bootstrap(lambda drawn: macro_f1(found[drawn], truth[drawn]), len(truth), rounds=500)


def _bar(score: Score) -> tuple[float, float, float]:
    return score.value, score.low, score.high


class _Answers:
    """What the head says of facts that one modality carries, with that modality and without."""

    def __init__(self) -> None:
        self.truth: list[np.ndarray] = []
        self.only_image: list[bool] = []
        self.change: list[np.ndarray] = []
        # By the modality that was taken away.
        self.present: dict[str, list[np.ndarray]] = {name: [] for name in ("all", "audio", "record", "image")}
        self.changed: dict[str, list[np.ndarray]] = {name: [] for name in ("all", "priors")}

    def add(self, loaded: Loaded, batch: Batch, samples: Sequence[Sample]) -> None:
        """Runs the head on a batch in full and with each modality taken away."""
        self.truth += list(baselines.truth_labels(samples))
        for sample in samples:
            assert sample.truth is not None
            row = np.zeros(len(ontology.CODES), dtype=int)
            for item in sample.truth.findings:
                row[ontology.INDEX[item.code]] = ontology.CHANGES.index(item.change)
            self.change.append(row)
            sources = [item.sources for item in sample.truth.findings if item.code == "rib_fracture" and item.present]
            self.only_image.append(bool(sources) and all(set(item) == {"image"} for item in sources))
        cases: tuple[tuple[str, Modality | Literal["priors"] | None], ...] = (
            ("all", None), ("audio", "audio"), ("record", "record"), ("image", "image"), ("priors", "priors"),
        )  # fmt: skip
        head = loaded.model.findings
        assert head is not None
        for name, removed in cases:
            with torch.inference_mode():
                outputs = loaded.model.find(loaded.model.encode(batch if removed is None else batch.without(removed)))
                assert outputs is not None
            if name in self.present:
                found = head.probability(outputs.presence) >= head.threshold
                self.present[name] += list(found.cpu().numpy())
            if name in self.changed:
                self.changed[name] += list(outputs.change.float().cpu().numpy())

    def labels(self) -> Bool[np.ndarray, "N K"]:
        """Truth of presence."""
        return np.stack(self.truth)

    def bound(self) -> list[Bound]:
        """Scores, each beside its ablation."""
        truth = self.labels()
        airflow, infection, fracture = (
            ontology.INDEX[code] for code in ("airflow_obstruction", "infection", "rib_fracture")
        )
        opacity = truth[:, ontology.INDEX["consolidation"]] | truth[:, ontology.INDEX["atelectasis"]]
        only_image = np.array(self.only_image)
        full = np.stack(self.present["all"])
        result = []
        facts = (
            ("airflow obstruction", "audio", airflow, np.ones(len(truth), dtype=bool)),
            ("infection, given an opacity", "record", infection, opacity),
            ("rib fracture seen on the X-ray only", "image", fracture, only_image | ~truth[:, fracture]),
        )
        for fact, modality, column, kept in facts:
            without = np.stack(self.present[modality])
            result.append(
                Bound(
                    fact,
                    modality,
                    balanced_accuracy(full[kept, column], truth[kept, column]),
                    balanced_accuracy(without[kept, column], truth[kept, column]),
                    0.5,
                )
            )
        there = tuple(name for name in _CHANGES if name != "resolved")
        result.append(self._change("change class of a finding that is there (4 classes)", there))
        result.append(self._change("change class, resolved included (5 classes)", _CHANGES))
        return result

    def _change(self, fact: str, names: tuple[str, ...]) -> Bound:
        """A forced choice among classes: "unknown" is no answer, and without a prior all are as likely."""
        truth = np.stack(self.change)
        classes = np.array([ontology.CHANGES.index(name) for name in names])
        kept = np.isin(truth, classes)
        with_it, without = (
            balanced_accuracy(classes[np.stack(self.changed[name])[..., classes].argmax(-1)][kept], truth[kept])
            for name in ("all", "priors")
        )
        return Bound(fact, "priors", with_it, without, 1 / len(names))
