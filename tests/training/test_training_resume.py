"""What is left of a run that was killed, ran out of room or of numbers, and where it goes on."""

import csv
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import mm
from mm.training.align import AlignTask
from mm.training.cli import main
from mm.training.resume import AtomicCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

STEPS = 8


def losses(folder: Path) -> dict[int, tuple[float, ...]]:
    """The losses of every training step, by step."""
    found = {}
    for file in sorted(folder.rglob("metrics.csv")):
        with file.open(encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                if row["loss"]:
                    found[int(row["step"])] = tuple(float(row[name]) for name in ("loss", "loss_image_text"))
    return found


def averaged(recipe: dict[str, Any]) -> None:
    recipe["model"]["init_args"]["ema"] = 0.9
    recipe["model"]["init_args"]["duplicates"] = "negatives"  # or there is not always someone to draw


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_at_the_exact_step(workers: int, aligning: Any, tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> None:
        averaged(recipe)
        recipe["data"]["workers"] = workers

    assert main(["fit", *aligning("whole", change)]) == 0
    whole = losses(tmp_path / "whole")
    assert sorted(whole) == list(range(STEPS))
    assert len(set(whole.values())) == STEPS
    end = torch.load(tmp_path / "whole/resume/last.ckpt", weights_only=True)
    for step in (3, 4):  # within an epoch, and between two
        start = tmp_path / f"whole/resume/step={step}.ckpt"
        assert main(["fit", *aligning(f"from_{step}", change), "--ckpt_path", str(start)]) == 0
        rest = losses(tmp_path / f"from_{step}")
        assert rest == {number: whole[number] for number in range(step, STEPS)}
        again = torch.load(tmp_path / f"from_{step}/resume/last.ckpt", weights_only=True)
        for part in ("state_dict", "current_model_state", "averaging_state"):
            for name, value in end[part].items():
                assert torch.equal(again[part][name], value), name
        one, other = (mm.load(tmp_path / f"{name}/checkpoint") for name in ("whole", f"from_{step}"))
        assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in one.model.state_dict().items())


def test_the_average_is_what_is_exported(aligning: Any, tmp_path: Path) -> None:
    assert main(["fit", *aligning("run", averaged)]) == 0
    states = [
        torch.load(tmp_path / f"run/resume/step={step}.ckpt", weights_only=True)["current_model_state"]
        for step in range(1, STEPS + 1)
    ]
    exported = mm.load(tmp_path / "run/checkpoint").model.state_dict()
    for name, value in exported.items():
        expected = states[0][f"model.{name}"].double()
        for number, state in enumerate(states[1:], start=1):
            keep = min(0.9, (1 + number) / (10 + number))
            expected = keep * expected + (1 - keep) * state[f"model.{name}"].double()
        if value.ndim >= 2:  # stored in bf16
            torch.testing.assert_close(value.double(), expected, rtol=2**-8, atol=1e-6)
        else:
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    last = states[-1]["model.image_adapter.project.bias"]
    assert not torch.allclose(exported["image_adapter.project.bias"], last, atol=1e-5)
    # A finished run that goes on does so from the weights, not from their average.
    saved = torch.load(tmp_path / "run/resume/last.ckpt", weights_only=True)
    assert all(torch.equal(saved["current_model_state"][name], value) for name, value in states[-1].items())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_no_number_ends_the_run_and_spares_the_last_state(
    where: str, aligning: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = AlignTask.cached_losses

    def poisoned(task: AlignTask, *given: Any) -> dict[str, torch.Tensor]:
        found = honest(task, *given)
        if task.trainer.global_step == 5 and task.training:
            wrong = found["image_text"]
            # The slope of a root at 0 is infinite, and times 0 no number; its value is 0.
            found["image_text"] = wrong * float("nan") if where == "loss" else wrong + (0 * wrong).sqrt()
        return found

    monkeypatch.setattr(AlignTask, "cached_losses", poisoned)
    assert main(["fit", *aligning()]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert said.startswith(f"mm fit: the {where}")
    assert ("(image_text)" in said) == (where == "loss")
    assert "at step 5, batch 1 of epoch 1, training studies " in said
    assert "last.ckpt (--ckpt_path last)" in said
    kept = torch.load(tmp_path / "run/resume/last.ckpt", weights_only=True)
    assert kept["global_step"] == 5
    assert all(bool(value.isfinite().all()) for name, value in kept["state_dict"].items() if "attn_mask" not in name)
    assert not (tmp_path / "run/checkpoint").exists()

    monkeypatch.setattr(AlignTask, "cached_losses", honest)
    assert main(["fit", *aligning("again"), "--ckpt_path", str(tmp_path / "run/resume/last.ckpt")]) == 0
    assert sorted(losses(tmp_path / "again")) == [5, 6, 7]


def test_weights_that_ran_away_are_told_as_a_loss(
    aligning: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(recipe: dict[str, Any]) -> None:
        recipe["model"]["init_args"] |= {"learning_rate": 1e30, "warmup_steps": 1}

    assert main(["fit", *aligning("run", change)]) == 2  # the next step draws from what is no number
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("mm fit: the loss (image_text) is no number at step ")
    assert "Lower learning_rate" in said
    assert (tmp_path / "run/resume/last.ckpt").is_file()


class Full:
    """A file on a disk that has room for a few more bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.file.write(data))

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_spares_the_last_state(
    aligning: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened, made = Path.open, []

    def narrow(path: Path, mode: str = "r", **given: Any) -> Any:
        file = opened(path, mode, **given)
        if not path.name.endswith(".ckpt.new") and ".ckpt." not in path.name:
            return file
        made.append(path)
        return Full(file, 4000) if len(made) == 6 else file  # of a step two files are written

    monkeypatch.setattr(Path, "open", narrow)
    assert main(["fit", *aligning()]) == 2
    said = capsys.readouterr().err.strip()
    assert "No space left on device" in said
    assert "the last good state was kept" in said
    assert ".ckpt" in said
    folder = tmp_path / "run/resume"
    assert sorted(file.name for file in folder.iterdir()) == ["last.ckpt", *(f"step={n}.ckpt" for n in (1, 2, 3))]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2
    assert torch.load(folder / "step=3.ckpt", weights_only=True)["global_step"] == 3


def test_a_place_that_can_not_be_written_to_is_told(tmp_path: Path) -> None:
    target = tmp_path / "folder.ckpt"
    target.mkdir()
    with pytest.raises(OSError, match="the last good state was kept") as caught:
        AtomicCheckpointIO().save_checkpoint({"step": 1}, target)
    assert caught.value.filename == str(target)
    assert list(tmp_path.iterdir()) == [target]


def test_gradients_that_are_still_gathered_are_never_left_out(aligning: Any, tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> None:
        averaged(recipe)
        recipe["trainer"]["accumulate_grad_batches"] = 3  # of 4 batches an epoch
        kept = recipe["trainer"]["callbacks"][0]
        kept["class_path"] = "mm.training.resume.StepCheckpoint"
        kept["init_args"] |= {"every_n_train_steps": None, "train_time_interval": "0:00:00"}

    assert main(["fit", *aligning("whole", change)]) == 0
    whole = losses(tmp_path / "whole")
    states = {step: torch.load(tmp_path / f"whole/resume/step={step}.ckpt", weights_only=True) for step in (1, 2, 3, 4)}
    batches = [states[step]["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] for step in states]
    assert batches == [3, 4, 7, 8]
    assert main(["fit", *aligning("rest", change), "--ckpt_path", str(tmp_path / "whole/resume/step=3.ckpt")]) == 0
    assert losses(tmp_path / "rest").items() <= whole.items()
    one, other = (
        torch.load(tmp_path / f"{name}/resume/last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "rest")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses(aligning: Any, tmp_path: Path) -> None:
    assert main(["fit", *aligning("whole", averaged)]) == 0
    whole = losses(tmp_path / "whole")
    command = [sys.executable, "-m", "mm", "fit", *aligning("killed", averaged)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    resume = tmp_path / "killed/resume"
    limit = time.monotonic() + 120
    while not (resume / "step=2.ckpt").exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    step = torch.load(resume / "last.ckpt", weights_only=True)["global_step"]
    assert 1 <= step < STEPS
    done = losses(tmp_path / "killed")
    assert done == {number: whole[number] for number in done}
    for file in (tmp_path / "killed/log").rglob("metrics.csv"):
        file.unlink()
    assert main(["fit", *aligning("killed", averaged), "--ckpt_path", "last"]) == 0
    assert losses(tmp_path / "killed") == {number: whole[number] for number in range(step, STEPS)}
    one, other = (mm.load(tmp_path / f"{name}/checkpoint").model.state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
