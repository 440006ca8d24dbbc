"""Questions on phantom patients or on a table of images, beside what needs no image."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

import mm
from mm.batch import Question, Sample
from mm.data.collate import collate
from mm.data.readers import open_split, open_words
from mm.data.spec import load_spec
from mm.evaluation.bootstrap import Score
from mm.evaluation.evaluate import Evaluation, Results, batches, table, tracked
from mm.evaluation.paired import paired_p
from mm.evaluation.vqa import VqaScores, most_frequent, normalise, question_only, vqa_scores
from mm.evaluation.vqa_variants import variant_scores


class VqaEvaluation(Evaluation):
    """Exact answers to closed and open questions.

    Args:
        checkpoint: A checkpoint folder, or the name of a shipped one.
        spec: A data spec with questions: `phantom`, `vqa_rad` or a file.
        root: Takes the place of the spec's own root folder.
        studies: Only the first so many test studies; None for all.
        baseline_studies: Training studies whose questions and answers the baselines learn; None for all.
        batch_size: Studies a batch.
    """

    def __init__(
        self,
        *,
        checkpoint: str = "default",
        spec: str = "phantom",
        root: str | None = None,
        studies: int | None = 200,
        baseline_studies: int | None = 1000,
        batch_size: int = 8,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.checkpoint, self.spec, self.root = checkpoint, load_spec(spec, root=root), root
        self.studies, self.baseline_studies, self.batch_size = studies, baseline_studies, batch_size

    def run(self) -> Results:
        """Answers every question of the test split."""
        loaded = mm.load(self.checkpoint)
        kept = loaded.preprocessing
        test = open_split(self.spec, "test", studies=self.studies)
        size = len(test)  # type: ignore[arg-type]  # every dataset of ours is sized
        asked: list[Question] = []
        answers: list[str] = []
        for part in tracked(batches(size, self.batch_size), what="questions"):
            samples = [test[index] for index in part]
            asked += [question for sample in samples for question in sample.questions]
            # The answers stay here: the model gets the questions alone.
            blind = [_without_answers(sample) for sample in samples]
            batch = collate(
                blind, loaded.tokenizer, rows=("questions",), max_words=kept.max_words, max_text=kept.max_text
            )
            with torch.inference_mode():
                answers += [loaded.tokenizer.decode(ids) for ids in loaded.model.answer(batch).rows()]
        learnt = self._learnt()
        given = {
            "ours": answers,
            "baseline: most frequent answer": most_frequent(learnt, asked),
            "baseline: question only": question_only(learnt, asked),
        }
        rows = {name: vqa_scores(texts, asked) for name, texts in given.items()}
        scores: dict[str, Any] = {name: asdict(row) for name, row in rows.items()}
        variants = {name: variant_scores(texts, asked) for name, texts in given.items()}
        scores["variants"] = {
            name: {variant: asdict(row) for variant, row in of.items()} for name, of in variants.items()
        }
        ours, *others = (
            np.array([float(normalise(text) == normalise(q.answer)) for text, q in zip(texts, asked, strict=True)])
            for texts in given.values()
        )
        scores["p_against_ours"] = dict(zip(list(given)[1:], (paired_p(ours, other) for other in others), strict=True))
        return Results(
            title=f"Questions on {self.spec.name}",
            facts={
                "checkpoint": str(loaded.identity),
                "questions": f"{len(asked)} on {size} test studies, {sum(q.closed for q in asked)} of them closed",
            },
            scores=scores,
            tables={
                "Exact answers [95 %]": table(
                    ("who", "all", "closed", "open"), [(name, *_cells(row)) for name, row in rows.items()]
                ),
                "The same answers by other definitions [95 %]": table(
                    ("who", "score", "all", "closed", "open"),
                    [(name, variant, *_cells(row)) for name, of in variants.items() for variant, row in of.items()],
                ),
                "Difference from ours, paired randomisation": table(
                    ("who", "p"), [(name, f"{p:.4f}") for name, p in scores["p_against_ours"].items()]
                ),
            },
            bars=[(name, row.overall.value, row.overall.low, row.overall.high) for name, row in rows.items()],
            axis="share of exact answers (line: 95 % bootstrap interval)",
        )

    def _learnt(self) -> list[Question]:
        """Training questions and answers, the same in every run."""
        words = open_words(self.spec, "train", studies=self.baseline_studies)
        with torch.random.fork_rng(devices=()):  # the wording of phantom patients is drawn from torch's state
            torch.manual_seed(0)
            return [q for index in range(len(words)) for q in words[index].questions]  # type: ignore[arg-type]


def _without_answers(sample: Sample) -> Sample:
    questions = tuple(replace(question, answer="") for question in sample.questions)
    return replace(sample, questions=questions, truth=None, report=(), text="")


def _cells(scores: VqaScores) -> tuple[str, str, str]:
    def cell(score: Score | None) -> str:
        return "-" if score is None else str(score)

    return cell(scores.overall), cell(scores.closed), cell(scores.open)
