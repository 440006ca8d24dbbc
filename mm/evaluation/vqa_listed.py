"""Answers chosen from a list: the training answer that the decoder finds most probable, given question and image."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from mm.batch import SPECIAL_IDS, Batch, Question
from mm.evaluation.vqa import normalise
from mm.training.checkpoint import Loaded


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

    def choose(self, loaded: Loaded, batch: Batch) -> list[str]:
        """The most probable answer to each question of a batch; an answer is as probable as its spellings together."""
        ids = [[*loaded.tokenizer.encode(text), SPECIAL_IDS.end] for text in self.spellings]
        with torch.inference_mode():
            said = loaded.model.score(batch, ids)
        means = torch.from_numpy(self.means).to(said.device)
        highest = said.max(1, keepdim=True).values
        totals = torch.zeros(len(said), len(self.answers), device=said.device)
        totals = totals.index_add(1, means, (said - highest).exp())
        return [self.answers[place] for place in totals.argmax(1).tolist()]
