"""All stages at once, nothing frozen and nothing cached: for tiny models, and for machines with an accelerator."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mm.data.datamodule import Numbered
from mm.training.align import AlignTask, align_losses
from mm.training.findings import FindingsTask, finding_losses
from mm.training.routing import RoutedTask
from mm.training.write import WriteTask


class JointTask(RoutedTask, FindingsTask):
    """Sum of the losses of the three stages; what the model or the data lacks is left out."""

    trains: ClassVar[tuple[str, ...]] = (*FindingsTask.trains, *AlignTask.trains, *WriteTask.trains)

    def losses(self, numbered: Numbered) -> dict[str, Float[Tensor, ""]]:
        """Findings, contrast and writing."""
        batch = numbered[1]
        outputs = self.model(batch)
        losses = finding_losses(self.model, batch, outputs.findings)
        if outputs.text is not None and batch.size > 1:
            losses |= align_losses(self.model, outputs.encoded, batch)
        if outputs.writing is not None:
            losses |= self.write_losses(outputs.writing, batch)
        return losses

    def validation_step(self, numbered: Numbered, batch_idx: int) -> None:  # noqa: ARG002
        """As the findings stage; the decoder's losses are logged beside it."""
        batch = numbered[1]
        outputs = self.model(batch)
        assert outputs.findings is not None
        self.hear(outputs.findings, batch)
        if outputs.writing is not None:
            losses = self.write_losses(outputs.writing, batch)
            said = {f"{self.judged}_loss_{name}": item.float() for name, item in losses.items()}
            self.log_dict(said, batch_size=batch.size)
