"""Answers chosen from a list of training answers, by the decoder, by the answer head, or by both."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.answer_words import fitting, form, normalise, options
from mm.batch import SPECIAL_IDS, Batch, Question
from mm.training.checkpoint import Loaded

Judges = Literal["listed", "head", "both"]
Candidates = Literal["all", "fitting"]


@dataclass(frozen=True)
class AnswerList:
    """Distinct answers, and how training spells them.

    Attributes:
        answers: Each as `mm.evaluation.vqa.normalise` has it, the most frequent first.
        spellings: As they stand in the training data.
        means: Which answer each spelling is one of.
    """

    answers: tuple[str, ...]
    spellings: tuple[str, ...]
    means: Int[np.ndarray, " S"]

    @classmethod
    def of(cls, learnt: Sequence[Question], *, limit: int | None = None) -> "AnswerList":
        """The answers of training questions.

        Args:
            learnt: The questions.
            limit: Only so many of the most frequent answers; None: all.

        Raises:
            ValueError: There are no answers.
        """
        counted = Counter(normalise(question.answer) for question in learnt if question.answer.strip())
        if not counted:
            raise ValueError("answers: the training split has none to make a list of")
        answers = tuple(answer for answer, _ in counted.most_common(limit))
        index = {answer: place for place, answer in enumerate(answers)}
        spelt = sorted({question.answer for question in learnt if question.answer.strip()})
        spelt = [text for text in spelt if normalise(text) in index]
        return cls(answers, tuple(spelt), np.array([index[normalise(text)] for text in spelt]))

    def choose(
        self,
        loaded: Loaded,
        batch: Batch,
        questions: Sequence[Question],
        *,
        by: Judges = "listed",
        candidates: Candidates = "all",
    ) -> list[str]:
        """The best answer to each question of a batch.

        Args:
            loaded: The checkpoint.
            batch: The questions; their answers aren't looked at.
            questions: The same, in their own words.
            by: The decoder, the answer head, or the head with the decoder's log-probability beside it.
            candidates: All answers, or those that fit the form of the question; of the options that a question names
                one is taken even if it is no training answer.

        Raises:
            ValueError: The head knows other answers than the list.
        """
        with torch.inference_mode():
            scores = self._said(loaded, batch) if by == "listed" else self._weighed(loaded, batch)
            if by == "both":
                assert loaded.model.answers is not None
                scores = scores + loaded.model.answers.decoder_weight * self._said(loaded, batch)
        if candidates == "all":
            return [self.answers[place] for place in scores.argmax(1).tolist()]
        return [self._fitting(row, asked.question) for row, asked in zip(scores, questions, strict=True)]

    def _fitting(self, scores: Float[Tensor, " A"], question: str) -> str:
        if form(question) == "options" and not set(named := options(question)) & set(self.answers):
            return named[0]
        places = fitting(question, self.answers)
        return self.answers[places[int(scores[places].argmax())]]

    def _said(self, loaded: Loaded, batch: Batch) -> Float[Tensor, "M A"]:
        """By the decoder; an answer is as probable as its spellings together."""
        ids = [[*loaded.tokenizer.encode(text), SPECIAL_IDS.end] for text in self.spellings]
        said = loaded.model.score(batch, ids)
        means = torch.from_numpy(self.means).to(said.device)
        highest = said.max(1, keepdim=True).values
        totals = torch.zeros(len(said), len(self.answers), device=said.device)
        return totals.index_add(1, means, (said - highest).exp()).log() + highest

    def _weighed(self, loaded: Loaded, batch: Batch) -> Float[Tensor, "M A"]:
        """By the answer head."""
        assert loaded.model.answers is not None
        known = {answer: place for place, answer in enumerate(loaded.model.answers.answers)}
        missing = [answer for answer in self.answers if answer not in known]
        if missing:
            raise ValueError(
                f"the answer head was fitted on other answers than those of this data's training split: it lacks"
                f" {len(missing)}, such as {missing[0]!r}"
            )
        return loaded.model.weigh(batch)[:, [known[answer] for answer in self.answers]]
