"""Third stage: the decoder learns sentences from findings, answers from questions, and captions from images."""

import logging
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.batch import SLOT_KINDS, SPECIAL_IDS, Batch, Tokens, Writing
from mm.decoder.sentences import SentenceDecoder
from mm.encoded import Encoded
from mm.training.cached import CachedTask
from mm.training.routing import RoutedTask

log = logging.getLogger(__name__)


class WriteTask(RoutedTask, CachedTask):
    """Fusion and decoder; encoders, finding head, adapters and embeddings are frozen.

    A row is one sentence about one finding (its true code, side, change and grade in the slot), one question and
    its answer, or the instruction to describe the image and its caption.
    """

    trains: ClassVar[tuple[str, ...]] = ("fusion", "finding_tokens", "decoder")

    def cached_losses(self, encoded: Encoded, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Language loss and the router's losses, see `RoutedTask`."""
        if batch.writing is None:
            raise ValueError("the write stage needs reports, questions or captions; see data.rows")
        memory, rows = self.remembered(encoded, batch.writing)
        output = self._decoder()(batch.writing, memory, rows=rows)
        return self.write_losses(output, batch)

    def _decoder(self) -> SentenceDecoder:
        if self.model.decoder is None:
            raise ValueError("the write stage needs a model with `decoder`")
        return self.model.decoder

    def remembered(self, encoded: Encoded, writing: Writing) -> tuple[Tokens, Int[Tensor, " M"]]:
        """The decoder's memory, and the place in it that each row reads."""
        return self.model.remember(encoded, writing)

    def on_validation_epoch_start(self) -> None:
        """Forgets the last validation."""
        super().on_validation_epoch_start()
        self._right: list[Tensor] = []

    def judge(self, encoded: Encoded, batch: Batch) -> None:
        """Answers the questions and compares, token by token."""
        asked = None if batch.writing is None else questions(batch.writing)
        if asked is None or asked.target is None:
            return
        memory, rows = self.remembered(encoded, asked)
        written = self._decoder().generate(replace(asked, target=None), memory, rows=rows)
        right = [_words(own) == _words(true) for own, true in zip(written.rows(), asked.target.rows(), strict=True)]
        self._right.append(torch.tensor(right))

    def on_validation_epoch_end(self) -> None:
        """Logs the share of questions answered exactly."""
        losses = self.trainer.callback_metrics
        if not self._right:
            return
        accuracy = float(torch.cat(self._right).float().mean())
        self.log(f"{self.judged}_answer_accuracy", accuracy)
        loss = losses.get(f"{self.judged}_loss_writing")
        said = "" if loss is None else f"cross-entropy {float(loss):.3f}, "
        log.info("step %d. %sexact answers %.3f", self.trainer.global_step, said, accuracy)


def questions(writing: Writing) -> Writing | None:
    """The rows that are questions; None if there are none."""
    rows = (writing.slots.kind == SLOT_KINDS.index("answer")).nonzero()[:, 0]
    if len(rows) == 0:
        return None
    return writing.select(rows)


def _words(ids: list[int]) -> list[int]:
    return ids[: ids.index(SPECIAL_IDS.end)] if SPECIAL_IDS.end in ids else ids
