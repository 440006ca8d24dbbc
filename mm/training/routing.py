"""What every stage that trains the decoder does about its routers: losses, health in the log, balance, counts."""

from dataclasses import fields
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from mm import ontology
from mm.batch import Batch
from mm.decoder.balance import balance
from mm.decoder.output import DecoderOutput
from mm.decoder.router import Router
from mm.decoder.telemetry import routing_health, visits
from mm.training.task import Task

BALANCE_WEIGHT: Final = 0.01
"""Of the load-balancing loss (Fedus et al. 2022, Switch Transformers, section 2.2)."""
Z_WEIGHT: Final = 1e-3
"""Of the router's z loss (Zoph et al. 2022, ST-MoE, section 3.2)."""
BIAS_RATE: Final = 1e-3
"""Of the selection bias, where the decoder has one (DeepSeek-V3, 2024, section 4.2)."""


def writing_losses(output: DecoderOutput) -> dict[str, Float[Tensor, ""]]:
    """Cross-entropy of every target token, and the router's two losses where there are experts."""
    losses = {"writing": output.cross_entropy()}
    if output.routings:
        losses["balance"] = BALANCE_WEIGHT * output.load_balancing_loss
        losses["router_z"] = Z_WEIGHT * output.z_loss
    return losses


class RoutedTask(Task):
    """A stage whose losses hold the decoder's; one without a decoder, or without experts, is left alone."""

    _visits: Tensor | None = None

    def write_losses(self, output: DecoderOutput, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Language loss and the router's losses; no balance loss where a bias keeps the balance.

        Training also logs the routers' health and keeps their load for the bias; validation counts who called whom.
        """
        losses = writing_losses(output)
        if output.routings:
            self._watch(output, batch)
        if self._biased():
            del losses["balance"]
        return losses

    def _watch(self, output: DecoderOutput, batch: Batch) -> None:
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

    def _routers(self) -> tuple[Router, ...]:
        return () if self.model.decoder is None else self.model.decoder.routers()

    def _biased(self) -> bool:
        return any(router.selection_bias is not None for router in self._routers())

    def on_train_start(self) -> None:
        """Starts the clock; no load has been seen."""
        super().on_train_start()
        self._loads: list[Tensor] = []
        self._balanced_at = self.trainer.global_step

    def on_train_batch_end(self, *_: Any) -> None:
        """Behind an optimizer step, moves the selection bias by the load of all that the step was made of."""
        if self.trainer.global_step == self._balanced_at:
            return  # gradients are still being accumulated
        if self._biased() and self._loads:
            load = self.trainer.strategy.reduce(torch.stack(self._loads).mean(0), reduce_op="mean")
            assert isinstance(load, Tensor)
            for router, own in zip(self._routers(), load, strict=True):
                balance(router, own, rate=BIAS_RATE)
        self._loads, self._balanced_at = [], self.trainer.global_step

    def on_validation_epoch_start(self) -> None:
        """Forgets the last validation."""
        super().on_validation_epoch_start()
        self._visits = None

    def notes(self) -> dict[str, Any]:
        """Which experts wrote about which finding in the last validation, see `mm.training.experts`."""
        return {} if self._visits is None else {"experts": self._visits.tolist()}
