from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest

from mm.dicom.resample import unfit_point
from mm.dicom.volume import Image, Volume
from mm.report.evidence import Stack, key_radiograph, key_slice, ring_mm
from mm.report.schema import Size

POINT = (30.0, -20.0, 10.0)  # to the patient's left, in front, up


def stored(axes: tuple[int, int, int], signs: tuple[int, int, int]) -> Volume:
    """A bright dot at POINT in a cube about the origin, stored along any axes; spacing 2 mm."""
    affine = np.zeros((4, 4))
    for column, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[axis, column] = 2.0 * sign
    affine[:3, 3] = -affine[:3, :3] @ np.full(3, 24.5)
    affine[3, 3] = 1.0
    empty = Volume(np.full((50, 50, 50), -1000, dtype=np.float32), affine, "HU", tuple(f"1.{i}" for i in range(50)))
    z, y, x = (round(value) for value in empty.to_index(POINT))
    voxels = empty.voxels.copy()
    voxels[z, y, x] = 1000
    return Volume(voxels, affine, "HU", empty.sop_instance_uids)


@pytest.mark.parametrize("axes", list(permutations(range(3))))
def test_every_orientation_hangs_the_same(axes):
    for signs in product((1, -1), repeat=3):
        image = key_slice(Stack.of(stored(axes, signs)), finding=0, code="nodule", center_mm=POINT, radius_mm=8.0)
        row, column = np.unravel_index(int(image.pixels.argmax()), image.pixels.shape)
        assert image.pixels[row, column] == 255
        assert image.center is not None
        assert abs(image.center[0] - row) <= 0.5
        assert abs(image.center[1] - column) <= 0.5
        middle = 24.5
        across, down = image.edges[:2], image.edges[2:]
        places = {"L": column > middle, "A": row < middle, "H": row < middle}
        match axes[0]:
            case 2:  # axial
                assert (across, down) == (("R", "L"), ("A", "P"))
                assert places["L"]
                assert places["A"]
            case 1:  # coronal
                assert (across, down) == (("R", "L"), ("H", "F"))
                assert places["L"]
                assert places["H"]
            case 0:  # sagittal
                assert (across, down) == (("A", "P"), ("H", "F"))
                assert column < middle
                assert places["H"]


def test_pixels_are_made_square():
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    affine[2, 0], affine[1, 1], affine[0, 2] = 5.0, 2.0, 1.0
    stack = Stack.of(Volume(np.zeros((4, 20, 40), dtype=np.float32), affine, "HU"))
    image = key_slice(stack, finding=0, code="effusion", center_mm=(10.0, 30.0, 11.0), radius_mm=9.0)
    assert image.pixels.shape == (40, 40)
    assert image.mm_per_pixel == 1.0
    assert image.place == (3, 4)
    assert image.center == pytest.approx((30.5, 10.0))
    assert image.radius == 9.0


def test_large_radiographs_are_shrunk_and_the_ring_with_them():
    image = Image(np.random.default_rng(0).normal(size=(2000, 1500)).astype(np.float32), (0.2, 0.2), "1.2")
    key = key_radiograph(image, finding=0, pixel=(1000.0, 750.0), radius_mm=20.0)
    assert key.pixels.shape == (1024, 768)
    assert key.mm_per_pixel == pytest.approx(0.2 * 2000 / 1024)
    assert key.center == pytest.approx((512, 384), abs=1)
    assert key.radius == pytest.approx(20 / key.mm_per_pixel)
    assert key.edges == ("", "", "", "")
    told = replace(image, oriented=True)
    assert key_radiograph(told, finding=0, pixel=None, radius_mm=20.0).edges == ("R", "L", "", "")
    assert unfit_point((127.5, 127.5), (2000, 1500)) == pytest.approx((999.5, 749.5))


def test_rings_grow_with_the_finding():
    small, large = (ring_mm("nodule", Size(value, "mm")) for value in (4.0, 30.0))
    assert 8.0 <= small < large <= 75.0
    assert ring_mm("consolidation", Size(10.0, "ml")) < ring_mm("consolidation", Size(150.0, "ml"))
    assert ring_mm("infection", None) == 25.0
