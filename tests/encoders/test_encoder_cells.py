"""Statistics of a pyramid's cells: by the definition, mirrored with the volume, and blind to nothing one voxel wide."""

import pytest
import torch
import torch.nn.functional as F

from mm.encoders.cells import CELL, NUM_STATISTICS, WINDOWS_HU, cell_statistics
from mm.encoders.resnet3d import ResNet3DEncoder
from mm.findings import FindingHead

SHAPE = (8, 16, 24)


def volume(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 400 - 200


def test_windows_are_greatest_mean_and_least_as_pytorch_pools_them() -> None:
    x = volume()
    got = cell_statistics(x).unflatten(1, (-1, 3))
    for index, (low, high) in enumerate(WINDOWS_HU):
        scaled = ((x - low) / (high - low) * 2 - 1).clamp(-1, 1)
        expected = [F.max_pool3d(scaled, CELL), F.avg_pool3d(scaled, CELL), -F.max_pool3d(-scaled, CELL)]
        torch.testing.assert_close(got[:, index], torch.cat(expected, dim=1), atol=1e-5, rtol=0)


def test_shape_and_range() -> None:
    got = cell_statistics(volume())
    assert got.shape == (2, NUM_STATISTICS, 4, 4, 6)
    assert got.abs().max() <= 1


def test_one_bright_voxel_is_seen_in_its_cell_whatever_is_around_it() -> None:
    for background, row in ((-850.0, -6), (40.0, -3)):
        x = torch.full((1, 1, *SHAPE), background)
        x[0, 0, 5, 9, 14] += 250.0
        contrast = cell_statistics(x)[0, row]
        assert contrast.argmax() == torch.tensor([2, 2, 3]) @ torch.tensor([24, 6, 1])
        assert contrast[2, 2, 3] == pytest.approx(250 / 300 * (1 - 1 / 75), abs=1e-3)


def test_a_constant_volume_has_no_contrast_up_to_its_border() -> None:
    assert cell_statistics(torch.full((1, 1, *SHAPE), -700.0))[:, -6:].abs().max() < 1e-4


def test_the_mirrored_volume_has_the_mirrored_statistics() -> None:
    x = volume(1)
    torch.testing.assert_close(cell_statistics(x.flip(-1)), cell_statistics(x).flip(-1), atol=1e-5, rtol=0)


def test_the_encoder_puts_them_first_and_the_head_learns_from_them() -> None:
    torch.manual_seed(0)
    encoder = ResNet3DEncoder(width=4, statistics=True)
    levels = encoder.pyramid(torch.randn(1, 1, 16, 32, 32) * 300)
    assert [level.shape[1] for level in levels] == [NUM_STATISTICS, 4, 8, 16, 32]
    head = FindingHead(
        width=16, volume_widths=encoder.widths, image_widths=None, audio_width=None, record_width=None, channels=8
    )
    none = torch.zeros(1, dtype=torch.long)
    head.see_volumes(levels, study=none, visit=none).maps.sum().backward()
    assert head.small is not None
    assert all(item.grad is not None and item.grad.abs().sum() > 0 for item in head.small.parameters())


def test_other_numbers_of_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="statistics and four"):
        FindingHead(volume_widths=(16, 32, 64))
