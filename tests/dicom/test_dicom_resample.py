from itertools import permutations

import numpy as np
import pytest

from mm.dicom.resample import (
    AIR_HU,
    MODEL_GRID,
    Grid,
    body_center,
    fit_bits,
    fit_image,
    fit_point,
    grid_affine,
    resample,
    resample_bits,
    unfit_point,
)
from mm.dicom.volume import Image, Volume, source_slice


def straight(spacing=(2.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0)):
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = spacing
    affine[:3, 3] = origin
    affine[3, 3] = 1
    return affine


def turned(degrees):
    angle = np.deg2rad(degrees)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return matrix


def body(rng, shape=(20, 40, 50)):
    _, y, x = np.indices(shape)
    voxels = np.where(((y - 18) / 14) ** 2 + ((x - 27) / 18) ** 2 < 1, 20.0, -1000.0)
    voxels[5:9, 12:18, 20:30] = -850
    voxels[2, 20, 30] = 900
    return (voxels + rng.normal(0, 10, shape)).clip(-1020, 3000).astype(np.float32)


def restored(volume, order, flips):
    """The same anatomy stored with other axes."""
    voxels = volume.voxels.transpose(order)
    affine = volume.affine.copy()
    affine[:3, :3] = volume.affine[:3, list(order)]
    for axis, flip in enumerate(flips):
        if flip:
            affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
            affine[:3, axis] *= -1
            voxels = np.flip(voxels, axis)
    return Volume(np.ascontiguousarray(voxels), affine, "HU")


@pytest.mark.parametrize("angle", [0.0, 7.0])
def test_one_anatomy_in_any_storage_gives_one_tensor(angle):
    volume = Volume(body(np.random.default_rng(0)), turned(angle) @ straight((2.5, 1.2, 1.2), (-30, -20, 5)), "HU")
    grid = Grid((16, 32, 32), (3.0, 2.0, 2.0))
    expected = resample(volume, grid)
    for order in permutations(range(3)):
        for flips in [(0, 0, 0), (1, 0, 0), (0, 1, 1), (1, 1, 1)]:
            other = resample(restored(volume, order, flips), grid)
            np.testing.assert_allclose(other.affine, expected.affine, atol=1e-9)
            np.testing.assert_allclose(other.voxels, expected.voxels, atol=2e-3)


def test_the_own_grid_changes_nothing():
    voxels = body(np.random.default_rng(1))
    volume = Volume(voxels, straight(), "HU")
    middle = volume.to_mm(tuple((n - 1) / 2 for n in voxels.shape))
    same = resample(volume, Grid(voxels.shape, (2.0, 1.0, 1.0)), center_mm=middle)
    np.testing.assert_allclose(same.voxels, voxels, atol=1e-3)
    np.testing.assert_allclose(same.affine, volume.affine, atol=1e-9)
    assert same.sop_instance_uids == ()


@pytest.mark.parametrize("angle", [0.0, 12.0, 30.0])
# An area average counts source voxels as constant: it is off by up to a fifteenth of one (8 HU here).
@pytest.mark.parametrize(("spacing", "close"), [((1.0, 0.8, 0.8), 0.02), ((3.0, 2.5, 2.5), 8 / 15)])
def test_a_linear_field_survives(angle, spacing, close):
    affine = turned(angle) @ straight((2.0, 1.0, 1.0), (-15, -20, -30))
    index = np.indices((30, 40, 50)).reshape(3, -1)
    mm = affine[:3, :3] @ index + affine[:3, 3:]
    weights = np.array([3.0, -2.0, 1.5])
    volume = Volume((weights @ mm).reshape(30, 40, 50).astype(np.float32), affine, "HU")
    center = volume.to_mm((15.0, 20.0, 25.0))
    result = resample(volume, Grid((6, 6, 6), spacing), center_mm=center)
    place = np.indices((6, 6, 6)).reshape(3, -1)
    at = result.affine[:3, :3] @ place + result.affine[:3, 3:]
    np.testing.assert_allclose(result.voxels.reshape(-1), weights @ at, atol=close)


def test_coarser_is_the_average_and_does_not_alias():
    voxels = np.indices((16, 32, 32)).sum(axis=0) % 2 * 1000.0
    volume = Volume(voxels.astype(np.float32), straight((1.0, 1.0, 1.0)), "HU")
    result = resample(volume, Grid((4, 8, 8), (4.0, 4.0, 4.0)), center_mm=volume.to_mm((7.5, 15.5, 15.5)))
    np.testing.assert_allclose(result.voxels, 500.0, atol=1e-2)
    point = np.full((16, 32, 32), AIR_HU, np.float32)
    point[6, 17, 20] = 640.0 + AIR_HU
    result = resample(
        Volume(point, straight((1.0, 1.0, 1.0)), "HU"), Grid((4, 8, 8), (4.0, 4.0, 4.0)), center_mm=(15.5, 15.5, 7.5)
    )
    assert float((result.voxels - AIR_HU).sum()) == pytest.approx(10.0, abs=1e-2)  # mass is kept: 640 / 4^3


