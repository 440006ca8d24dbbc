"""Questions on phantom patients or on a table of images, beside what needs no image and what needs no question."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from mm.answer_words import normalise
from mm.batch import Batch, Question, Sample
from mm.data.collate import collate
from mm.data.readers import TableDataset, image_name, open_split, open_words
from mm.data.spec import PhantomSpec, Split, load_spec
from mm.evaluation.bootstrap import Score
from mm.evaluation.embed import embed_all
from mm.evaluation.evaluate import Evaluation, Results, batches, table, tracked
from mm.evaluation.items import Items
from mm.evaluation.paired import paired_p
from mm.evaluation.split import size_of, split_facts
from mm.evaluation.vqa import VqaScores, image_only, most_frequent, question_only, vqa_scores
from mm.evaluation.vqa_listed import AnswerList, Candidates
from mm.evaluation.vqa_variants import VARIANTS, variant_scores

NEIGHBOURS: Final = 5
"""Training images that the image-only baseline asks, the image itself where it was trained on."""
_BASELINE_PATIENTS: Final = 1000
_CHOSEN: Final = {
    "listed": "the most probable of {} training answers",
    "head": "of {} training answers the one that the answer head scores highest",
    "both": "of {} training answers by the answer head, the decoder's log-probability beside it",
}


@dataclass(frozen=True)
class _Learnt:
    """Training questions, and which rows they are on (tables: one question a row)."""

    questions: list[Question]
    rows: Dataset[Sample]


class VqaEvaluation(Evaluation):
    """Exact answers to closed and open questions.

    Args:
        checkpoint: A checkpoint folder, or the name of a shipped one.
        spec: A data spec with questions: `phantom`, `vqa_rad` or a file.
        root: Takes the place of the spec's own root folder.
        split: Choose on `val`, read `test` once.
        answers: "written" word by word; or one of all distinct training answers: the one that the decoder finds most
            probable ("listed"), that the answer head scores highest ("head"), or "both" together.
        candidates: "all" listed answers, or those "fitting" the question's form: yes or no, one of the options that
            it names, or anything else.
        answer_limit: The list has only so many of the most frequent ones; None: all.
        studies: Only the first so many studies of the split; None for all.
        baseline_studies: Training studies whose questions and answers the baselines and the list learn; None for all
            of a table, and for 1000 procedural patients.
        batch_size: Studies a batch.
    """

    checkpoint: str

    def __init__(
        self,
        *,
        checkpoint: str = "default",
        spec: str = "phantom",
        root: str | None = None,
        split: Split = "test",
        answers: Literal["written", "listed", "head", "both"] = "written",
        candidates: Candidates = "all",
        answer_limit: int | None = None,
        studies: int | None = None,
        baseline_studies: int | None = None,
        batch_size: int = 8,
    ) -> None:
        for name, number in (("batch_size", batch_size), ("studies", studies), ("baseline_studies", baseline_studies)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if answer_limit is not None and (answer_limit < 2 or answers == "written"):
            raise ValueError(
                f"answer_limit must be at least 2, and needs answers: listed, head or both; got {answer_limit}"
            )
        if candidates == "fitting" and answers == "written":
            raise ValueError("candidates: fitting needs answers: listed, head or both; got answers: written")
        self.checkpoint, self.spec, self.root = checkpoint, load_spec(spec, root=root), root
        self.split: Split = split
        self.answers, self.answer_limit, self.candidates = answers, answer_limit, candidates
        self.studies, self.baseline_studies, self.batch_size = studies, baseline_studies, batch_size
        if not isinstance(self.spec, PhantomSpec) and self.spec.prompt is None:
            raise ValueError(f"data spec {self.spec.name} has no questions: it names no prompt column")

    def check(self) -> None:
        """Whether the checkpoint can answer."""
        super().check()
        if self.answers in ("head", "both") and self.loaded.model.answers is None:
            raise ValueError(f"checkpoint {self.loaded.identity} has no answer head; take answers: written or listed")
        if self.answers != "head" and self.loaded.model.decoder is None:
            raise ValueError(f"checkpoint {self.loaded.identity} has no decoder to answer with")

    def run(self) -> Results:
        """Answers every question of the split."""
        kept = self.loaded.preprocessing
        samples = open_split(self.spec, self.split, studies=self.studies)
        size = size_of(samples)
        learnt = self._learnt()
        listed = AnswerList.of(learnt.questions, limit=self.answer_limit) if self.answers != "written" else None
        asked: list[Question] = []
        answers, studies = list[str](), list[str]()
        for part in tracked(batches(size, self.batch_size), what="questions"):
            some = [samples[index] for index in part]
            new = [question for sample in some for question in sample.questions]
            asked += new
            studies += [sample.study for sample in some for _ in sample.questions]
            # The answers stay here: the model gets the questions alone.
            blind = [_without_answers(sample) for sample in some]
            batch = collate(
                blind, self.loaded.tokenizer, rows=("questions",), max_words=kept.max_words, max_text=kept.max_text
            )
            if self.answers == "written":
                answers += self._answered(batch)
            else:
                assert listed is not None
                answers += listed.choose(self.loaded, batch, new, by=self.answers, candidates=self.candidates)
        given = {
            "ours": answers,
            "baseline: most frequent answer": most_frequent(learnt.questions, asked),
            "baseline: question only": question_only(learnt.questions, asked),
        }
        near = self._near(samples, learnt.rows)
        if near is not None:
            given["baseline: image only"] = image_only(learnt.questions, asked, near)
        facts = {
            "checkpoint": str(self.loaded.identity),
            "questions": f"{len(asked)} on {size} {self.split} studies, {sum(q.closed for q in asked)} of them closed",
            "answers": "written" if listed is None else _CHOSEN[self.answers].format(len(listed.answers)),
        }
        if self.candidates == "fitting":
            facts["candidates"] = "those that fit the form of the question"
        if listed is not None:
            known = np.mean([normalise(question.answer) in listed.answers for question in asked])
            facts["answers on the list"] = f"those of {known:.3f} of the questions; no choice scores above that"
        ids = tuple(f"{study}#{number}" for number, study in enumerate(studies))
        return _results(
            f"Questions on {self.spec.name}", {**facts, **split_facts(self.spec, self.split, ids)}, given, asked, ids
        )

    def _answered(self, batch: Batch) -> list[str]:
        with torch.inference_mode():
            return [self.loaded.tokenizer.decode(ids) for ids in self.loaded.model.answer(batch).rows()]

    def _learnt(self) -> _Learnt:
        """Training questions and answers, the same in every run."""
        number = self.baseline_studies
        if number is None and isinstance(self.spec, PhantomSpec):
            number = _BASELINE_PATIENTS
        words = open_words(self.spec, "train", studies=number)
        with torch.random.fork_rng(devices=()):  # the wording of phantom patients is drawn from torch's state
            torch.manual_seed(0)
            return _Learnt([q for index in range(size_of(words)) for q in words[index].questions], words)

    def _near(self, samples: Dataset[Sample], learnt: Dataset[Sample]) -> list[list[int]] | None:
        """Training rows on the images nearest to each row's own; None without images or an encoder of them."""
        if not isinstance(samples, TableDataset) or not isinstance(learnt, TableDataset):
            return None
        if self.spec.image is None or self.loaded.model.image is None:  # type: ignore[union-attr]
            return None
        pictured = TableDataset(learnt.spec, "train", inputs=("image",), studies=len(learnt))
        ours, theirs = _by_image(samples), _by_image(pictured)
        vectors = [
            embed_all(
                self.loaded,
                rows,
                "image",
                rows=[numbers[0] for numbers in of.values()],
                batch_size=self.batch_size,
                what="images",
            )
            for rows, of in ((samples, ours), (pictured, theirs))
        ]
        nearest = (vectors[0] @ vectors[1].T).topk(min(NEIGHBOURS, len(theirs))).indices.tolist()
        groups = list(theirs.values())
        found = dict(zip(ours, ([row for place in places for row in groups[place]] for places in nearest), strict=True))
        return [found[image_name(row, samples.spec)] for row in samples.rows]


