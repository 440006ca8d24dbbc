"""First stage: encoders and finding head, on masks and presence. Everything later stands on what it learns."""

import logging
import math
from typing import ClassVar, Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mm import ontology
from mm.batch import Batch, Targets
from mm.data.datamodule import Numbered
from mm.findings import FindingHead, FindingOutputs
from mm.instances import Instance, candidates
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
        self.hear(found, batch)

    def hear(self, found: FindingOutputs, batch: Batch) -> None:
        """Logs the loss of one batch and keeps what the head said."""
        losses = finding_losses(self.model, batch, found)
        total = torch.stack([item.float() for item in losses.values()]).sum()
        self.log(f"{self.judged}_loss", total, batch_size=batch.size)
        assert isinstance(self.model.findings, FindingHead)
        self._heard.append(Verdict(self.model.findings, found, batch))

    def on_validation_epoch_end(self) -> None:
        """Logs each finding's area under the curve and F1, and the accuracy of change."""
        if not self._heard:
            return
        logits, labels = (torch.cat([getattr(item, name) for item in self._heard]) for name in ("presence", "labels"))
        scores = finding_scores(logits, labels)
        change = torch.cat([item.change_correct for item in self._heard]).float()
        if len(change):
            scores["change_accuracy"] = float(change.mean())
        self.log_dict({f"{self.judged}_{name}": value for name, value in scores.items()})
        log.info("step %d, %d studies. %s", self.trainer.global_step, len(labels), table(scores))

    def seal(self) -> None:
        """Sets temperatures, biases and thresholds from the last validation."""
        head = self.model.findings
        assert isinstance(head, FindingHead)
        names = ("presence", "labels", "before", "before_labels")
        presence, labels, before, before_labels = (
            torch.cat([getattr(item, name) for item in self._heard]).to(head.threshold.device) for name in names
        )
        head.calibrate(presence, labels)
        head.calibrate_before(before, before_labels)
        scores, hits, finding = (
            torch.cat([getattr(item, name) for item in self._heard])
            for name in ("instance_scores", "instance_hits", "instance_finding")
        )
        num_true = torch.stack([item.num_true for item in self._heard]).sum(0)
        head.calibrate_instances(scores, hits, finding, num_true)


def shown_before(targets: Targets) -> Bool[Tensor, "B K"]:
    """Which findings the last prior shows, on the CPU; none where there is no prior."""
    if targets.count is None or targets.count.shape[1] < 2:
        return torch.zeros_like(targets.present, device="cpu")
    return (targets.count[:, 1] > 0).cpu()


LEAST_SCORE: Final = 0.02
"""Candidates fainter than this can't become instances."""


class Verdict:
    """What the head said of one batch, and the truth, on the CPU and in float32."""

    def __init__(self, head: FindingHead, found: FindingOutputs, batch: Batch) -> None:
        targets = batch.targets
        assert targets is not None
        self.presence = found.presence.detach().float().cpu()
        self.labels = targets.present.cpu()
        self.before = found.before.detach().float().cpu()
        self.before_labels = shown_before(targets)
        # Only where there is a prior does the head choose among the changes.
        known = (targets.change > 0).cpu() & (found.change[..., 0] < 0).cpu()
        self.change_correct = found.change.argmax(-1).cpu()[known] == targets.change.cpu()[known]
        self._match(head, found, targets)

    def _match(self, head: FindingHead, found: FindingOutputs, targets: Targets) -> None:
        """Candidates of the findings that are there, each true instance to the nearest of them on its side."""
        scores: list[float] = []
        hits: list[bool] = []
        finding: list[int] = []
        self.num_true = torch.zeros(len(ontology.FINDINGS), dtype=torch.long)
        for b, k in self.labels.nonzero().tolist():
            if targets.count is None or found.volume is None or int(targets.count[b, 0, k]) == 0:
                continue
            assert targets.centers is not None
            assert targets.sides is not None
            number = int(targets.count[b, 0, k])
            self.num_true[k] += number
            true = list(
                zip(targets.centers[b, 0, k, :number].tolist(), targets.sides[b, 0, k, :number].tolist(), strict=True)
            )
            for item in candidates(head, found, b, k, least=LEAST_SCORE):
                own = nearest(item, true, spacing_mm=head.spacing_mm, within_mm=ontology.FINDINGS[k].separation_mm)
                if own is not None:
                    true.pop(own)
                scores.append(item.score)
                hits.append(own is not None)
                finding.append(k)
        self.instance_scores = torch.tensor(scores, dtype=torch.float32)
        self.instance_hits = torch.tensor(hits, dtype=torch.bool)
        self.instance_finding = torch.tensor(finding, dtype=torch.long)


def nearest(
    item: Instance, true: list[tuple[list[float], int]], *, spacing_mm: tuple[float, ...], within_mm: float
) -> int | None:
    """Index of the nearest true instance on the candidate's side and within reach; None without one."""
    best, index = within_mm, None
    for number, (center, side) in enumerate(true):
        if ontology.SIDES[side] != item.side:
            continue
        apart = math.dist(
            [a * mm for a, mm in zip(center, spacing_mm, strict=True)],
            [a * mm for a, mm in zip(item.center, spacing_mm, strict=True)],
        )
        if apart <= best:
            best, index = apart, number
    return index