def test_outside_is_air_and_padding_below_air_is_air():
    volume = Volume(np.full((4, 4, 4), -3024.0, np.float32), straight((1.0, 1.0, 1.0)), "HU")
    assert (resample(volume, Grid((8, 8, 8), (2.0, 2.0, 2.0))).voxels == AIR_HU).all()
    arbitrary = Volume(np.full((4, 4, 4), 7.0, np.float32), straight((1.0, 1.0, 1.0)), "arbitrary")
    assert (resample(arbitrary, Grid((8, 8, 8), (2.0, 2.0, 2.0))).voxels == 7.0).all()


def test_the_body_is_centred_whatever_lies_beside_it():
    voxels = body(np.random.default_rng(2))
    bare = body_center(Volume(voxels, straight(), "HU"))
    assert bare[0] == pytest.approx(27, abs=5)
    assert bare[1] == pytest.approx(18, abs=5)
    assert bare[2] == pytest.approx(19, abs=1e-6)
    voxels[:, 36:38, :] = 100.0  # the table
    assert body_center(Volume(voxels, straight(), "HU")) == pytest.approx(bare, abs=0.1)
    assert body_center(Volume(np.full((4, 9, 9), -1000, np.float32), straight(), "HU")) == (4.0, 4.0, 3.0)


@pytest.mark.parametrize("angle", [0.0, 9.0])
def test_bits_follow_the_voxels(angle):
    affine = turned(angle) @ straight((2.0, 1.5, 1.5), (-20, -30, -30))
    bits = np.zeros((20, 40, 40), np.uint16)
    bits[4:12, 10:30, 12:22] |= 1
    bits[8:14, 8:20, 10:35] |= 256
    center = (0.0, 0.0, 0.0)
    grid = Grid((16, 32, 32), (2.2, 1.6, 1.6))
    result = resample_bits(bits, affine, grid, center_mm=center)
    assert result.dtype == bits.dtype
    for bit in (1, 256):
        mask = Volume(((bits & bit) > 0).astype(np.float32), affine, "arbitrary")
        share = resample(mask, grid, center_mm=center).voxels
        hit = (result & bit) > 0
        assert hit[share > 0.8].all()
        assert not hit[share < 0.2].any()
    assert not resample_bits(bits, affine, grid, center_mm=(500.0, 0.0, 0.0)).any()


def test_source_slice_finds_the_stored_slice():
    volume = Volume(np.zeros((10, 4, 4), np.float32), straight((2.5, 1, 1), (0, 0, 100)), "HU", tuple("abcdefghij"))
    assert source_slice(volume, (0.0, 0.0, 111.0)) == 4
    assert source_slice(volume, (0.0, 0.0, -900.0)) == 0
    assert volume.to_index(volume.to_mm((1.5, 2.0, 3.0))) == pytest.approx((1.5, 2.0, 3.0))


def test_a_volume_is_checked():
    with pytest.raises(ValueError, match="SOPInstanceUIDs"):
        Volume(np.zeros((2, 2, 2), np.float32), np.eye(4), "HU", ("1",))
    with pytest.raises(ValueError, match="invertible"):
        Volume(np.zeros((2, 2, 2), np.float32), np.zeros((4, 4)), "HU")
    with pytest.raises(ValueError, match="spacing_mm"):
        Grid((1, 1, 1), (0.0, 1.0, 1.0))


def test_the_model_grid_is_canonical():
    affine = grid_affine(MODEL_GRID, (1.0, 2.0, 3.0))
    middle = (np.array([*MODEL_GRID.shape, 1]) - 1) / 2
    np.testing.assert_allclose((affine[:3, :3] @ middle[:3]) + affine[:3, 3], (1.0, 2.0, 3.0))
    assert affine[2, 0] == 5.0
    assert affine[1, 1] == affine[0, 2] == 2.75


def test_a_radiograph_is_padded_not_stretched():
    pixels = np.zeros((100, 60), np.float32)
    pixels[40:60, 20:40] = 1000.0
    fitted = fit_image(Image(pixels, None, "1"), 50)
    assert fitted.shape == (50, 50)
    assert fitted.min() == 0.0
    assert fitted.max() == 1.0
    assert fitted.sum() == pytest.approx(100.0, abs=0.1)  # 20 x 20 pixels at half the size
    assert fitted[:, :10].max() == 0.0
    y, x = np.nonzero(fitted > 0.5)
    assert (y.mean(), x.mean()) == pytest.approx(fit_point((49.5, 29.5), (100, 60), 50), abs=1e-6)
    bits = fit_bits((pixels > 0).astype(np.uint16), 50)
    assert (bits == (fitted > 0.5)).all()
    assert unfit_point(fit_point((3.0, 7.0), (100, 60), 50), (100, 60), 50) == pytest.approx((3.0, 7.0))
