"""The stage of small findings: nothing moves but their maps, they are learnt, and data without volumes is refused."""

from pathlib import Path

import pytest
import torch

import mm
from mm.encoders.cells import CELL, NUM_STATISTICS, cell_statistics
from mm.finding_loss import PictureTruth, small_losses, within
from mm.finding_maps import NUM_FINDINGS, coordinates
from mm.finding_small import SMALL, SmallFindings
from mm.training.cli import main

SHAPE = (8, 16, 16)
CELLS = (4, 4, 4)


def words(checkpoint: Path, folder: Path) -> list[str]:
    run = ["fit", "-c", "train_small_phantom", "--trainer.default_root_dir", str(folder / "run")]
    run += ["--model.init_args.init_from", str(checkpoint), "--model.init_args.warmup_steps", "1"]
    run += ["--data.train_studies", "4", "--data.val_studies", "4", "--data.workers", "0", "--data.batch_size", "2"]
    run += ["--trainer.max_epochs", "1", "--trainer.max_steps", "-1"]
    return [*run, "--trainer.logger.init_args.save_dir", str(folder / "logs")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_only_the_maps_of_small_findings_learn(tmp_path: Path) -> None:
    start = mm.load("default")
    assert main(words(Path("default"), tmp_path)) == 0
    after = mm.load(tmp_path / "run" / "checkpoint")
    old, new = start.model.state_dict(), after.model.state_dict()
    assert start.model.findings is not None
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        f"findings.small.{name}" for name, _ in start.model.findings.small.named_parameters()
    }
    assert "val_loss" in after.card.stages[-1]["scores"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_data_without_volumes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(Path("default"), tmp_path), "--data.inputs", "[record]"]) != 0
    assert "needs volumes with masks" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_model_without_such_maps_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tiny_checkpoint, tmp_path)) != 0
    assert "`volume.statistics: true`" in capsys.readouterr().err


def plaques(number: int, seed: int) -> tuple[torch.Tensor, PictureTruth]:
    """Noise, and in every other volume a bright voxel."""
    draw = torch.Generator().manual_seed(seed)
    x = 40 + 20 * torch.randn(number, 1, *SHAPE, generator=draw)
    k = SMALL[0]
    share = torch.zeros(number, NUM_FINDINGS, *CELLS)
    valid = torch.zeros(number, NUM_FINDINGS, 1, dtype=torch.bool)
    centers = torch.zeros(number, NUM_FINDINGS, 1, 3)
    for index in range(0, number, 2):
        at = [int(torch.randint(length, (), generator=draw)) for length in SHAPE]
        x[(index, 0, *at)] = 300.0
        share[(index, k, *(a // step for a, step in zip(at, CELL, strict=True)))] = 1 / 32
        valid[index, k], centers[index, k, 0] = True, torch.tensor(at, dtype=torch.float32)
    return x, PictureTruth(share, valid, centers, torch.ones_like(centers[..., 0]), torch.zeros_like(valid).long())


def test_a_bright_voxel_is_learnt() -> None:
    torch.manual_seed(0)
    maps, whole = SmallFindings(NUM_STATISTICS), (slice(None),) * 3
    learner = torch.optim.Adam(maps.parameters(), 5e-3)
    for step in range(200):
        x, truth = plaques(8, step)
        losses = small_losses(maps(cell_statistics(x)), truth, findings=SMALL, stride=CELL, window=whole)
        learner.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        learner.step()
    x, truth = plaques(40, 1000)
    with torch.no_grad():
        said = maps(cell_statistics(x))[:, 0].flatten(1)
    assert said[::2].amax(1).min() > said[1::2].amax(1).max()
    assert bool((said[::2].argmax(1) == truth.share[::2, SMALL[0]].flatten(1).argmax(1)).all())


def test_the_loss_of_a_window_is_that_of_its_cells_alone() -> None:
    x, truth = plaques(2, 0)
    at = truth.share[0, SMALL[0]].nonzero()[0].tolist()
    inside = tuple(slice(max(0, a - 1), a + 2) for a in at)
    beside = tuple(slice(0, a) if a else slice(a + 1, length) for a, length in zip(at, CELLS, strict=True))
    torch.manual_seed(0)
    maps = SmallFindings(NUM_STATISTICS)
    statistics = cell_statistics(x)
    place = coordinates(statistics)
    for window, present in ((inside, 1.0), (beside, 0.0)):
        said = maps(within(statistics, window), place=within(place, window))
        losses = small_losses(said, truth, findings=SMALL, stride=CELL, window=window)
        top = said.flatten(1).amax(1)
        expected = torch.nn.functional.binary_cross_entropy_with_logits(top, torch.tensor([present, 0.0]))
        torch.testing.assert_close(losses["presence"], expected)
    torch.testing.assert_close(maps(statistics), maps(statistics, place=place))
