"""Questions about images: the decoder learns to write answers, and an answer head is fitted beside it."""

import logging
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from mm.answer_words import WELL, normalise
from mm.batch import Padded, Sample, Tokens, Writing
from mm.data.collate import collate
from mm.data.datamodule import MultimodalData
from mm.encoded import Encoded
from mm.training.text_memory import TextMemory
from mm.training.write import WriteTask

log = logging.getLogger(__name__)

AT_ONCE = 32
"""Studies that are read together when the head is fitted."""


class AnswerTask(WriteTask):
    """`WriteTask` for a model with `answers`: when the decoder is done, the head is fitted in closed form.

    Both learn from the training split alone, and from nothing but questions, answers and images.
    """

    trains: ClassVar[tuple[str, ...]] = (*WriteTask.trains, "question_adapter")

    def __init__(self, **kwargs: Any) -> None:
        """Makes the stage.

        Args:
            **kwargs: Of `CachedTask`.

        Raises:
            ValueError: The model has no answer head.
        """
        super().__init__(**kwargs)
        if self.model.answers is None:
            raise ValueError("the answer stage needs a model with `answers`")
        still = not any(part.split(".")[0] == "text" for part in self.learning)
        self.memory = TextMemory() if still else None

    def remembered(self, encoded: Encoded, writing: Writing) -> tuple[Tokens, Int[Tensor, " M"]]:
        """As the model has it; a frozen text tower reads each question once a run."""
        text, said = self.model.text, None
        if self.memory is not None and text is not None and writing.asked is not None:
            said = self.memory.tokens(text, writing.asked)
        return self.model.remember(encoded, writing, said=said)

    def seal(self) -> None:
        """Fits the head."""
        super().seal()
        head, data = self.model.answers, self.trainer.datamodule  # type: ignore[attr-defined]  # set by fit
        assert head is not None
        assert isinstance(data, MultimodalData)
        self.model.eval()
        samples = data.words("train") if self.cache_root is not None else data.dataset("train")
        sentences, asked, pictures = list[Tensor](), list[list[int]](), list[Tensor]()
        answers, regions = list[str](), list[str]()
        for start in range(0, len(samples), AT_ONCE):  # type: ignore[arg-type]  # every dataset of ours is sized
            index = torch.arange(start, min(start + AT_ONCE, len(samples)))  # type: ignore[arg-type]
            some: list[Sample] = [samples[item] for item in index.tolist()]
            batch = collate(some, data.tokenizer, rows=("questions",), max_text=data.max_text).to(self.device)
            if batch.writing is None:
                continue
            encoded = (
                self.model.encode(batch)
                if self.cache_root is None
                else self._caches["train"].select(index, self.device)
            )
            vectors, words, seen = self.model.read_questions(encoded, batch.writing)
            sentences.append(vectors)
            pictures.append(seen)
            asked += words.rows()
            answers += [normalise(question.answer) for sample in some for question in sample.questions]
            regions += [question.region for sample in some for question in sample.questions]
        marks = set(data.tokenizer.encode_whole("", 8))
        spelt = [[word for word in data.tokenizer.encode_whole(text, 8) if word not in marks] for text in WELL]
        head.fit(
            torch.cat(sentences),
            Padded.of(asked).to(self.device),
            torch.cat(pictures),
            answers,
            regions=regions if all(regions) else (),
            well=[ids[0] for ids in spelt if len(ids) == 1],
        )
        log.info("answer head: %d answers of %d questions", len(head.answers), len(answers))