def _by_image(samples: TableDataset) -> dict[str | None, list[int]]:
    """The rows of each image."""
    found: dict[str | None, list[int]] = {}
    for index, row in enumerate(samples.rows):
        found.setdefault(image_name(row, samples.spec), []).append(index)
    return found


def _results(
    title: str, facts: dict[str, str], given: dict[str, list[str]], asked: Sequence[Question], ids: tuple[str, ...]
) -> Results:
    rows = {name: vqa_scores(texts, asked) for name, texts in given.items()}
    scores: dict[str, Any] = {name: asdict(row) for name, row in rows.items()}
    variants = {name: variant_scores(texts, asked) for name, texts in given.items()}
    scores["variants"] = {name: {variant: asdict(row) for variant, row in of.items()} for name, of in variants.items()}
    each = {
        name: {title: np.array([score(a, q.answer) for a, q in zip(texts, asked, strict=True)]) for title, score in
               VARIANTS.items()}
        for name, texts in given.items()
    }  # fmt: skip
    ours, *others = (of["exact"] for of in each.values())
    scores["p_against_ours"] = dict(zip(list(given)[1:], (paired_p(ours, other) for other in others), strict=True))
    return Results(
        title=title,
        facts=facts,
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
        items=Items(ids, each["ours"]),
    )


def _without_answers(sample: Sample) -> Sample:
    questions = tuple(replace(question, answer="", region="") for question in sample.questions)
    return replace(sample, questions=questions, truth=None, report=(), text="")


def _cells(scores: VqaScores) -> tuple[str, str, str]:
    def cell(score: Score | None) -> str:
        return "-" if score is None else str(score)

    return cell(scores.overall), cell(scores.closed), cell(scores.open)
