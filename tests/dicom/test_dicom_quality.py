from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import save

from mm.dicom.quality import hu_peaks, image_quality, volume_quality
from mm.dicom.scan import Series, scan
from mm.dicom.volume import read_volume

Make = Callable[..., Series]


def body(side: int, *, wide: float = 0.7) -> np.ndarray:
    """An ellipse of soft tissue with two lungs in air, HU."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    noise = np.random.default_rng(0).normal(0, 12, (side, side))
    values = np.full((side, side), -1000.0)
    values[(x / wide) ** 2 + (y / (0.8 * wide)) ** 2 < 1] = 40
    for middle in (-0.4 * wide, 0.4 * wide):
        values[((x - middle) / (0.28 * wide)) ** 2 + (y / (0.5 * wide)) ** 2 < 1] = -850
    return values + noise


@pytest.fixture
def chest(tmp_path: Path) -> Make:
    def make(count: int = 40, *, wide: float = 0.7, shift: float = 0.0, **elements: object) -> Series:
        stored = np.rint(body(64, wide=wide) + shift + 1024).astype(np.int16)
        for index in range(count):
            given = {"RescaleIntercept": -1024, "BodyPartExamined": "CHEST", "PixelSpacing": [6.0, 6.0], **elements}
            place = {"SOPInstanceUID": f"1.2.3.1.{index + 1}", "ImagePositionPatient": [0, 0, 5.0 * index]}
            save(tmp_path / "in" / str(index), stored, **place, **given)
        (study,) = scan(tmp_path / "in").studies
        return study.series[0]

    return make


def codes(series: Series) -> list[str]:
    return [flag.code for flag in volume_quality(series, read_volume(series)).flags]


def test_a_good_chest_has_no_flag_and_its_peaks(chest):
    series = chest()
    made = volume_quality(series, read_volume(series))
    assert made.flags == ()
    assert made.air_hu == pytest.approx(-1000, abs=10)
    assert made.soft_tissue_hu == pytest.approx(40, abs=10)
    assert made.border_share == 0
    assert made.coverage_mm == 200


@pytest.mark.parametrize(
    ("shift", "code", "soft"), [(-1024, "rescaled_twice", -984), (1024, "not_rescaled", 1064), (-30, None, 10)]
)
def test_the_peaks_tell_a_rescale_too_many_or_too_few(chest, shift, code, soft):
    series = chest(shift=shift)
    made = volume_quality(series, read_volume(series))
    assert [flag.code for flag in made.flags] == ([] if code is None else [code])
    assert made.soft_tissue_hu == pytest.approx(soft, abs=10)
    assert made.soft_tissue_hu - made.air_hu == pytest.approx(1040, abs=20)


@pytest.mark.parametrize("padding", [-2000, -3024, -1024])
def test_padding_around_the_field_of_view_is_not_taken_for_air(padding):
    values = np.repeat(body(96)[None], 8, axis=0).astype(np.float32)
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    values[:, x**2 + y**2 > 1] = padding
    air, soft = hu_peaks(values)
    assert air == pytest.approx(-1000, abs=30)
    assert soft == pytest.approx(40, abs=30)


def test_without_peaks_nothing_is_claimed(chest):
    assert hu_peaks(np.zeros((4, 4, 4), dtype=np.float32)) is None
    assert hu_peaks(np.full((4, 4, 4), np.nan, dtype=np.float32)) is None
    series = chest(Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    made = volume_quality(series, read_volume(series))
    assert made.air_hu is None
    assert made.border_share is None


def test_a_body_that_is_cut_off_and_a_short_stack(chest):
    assert codes(chest(wide=1.4)) == ["truncated_view"]


def test_few_slices(chest):
    assert codes(chest(12)) == ["few_slices", "short_coverage"]


@pytest.mark.parametrize(
    ("elements", "code"),
    [
        ({"BodyPartExamined": "KNEE"}, "body_part"),
        ({"BurnedInAnnotation": "YES"}, "burnt_in"),
        ({"LossyImageCompression": "01"}, "lossy"),
        ({"LossyImageCompressionRatio": ["12.5", "2"]}, "lossy"),
        ({"ContrastBolusAgent": "Ultravist 370"}, "contrast"),
    ],
)
def test_what_the_header_says(chest, elements, code):
    series = chest(**elements)
    assert codes(series) == [code]
    assert "ltravist" not in repr(series.instances[0])
    assert volume_quality(series, read_volume(series)).faults == (() if code == "contrast" else (code,))


@pytest.mark.parametrize(
    "elements",
    [
        {"BodyPartExamined": ""},
        {"BurnedInAnnotation": "NO"},
        {"LossyImageCompression": "00", "LossyImageCompressionRatio": ["1"]},
        {"ContrastBolusAgent": "NONE"},
        {"ContrastBolusAgent": ""},
    ],
)
def test_what_the_header_says_and_is_no_flag(chest, elements):
    assert codes(chest(**elements)) == []


def test_an_image_has_a_record_too(tmp_path):
    pixels = np.arange(64, dtype=np.int16).reshape(8, 8)
    given = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1", "Modality": "DX", "BodyPartExamined": "HAND"}
    save(tmp_path / "a", pixels, BurnedInAnnotation="YES", **given)
    series = scan(tmp_path).studies[0].series[0]
    assert [flag.code for flag in image_quality(series, 0).flags] == ["body_part", "burnt_in"]


def test_the_real_chest(real):
    (study,) = scan(real / "LIDC-IDRI-0001").studies
    series = max(study.series, key=lambda item: item.num_slices)
    made = volume_quality(series, read_volume(series))
    assert made.faults == ()
    assert made.air_hu == pytest.approx(-1000, abs=60)
    assert made.soft_tissue_hu == pytest.approx(40, abs=60)
