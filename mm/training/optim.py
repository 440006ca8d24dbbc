"""AdamW groups, and a learning rate that follows the share of the run that is done, in steps or in wall time."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from torch import nn


def parameter_groups(
    module: nn.Module, *, weight_decay: float, rates: Mapping[nn.Parameter, float] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in groups: matrices and kernels decay; vectors and embeddings do not.

    Args:
        module: Frozen parameters of it are left out.
        weight_decay: Of matrices and kernels.
        rates: Factors on the learning rate; 1 for a parameter that isn't there. Each makes groups of its own, which
            have it as `rate`.

    Raises:
        ValueError: Nothing in it is trainable.
    """
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            kept = parameter.ndim < 2 or id(parameter) in embeddings
            groups.setdefault((-(rates or {}).get(parameter, 1.0), kept), []).append(parameter)
    if not groups:
        raise ValueError("nothing to train: every parameter is frozen; name at least one part in `train`")
    return [
        {"params": groups[rate, kept], "weight_decay": 0.0 if kept else weight_decay, "rate": -rate}
        for rate, kept in sorted(groups)
    ]


def progress(trainer: Trainer) -> float:
    """Share of the run that is done, 0 to 1: the largest of steps, epochs and wall time, whichever are limited.

    Wall time is that of training alone and survives a resume (Lightning's Timer, `trainer.max_time`).
    """
    shares = [0.0]
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and math.isfinite(trainer.num_training_batches):
        updates = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) * trainer.max_epochs
        shares.append(trainer.global_step / max(updates, 1))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set on the instance by a connector
        if isinstance(callback, Timer) and (remaining := callback.time_remaining()) is not None:
            elapsed = callback.time_elapsed()
            shares.append(elapsed / max(elapsed + remaining, 1e-9))
    return min(max(shares), 1.0)


def warmup_cosine(*, step: int, warmup_steps: int, done: float, floor: float = 0.01) -> float:
    """Factor on the learning rate: linear over the first steps, then half a cosine over the run.

    Args:
        step: Optimizer steps taken so far.
        warmup_steps: Steps until the full rate.
        done: Share of the run, 0 to 1.
        floor: Factor at the end of the run.
    """
    warm = min(1.0, (step + 1) / max(warmup_steps, 1))
    return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def adamw(
    module: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    rates: Mapping[nn.Parameter, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters (Loshchilov and Hutter 2019), betas .9 and .98.

    Args:
        module: What is trained.
        learning_rate: Where the factor is 1.
        weight_decay: Of matrices and kernels.
        rates: See `parameter_groups`.
    """
    groups = parameter_groups(module, weight_decay=weight_decay, rates=rates)
    for group in groups:
        group["lr"] = learning_rate * group.pop("rate")
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-8)
