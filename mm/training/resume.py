"""Lightning's .ckpt files, written so that a kill at any moment leaves the previous one whole."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO


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
        """Writes `checkpoint` to `path`."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{os.getpid()}.new")
        try:
            with scratch.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(target)
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
