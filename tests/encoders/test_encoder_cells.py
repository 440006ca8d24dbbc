"""Statistics of a pyramid's cells: by the definition, mirrored with the volume, and blind to nothing one voxel wide."""

import pytest
import torch
import torch.nn.functional as F

from mm.encoders.cells import AROUND, CELL, CONTRASTS_HU, NUM_STATISTICS, PART, WINDOWS_HU, cell_statistics
from mm.encoders.resnet3d import ResNet3DEncoder
from mm.finding_small import SMALL
from mm.findings import FindingHead

SHAPE = (8, 16, 24)
WHOLE = 3 * (len(WINDOWS_HU) + len(CONTRASTS_HU))
"""Statistics of whole cells; those of their parts come behind."""


def volume(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 400 - 200


def test_windows_are_greatest_mean_and_least_as_pytorch_pools_them() -> None:
    x = volume()
    got = cell_statistics(x)[:, :WHOLE].unflatten(1, (-1, 3))
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
        contrast = cell_statistics(x)[0, :WHOLE][row]
        assert contrast.argmax() == torch.tensor([2, 2, 3]) @ torch.tensor([24, 6, 1])
        assert contrast[2, 2, 3] == pytest.approx(250 / 300 * (1 - 1 / 75), abs=1e-3)


def test_a_constant_volume_has_no_contrast_up_to_its_border() -> None:
    assert cell_statistics(torch.full((1, 1, *SHAPE), -700.0))[:, WHOLE - 6 : WHOLE + 8].abs().max() < 1e-4


def test_contrast_is_to_the_mean_of_the_box_as_pytorch_pools_it() -> None:
    x = volume(2)
    for index, (low, high) in enumerate(CONTRASTS_HU):
        clear = x.clamp(low, high)
        padding = tuple(n // 2 for n in AROUND)
        mean = F.avg_pool3d(clear, AROUND, stride=1, padding=padding, count_include_pad=False)
        expected = F.max_pool3d(((clear - mean) / 300).clamp(-1, 1), CELL)
        row = 3 * (len(WINDOWS_HU) + index)
        torch.testing.assert_close(cell_statistics(x)[:, row], expected[:, 0], atol=1e-5, rtol=0)


def test_parts_are_the_greatest_of_each_part_in_the_order_of_the_axes() -> None:
    x = volume(3)
    low, high = WINDOWS_HU[-1]
    parts = F.max_pool3d(((x - low) / (high - low) * 2 - 1).clamp(-1, 1), PART)[:, 0]
    got = cell_statistics(x)[:, -8:]
    for number, (z, y, at) in enumerate((z, y, at) for z in (0, 1) for y in (0, 1) for at in (0, 1)):
        torch.testing.assert_close(got[:, number], parts[:, z::2, y::2, at::2], atol=1e-5, rtol=0)


def test_the_mirrored_volume_has_the_mirrored_statistics() -> None:
    x = volume(1)
    got, turned = cell_statistics(x.flip(-1)).flip(-1), cell_statistics(x)
    torch.testing.assert_close(got[:, :WHOLE], turned[:, :WHOLE], atol=1e-5, rtol=0)
    parts = turned[:, WHOLE:].unflatten(1, (2, 2, 2, 2)).flip(4).flatten(1, 4)
    torch.testing.assert_close(got[:, WHOLE:], parts, atol=1e-5, rtol=0)


def test_the_encoder_puts_them_first_and_the_head_learns_from_them() -> None:
    torch.manual_seed(0)
    encoder = ResNet3DEncoder(width=4, statistics=True)
    levels = encoder.pyramid(torch.randn(1, 1, 16, 32, 32) * 300)
    assert [level.shape[1] for level in levels] == [NUM_STATISTICS, 4, 8, 16, 32]
    head = FindingHead(
        width=16, volume_widths=encoder.widths, image_widths=None, audio_width=None, record_width=None, channels=8
    )
    none = torch.zeros(1, dtype=torch.long)
    maps = head.see_volumes(levels, study=none, visit=none).maps
    assert head.small is not None
    torch.testing.assert_close(maps[:, list(SMALL)], head.small(levels[0]))
    maps.sum().backward()
    assert all(item.grad is not None and item.grad.abs().sum() > 0 for item in head.small.parameters())


def test_other_numbers_of_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="statistics and four"):
        FindingHead(volume_widths=(16, 32, 64))
