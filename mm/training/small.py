"""Behind the findings stage: findings of a voxel or two, learnt alone from what the voxels of each cell say.

They need more patients than a stage with the tower can afford, and no tower: a step costs what rendering does.
"""

import logging
from dataclasses import replace
from typing import ClassVar, Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mm import ontology
from mm.batch import Batch
from mm.data.datamodule import Numbered
from mm.encoders.cells import CELL, cell_statistics
from mm.finding_loss import PictureTruth, small_losses, volume_truth, within
from mm.finding_maps import coordinates
from mm.finding_small import SMALL
from mm.findings import FindingHead
from mm.training.scores import area_under_curve, best_f1
from mm.training.task import Task

log = logging.getLogger(__name__)

WINDOW: Final = 0.65
"""Share of each axis that a step looks at: a quarter of the cells, in which nearly as much is to be learnt."""


class SmallTask(Task):
    """The maps of `mm.finding_small` alone, on windows of current volumes; thresholds stay as they are.

    A findings stage behind it reads presence from the maps.
    """

    trains: ClassVar[tuple[str, ...]] = ("findings.small",)

    def setup(self, stage: str) -> None:  # noqa: ARG002  # Lightning's signature
        """Checks that there is something to train.

        Raises:
            ValueError: The model has no maps of small findings.
        """
        if not set(self.trains) <= set(self.learning):
            raise ValueError("the stage of small findings needs a model with `volume.statistics: true` and `findings`")
        self._said: list[Float[Tensor, "N M"]] = []
        self._true: list[Bool[Tensor, "N M"]] = []

    def losses(self, numbered: Numbered) -> dict[str, Float[Tensor, ""]]:
        """The losses of the maps in a window drawn anew, and of presence read from their surest cells."""
        maps, truth, window = self._look(numbered[1], share=WINDOW)
        return small_losses(maps, truth, findings=SMALL, stride=CELL, window=window)

    def _look(
        self, batch: Batch, *, share: float
    ) -> tuple[Float[Tensor, "N M *window"], PictureTruth, tuple[slice, ...]]:
        """Maps of a window of the current volumes, the truth of the volumes, and which cells the window has.

        Raises:
            ValueError: The data has no volumes, or no masks of them.
        """
        head, volumes, targets = self.model.findings, batch.volumes, batch.targets
        assert isinstance(head, FindingHead)
        assert head.small is not None
        if volumes is None or targets is None or targets.volume_bits is None:
            raise ValueError("the stage of small findings needs volumes with masks, such as those of phantom patients")
        study = (volumes.count > 0).nonzero()[:, 0]
        bits = targets.volume_bits & sum(1 << k for k in SMALL)  # the others' masks needn't be pooled
        truth = volume_truth(replace(targets, volume_bits=bits), (study, torch.zeros_like(study)), CELL)
        assert truth is not None
        x, shape = volumes.values[study, 0], truth.share.shape[2:]
        window = tuple(_part(length, share) for length in shape)
        voxels = tuple(slice(part.start * step, part.stop * step) for part, step in zip(window, CELL, strict=True))
        place = within(coordinates(x.new_empty(1, 1, *shape)), window)
        maps = head.small(cell_statistics(within(x, voxels)), place=place)
        return maps.float(), truth, window

    def on_validation_epoch_start(self) -> None:
        """Forgets the last validation."""
        self._said, self._true = [], []

    def validation_step(self, numbered: Numbered, batch_idx: int) -> None:  # noqa: ARG002
        """Logs the loss and keeps what was said."""
        maps, truth, window = self._look(numbered[1], share=1.0)
        losses = small_losses(maps, truth, findings=SMALL, stride=CELL, window=window)
        self.log(f"{self.judged}_loss", torch.stack(list(losses.values())).sum(), batch_size=numbered[1].size)
        self._said.append(maps.flatten(2).amax(-1).cpu())
        self._true.append(truth.valid[:, list(SMALL)].any(-1).cpu())

    def on_validation_epoch_end(self) -> None:
        """Logs the area under the curve and the best F1 of each finding, by its surest cell."""
        said, true = torch.cat(self._said), torch.cat(self._true)
        for column, k in enumerate(SMALL):
            scores = {
                f"{name}_{ontology.CODES[k]}": score(said[:, column], true[:, column])
                for name, score in (("auroc", area_under_curve), ("f1", best_f1))
            }
            known = {name: value for name, value in scores.items() if value is not None}
            self.log_dict({f"{self.judged}_{name}": value for name, value in known.items()})
            spoken = ", ".join(f"{name} {value:.3f}" for name, value in known.items())
            log.info("step %d, %d volumes. %s", self.trainer.global_step, len(true), spoken)


def _part(length: int, share: float) -> slice:
    """A stretch of an axis, drawn from torch's random state."""
    size = max(1, round(share * length))
    start = int(torch.randint(length - size + 1, ()))
    return slice(start, start + size)
