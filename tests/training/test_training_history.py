"""The history stage: nothing moves but the history head, thresholds included."""

from pathlib import Path

import pytest
import torch

import mm
from mm.training.cli import main


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_only_the_history_head_learns(tiny_checkpoint: Path, tmp_path: Path) -> None:
    words = ["fit", "-c", "train_history_phantom", "--trainer.default_root_dir", str(tmp_path / "run")]
    words += ["--model.init_args.init_from", str(tiny_checkpoint), "--model.init_args.warmup_steps", "1"]
    words += ["--data.train_studies", "4", "--data.val_studies", "4", "--data.workers", "0", "--data.batch_size", "4"]
    words += ["--trainer.max_epochs", "1", "--trainer.max_time", "null", "--trainer.val_check_interval", "null"]
    words += ["--trainer.logger.init_args.save_dir", str(tmp_path / "logs")]
    assert main(words) == 0
    before, after = mm.load(tiny_checkpoint), mm.load(tmp_path / "run" / "checkpoint")
    old, new = before.model.state_dict(), after.model.state_dict()
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        f"findings.history.{name}" for name, _ in before.model.findings.history.named_parameters()
    }
    scores = after.card.stages[-1]["scores"]
    assert 0 <= scores["val_change_balanced_accuracy"] <= 1
