"""Third stage: the decoder learns sentences from findings, and answers from questions."""

import logging
from dataclasses import fields, replace
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mm import ontology
from mm.batch import SLOT_KINDS, SPECIAL_IDS, Batch, Padded, Slots, Tokens, Writing
from mm.decoder.balance import balance
from mm.decoder.decoder import DecoderOutput, MoEDecoder
from mm.decoder.telemetry import routing_health, visits
from mm.model import Encoded
from mm.training.cached import CachedTask

log = logging.getLogger(__name__)

BALANCE_WEIGHT: Final = 0.01
"""Of the load-balancing loss (Fedus et al. 2022, Switch Transformers, section 2.2)."""
Z_WEIGHT: Final = 1e-3
"""Of the router's z loss (Zoph et al. 2022, ST-MoE, section 3.2)."""
BIAS_RATE: Final = 1e-3
"""Of the selection bias, where the decoder has one (DeepSeek-V3, 2024, section 4.2)."""


def writing_losses(output: DecoderOutput) -> dict[str, Float[Tensor, ""]]:
    """Cross-entropy of every target token, and the router's two losses."""
    return {
        "writing": F.cross_entropy(output.logits.float(), output.targets),
        "balance": BALANCE_WEIGHT * output.load_balancing_loss,
        "router_z": Z_WEIGHT * output.z_loss,
    }


class WriteTask(CachedTask):
    """Fusion and decoder; encoders, finding head, adapters and embeddings are frozen.

    A row is one sentence about one finding (its true code, side, change and grade in the slot), or one question and
    its answer.
    """

    trains: ClassVar[tuple[str, ...]] = ("fusion", "finding_tokens", "decoder")
    _visits: Tensor | None = None

    def cached_losses(self, encoded: Encoded, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Language loss and the router's losses; no balance loss where a bias keeps the balance."""
        if batch.writing is None:
            raise ValueError("the write stage needs reports or questions; see data.rows")
        output = self._decoder()(batch.writing, self._memory(encoded), rows=batch.writing.study)
        self._watch(output, batch)
        losses = writing_losses(output)
        if self._biased():
            del losses["balance"]
        return losses

    def _watch(self, output: DecoderOutput, batch: Batch) -> None:
        """Training: logs the routers' health, keeps the load for the bias. Validation: counts who called whom."""
        if self._trainer is None or batch.writing is None:
            return
        if self.training:
            health = routing_health(output.routings)
            said = {f"router_{field.name}": getattr(health, field.name) for field in fields(health)}
            self.log_dict(said, batch_size=batch.size)
            self._loads.append(output.expert_load)
            return
        codes = batch.writing.slots.code[output.routed_rows]
        groups = 1 + len(ontology.CODES)
        counted = [visits(routing, codes, num_groups=groups) for routing in output.routings]
        both = torch.stack(counted).cpu()
        self._visits = both if self._visits is None else self._visits + both

    def _biased(self) -> bool:
        return self._decoder().routers()[0].selection_bias is not None

    def on_train_start(self) -> None:
        """Starts the clock; no load has been seen."""
        super().on_train_start()
        self._loads: list[Tensor] = []
        self._balanced_at = self.trainer.global_step

    def on_train_batch_end(self, *_: Any) -> None:
        """Behind an optimizer step, moves the selection bias by the load of all that the step was made of."""
        if self.trainer.global_step == self._balanced_at:
            return  # gradients are still being accumulated
        if self._biased():
            load = self.trainer.strategy.reduce(torch.stack(self._loads).mean(0), reduce_op="mean")
            assert isinstance(load, Tensor)
            for router, own in zip(self._decoder().routers(), load, strict=True):
                balance(router, own, rate=BIAS_RATE)
        self._loads, self._balanced_at = [], self.trainer.global_step

    def notes(self) -> dict[str, Any]:
        """Which experts wrote about which finding in the last validation, see `mm.training.experts`."""
        return {} if self._visits is None else {"experts": self._visits.tolist()}

    def _decoder(self) -> MoEDecoder:
        if self.model.decoder is None:
            raise ValueError("the write stage needs a model with `decoder`")
        return self.model.decoder

    def _memory(self, encoded: Encoded) -> Tokens:
        return self.model.fuse(encoded, self.model.find(encoded))

    def on_validation_epoch_start(self) -> None:
        """Forgets the last validation."""
        self._right: list[Tensor] = []
        self._visits = None

    def judge(self, encoded: Encoded, batch: Batch) -> None:
        """Answers the questions and compares, token by token."""
        asked = None if batch.writing is None else questions(batch.writing)
        if asked is None or asked.target is None:
            return
        written = self._decoder().generate(replace(asked, target=None), self._memory(encoded), rows=asked.study)
        answers = [
            row[:length]
            for row, length in zip(asked.target.values.tolist(), asked.target.lengths.tolist(), strict=True)
        ]
        right = [_words(own) == _words(true) for own, true in zip(written.rows(), answers, strict=True)]
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
    slots = writing.slots
    return Writing(
        writing.study[rows],
        Slots(slots.kind[rows], slots.code[rows], slots.side[rows], slots.change[rows], slots.grade[rows]),
        Padded(writing.prompt.values[rows], writing.prompt.lengths[rows]),
        None if writing.target is None else Padded(writing.target.values[rows], writing.target.lengths[rows]),
    )


def _words(ids: list[int]) -> list[int]:
    return ids[: ids.index(SPECIAL_IDS.end)] if SPECIAL_IDS.end in ids else ids
