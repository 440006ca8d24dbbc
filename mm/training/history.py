"""After the findings stage: what became of each finding between two visits, on maps that move no more."""

import logging
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm import ontology
from mm.batch import Batch
from mm.data.datamodule import Numbered
from mm.findings import FindingHead, FindingOutputs
from mm.training.findings import finding_losses, shown_before
from mm.training.task import Task

log = logging.getLogger(__name__)


class HistoryTask(Task):
    """The history head alone. Thresholds of presence stay as the findings stage has sealed them."""

    trains: ClassVar[tuple[str, ...]] = ("findings.history",)

    def setup(self, stage: str) -> None:  # noqa: ARG002  # Lightning's signature
        """Checks that there is something to train.

        Raises:
            ValueError: The model reads no volumes.
        """
        if not set(self.trains) <= set(self.learning):
            raise ValueError("the history stage needs a model with `volume` and `findings`")
        self._true: list[Int[Tensor, " N"]] = []
        self._said: list[Int[Tensor, " N"]] = []
        self._before: list[Float[Tensor, "B K"]] = []
        self._shown: list[Bool[Tensor, "B K"]] = []

    def losses(self, numbered: Numbered) -> dict[str, Float[Tensor, ""]]:
        """The cross-entropy of the change of the findings that have one."""
        batch, found = self._find(numbered)
        return {"change": finding_losses(self.model, batch, found)["change"]}

    def _find(self, numbered: Numbered) -> tuple[Batch, FindingOutputs]:
        batch = numbered[1]
        found = self.model.find(self.model.encode(batch))
        assert found is not None
        return batch, found

    def on_validation_epoch_start(self) -> None:
        """Forgets the last validation."""
        self._true, self._said, self._before, self._shown = [], [], [], []

    def validation_step(self, numbered: Numbered, batch_idx: int) -> None:  # noqa: ARG002
        """Logs the loss and keeps what was said."""
        batch, found = self._find(numbered)
        assert batch.targets is not None
        self.log(f"{self.judged}_loss", finding_losses(self.model, batch, found)["change"], batch_size=batch.size)
        known = (batch.targets.change > 0) & (found.change[..., 0] < 0)
        self._true.append(batch.targets.change[known].cpu())
        self._said.append(found.change[known].argmax(-1).cpu())
        self._before.append(found.before.float().cpu())
        self._shown.append(shown_before(batch.targets))

    def on_validation_epoch_end(self) -> None:
        """Logs the recall of each change and their mean."""
        true, said = torch.cat(self._true), torch.cat(self._said)
        recalls = {
            name: float((said[true == index] == index).float().mean())
            for index, name in enumerate(ontology.CHANGES)
            if bool((true == index).any())
        }
        scores = {f"recall_{name}": value for name, value in recalls.items()}
        scores["change_balanced_accuracy"] = sum(recalls.values()) / max(1, len(recalls))
        self.log_dict({f"{self.judged}_{name}": value for name, value in scores.items()})
        spoken = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        log.info("step %d, %d changes. %s", self.trainer.global_step, len(true), spoken)

    def seal(self) -> None:
        """Sets from the last validation what counts as shown by the prior."""
        head = self.model.findings
        assert isinstance(head, FindingHead)
        device = head.before_threshold.device
        head.calibrate_before(torch.cat(self._before).to(device), torch.cat(self._shown).to(device))
