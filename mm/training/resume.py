"""Lightning's .ckpt files: a kill, a full disk or a loss that is no number leaves the last good one whole."""

import os
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Int
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

MOST_NAMED: Final = 12
"""Studies of a batch that an error names."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, flushes, then renames.

    Lightning's own writes to TMPDIR and moves, which a full disk or a kill turns into a broken file.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any | None = None,  # noqa: ARG002
    ) -> None:
        """Writes `checkpoint` to `path`.

        Raises:
            OSError: It can't be written, such as for want of room; what was at `path` is still there.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{os.getpid()}.new")
        try:
            with scratch.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(target)
            _flush(target.parent)
        except (OSError, RuntimeError) as error:
            # A file that can't be written to makes torch fail on the way out of its writer, with an error of its own.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            said = f"{cause.strerror or cause}; the last good state was kept. Make room and go on with --ckpt_path last"
            raise OSError(cause.errno, said, str(target)) from error
        finally:
            scratch.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any | None = None,
        weights_only: bool | None = None,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Reads what `save_checkpoint` wrote; tensors and plain data only."""
        content = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        assert isinstance(content, dict)
        return content

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Deletes a file that is no longer among the kept ones."""
        Path(path).unlink(missing_ok=True)


class StepCheckpoint(ModelCheckpoint):
    """Lightning's, but never between the batches of one optimizer step: no file keeps their gradients."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Saves if it is time and a step is done."""
        last: bool = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def not_finite(task: LightningModule, what: str, studies: Int[Tensor, " B"]) -> str:
    """What a user is told when training can't go on, with the place and the last good state.

    Args:
        task: In training.
        what: That is no number.
        studies: Of the batch, by their number in the training split.
    """
    trainer = task.trainer
    some = ", ".join(map(str, studies[:MOST_NAMED].tolist())) + (", ..." if len(studies) > MOST_NAMED else "")
    batch = trainer.fit_loop.epoch_loop.batch_idx
    paths = (getattr(item, "last_model_path", "") for item in trainer.checkpoint_callbacks)
    kept = next(filter(None, paths), "")
    last = f"the last good state is {kept} (--ckpt_path last)" if kept else "no state was kept yet"
    return (
        f"{what} is no number at step {trainer.global_step}, batch {batch} of epoch {trainer.current_epoch},"
        f" training studies {some}; {last}. Lower learning_rate, set trainer.gradient_clip_val, or look at these"
        " studies"
    )


def _flush(folder: Path) -> None:
    """Makes a new name in a folder last through a power cut."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
