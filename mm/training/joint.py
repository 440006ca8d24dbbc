"""All stages at once, nothing frozen and nothing cached: for tiny models, and for machines with an accelerator."""

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from mm.data.datamodule import Numbered
from mm.training.align import AlignTask
from mm.training.findings import FindingsTask, finding_losses
from mm.training.pairs import Duplicates, Loss, PairLosses, PairWeights
from mm.training.routing import RoutedTask
from mm.training.write import WriteTask


class JointTask(RoutedTask, FindingsTask):
    """Sum of the losses of the three stages; what the model or the data lacks is left out."""

    trains: ClassVar[tuple[str, ...]] = (*FindingsTask.trains, *AlignTask.trains, *WriteTask.trains)

    def __init__(
        self,
        *,
        loss: Loss = "info_nce",
        duplicates: Duplicates = "soft",
        weights: PairWeights | None = None,
        **kwargs: Any,
    ) -> None:
        """Makes the stage.

        Args:
            loss: As of `AlignTask`.
            duplicates: As of `AlignTask`.
            weights: As of `AlignTask`.
            **kwargs: Of `Task`.
        """
        super().__init__(**kwargs)
        self.pairs = PairLosses(loss=loss, duplicates=duplicates, weights=weights)

    def losses(self, numbered: Numbered) -> dict[str, Float[Tensor, ""]]:
        """Findings, contrast and writing."""
        batch = numbered[1]
        outputs = self.model(batch)
        losses = finding_losses(self.model, batch, outputs.findings)
        if outputs.text is not None and batch.size > 1:
            losses |= self.pairs(self.model, outputs.encoded, self.pairs.partners(batch), outputs.text)
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
