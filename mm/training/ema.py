"""A moving average of the weights, which is validated and exported in their place."""

from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class MovingAverage(WeightAveraging):
    """Exponential moving average by optimizer step (Polyak and Juditsky 1992), kept by Lightning's callback.

    Validation sees the average; training goes on from the weights themselves; both are in every .ckpt, and once
    fitting is over the average takes the weights' place. Batch norm's statistics are those of the last step.

    Args:
        decay: Of the average, once warm. Before, it is (1 + n) / (10 + n) at the n-th step, or a short run would
            end with much of its first, random weights.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema must be above 0 and below 1, got {decay}")

        def average(kept: list[Tensor], current: list[Tensor], number: Tensor | int) -> None:
            steps = torch.as_tensor(number, device=kept[0].device)  # no wait for an accelerator
            now = ((1 + steps) / (10 + steps)).clamp(max=decay)
            weight = (1 - now).to(kept[0].dtype)  # once: a tensor of its own for each takes a tenth of a small step
            for mean, item in zip(kept, current, strict=True):
                mean.lerp_(item, weight)

        super().__init__(use_buffers=False, multi_avg_fn=average)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Nothing yet: behind this hook the last .ckpt is written, from which training must be able to go on."""

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002  # Lightning's signature
        """Puts the average in the weights' place."""
        self._copy_average_to_current(pl_module)
