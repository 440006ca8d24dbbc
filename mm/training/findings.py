"""First stage: encoders and finding head, on masks and presence. Everything later stands on what it learns."""

import logging
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mm.batch import Batch
from mm.data.datamodule import Numbered
from mm.findings import FindingHead, FindingOutputs
from mm.model import MultimodalModel
from mm.training.scores import finding_scores, table
from mm.training.task import Task

log = logging.getLogger(__name__)


def finding_losses(model: MultimodalModel, batch: Batch, found: FindingOutputs) -> dict[str, Float[Tensor, ""]]:
    """The finding head's weighted losses by name.

    Raises:
        ValueError: The data has no truth of findings.
    """
    if batch.targets is None:
        raise ValueError("the findings stage needs a data set with findings and masks, such as data.spec phantom")
    assert isinstance(model.findings, FindingHead)
    return model.findings.losses(found, batch.targets)


class FindingsTask(Task):
    """Encoders and finding head; fusion, text encoder and decoder are left alone."""

    trains: ClassVar[tuple[str, ...]] = ("volume", "image", "audio", "record", "findings")

    def setup(self, stage: str) -> None:  # noqa: ARG002  # Lightning's signature
        """Checks that there is something to train.

        Raises:
            ValueError: The model has no finding head.
        """
        if self.model.findings is None:
            raise ValueError("the findings stage needs a model with `findings`")
        self._heard: list[Verdict] = []

    def losses(self, numbered: Numbered) -> dict[str, Float[Tensor, ""]]:
        """The head's losses."""
        batch = numbered[1]
        found = self.model.find(self.model.encode(batch))
        assert found is not None
        return finding_losses(self.model, batch, found)

    def on_validation_epoch_start(self) -> None:
        """Forgets the last validation."""
        self._heard = []

    def validation_step(self, numbered: Numbered, batch_idx: int) -> None:  # noqa: ARG002
        """Logs the loss and keeps what the head said."""
        batch = numbered[1]
        found = self.model.find(self.model.encode(batch))
        assert found is not None
        losses = finding_losses(self.model, batch, found)
        self.log("val_loss", torch.stack([item.float() for item in losses.values()]).sum(), batch_size=batch.size)
        self._heard.append(Verdict(found, batch))

    def on_validation_epoch_end(self) -> None:
        """Logs each finding's area under the curve and F1, and the accuracy of change."""
        if not self._heard:
            return
        logits, labels = (torch.cat([getattr(item, name) for item in self._heard]) for name in ("presence", "labels"))
        scores = finding_scores(logits, labels)
        change = torch.cat([item.change_correct for item in self._heard]).float()
        if len(change):
            scores["change_accuracy"] = float(change.mean())
        self.log_dict({f"val_{name}": value for name, value in scores.items()})
        log.info("step %d, %d studies. %s", self.trainer.global_step, len(labels), table(scores))

    def test_step(self, numbered: Numbered, batch_idx: int) -> None:
        """The same on the test split."""
        self.validation_step(numbered, batch_idx)

    def on_test_epoch_start(self) -> None:
        """The same on the test split."""
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        """The same on the test split."""
        self.on_validation_epoch_end()

    def seal(self) -> None:
        """Sets temperatures, biases and thresholds from the last validation."""
        head = self.model.findings
        assert isinstance(head, FindingHead)
        names = ("presence", "labels", "before", "before_labels")
        presence, labels, before, before_labels = (
            torch.cat([getattr(item, name) for item in self._heard]).to(head.threshold.device) for name in names
        )
        head.calibrate(presence, labels, before=before, before_labels=before_labels)


class Verdict:
    """What the head said of one batch, and the truth, on the CPU and in float32."""

    def __init__(self, found: FindingOutputs, batch: Batch) -> None:
        targets = batch.targets
        assert targets is not None
        self.presence = found.presence.detach().float().cpu()
        self.labels = targets.present.cpu()
        self.before = found.before.detach().float().cpu()
        self.before_labels = torch.zeros_like(self.labels)
        if targets.count is not None and targets.count.shape[1] > 1:
            self.before_labels = (targets.count[:, 1] > 0).cpu()
        # Only where there is a prior does the head choose among the changes.
        known = (targets.change > 0).cpu() & (found.change[..., 0] < 0).cpu()
        self.change_correct = found.change.argmax(-1).cpu()[known] == targets.change.cpu()[known]
