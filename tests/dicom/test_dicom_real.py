"""Real files; every expected number is from the header, dcm2niix or dicom2nifti, not from this package."""

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from mm.dicom.errors import DicomError
from mm.dicom.image import read_image
from mm.dicom.pixels import read_pixels
from mm.dicom.resample import MODEL_GRID, fit_image, resample
from mm.dicom.scan import scan
from mm.dicom.volume import read_volume


def nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels [i j k] and the sform (index to RAS mm) of a NIfTI-1 file."""
    raw = gzip.decompress(path.read_bytes())
    shape = struct.unpack("<8h", raw[40:56])[1:4]
    kind = {4: "<i2", 8: "<i4", 16: "<f4", 64: "<f8", 512: "<u2", 2: "<u1"}[struct.unpack("<h", raw[70:72])[0]]
    offset = int(struct.unpack("<f", raw[108:112])[0])
    slope, intercept = struct.unpack("<2f", raw[112:120])
    affine = np.eye(4)
    affine[:3] = np.array(struct.unpack("<12f", raw[280:328])).reshape(3, 4)
    voxels = np.frombuffer(raw, np.dtype(kind), int(np.prod(shape)), offset).reshape(shape, order="F")
    return voxels * (slope or 1.0) + (intercept if slope else 0.0), affine


def volume_of(folder):
    found = scan(folder)
    return read_volume(found.studies[0].series[0])


@pytest.mark.parametrize(
    "name",
    [
        "anatomical/001",
        "anatomical/001_implicit",
        "anatomical/002_non_isotropic",
        "compressed/001",
        "compressed_rle/001",
        "compressed_j2k/001",
        "compressed_jpeg/001",
        "compressed_jpegls/001",
    ],
)
def test_every_voxel_lies_where_dicom2nifti_puts_it(real, name):
    folder = real / "dicom2nifti" / "generic" / name
    truth = folder.parent / f"{folder.name}_ground_truth.nii.gz"
    try:
        volume = volume_of(folder)
    except DicomError as error:
        assert error.reason == "missing_decoder"  # noqa: PT017
        pytest.skip("no decoder installed: pip install 'mm-report[dicom]'")
    expected, to_ras = nifti(truth)
    index = np.indices(volume.shape).reshape(3, -1)
    ras = np.diag([-1, -1, 1]) @ (volume.affine[:3, :3] @ index + volume.affine[:3, 3:])
    place = np.linalg.solve(to_ras[:3, :3], ras - to_ras[:3, 3:])
    nearest = place.round().astype(int)
    assert np.abs(place - nearest).max() < 0.02
    assert volume.voxels.size == expected.size
    np.testing.assert_allclose(volume.voxels.reshape(-1), expected[tuple(nearest)], rtol=1e-5, atol=1.0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gantrytilting/001", "gantry_tilt"),
        ("sliceincrement/001", "missing_slice"),
        ("sliceincrement/002", "missing_slice"),
        ("notavolume/001", "duplicate_position"),
    ],
)
def test_failing_series_are_refused(real, name, reason):
    series = scan(real / "dicom2nifti" / "failing" / name).studies[0].series[0]
    assert series.refused == reason


def test_mixed_orientations_become_two_series(real):
    parts = scan(real / "dicom2nifti" / "failing" / "sliceorientation" / "001").studies[0].series
    assert [(part.part, part.num_slices) for part in parts] == [(0, 2), (1, 2)]


def test_lidc(real):
    found = scan(real / "LIDC-IDRI-0001")
    (series,) = found.studies[0].series
    assert (series.num_slices, series.modality, series.body_part) == (133, "CT", "CHEST")
    assert series.manufacturer.startswith("GE")
    assert series.spacing_mm == pytest.approx((2.5, 0.703125, 0.703125))
    volume = read_volume(series)
    assert volume.units == "HU"
    assert volume.voxels.dtype == np.float32
    assert volume.affine[2, 0] == pytest.approx(2.5)
    assert len(set(volume.sop_instance_uids)) == 133
    model = resample(volume, MODEL_GRID)
    assert model.shape == MODEL_GRID.shape
    dense = model.voxels > -300
    assert dense[25:45, 100:112, 30:100].sum() > dense[25:45, :12, 30:100].sum()  # the table is behind
    assert dense[4:10, 30:90, 30:100].mean() > dense[35:41, 30:90, 30:100].mean()  # the lungs are above the belly
    assert model.voxels[13:16, 40:80, 25:50].mean() > model.voxels[13:16, 40:80, 78:103].mean()  # liver on the right


def test_radiographs(real):
    found = scan(real / "chest_xray")
    images = [read_image(series) for study in found.studies for series in study.series]
    assert sorted(image.pixels.shape for image in images) == [(169, 211), (440, 440)]
    assert [item.reason for item in found.rejected] == ["conflicting_instance"] * 2  # one is the other's negative
    for image in images:
        fitted = fit_image(image)
        assert fitted.shape == (256, 256)
        assert 0.2 < float(fitted.mean()) < 0.8


def test_a_relabelled_monochrome1_is_the_negative(real, tmp_path):
    pair = []
    for name in ("1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm", "Fake_MONOHR1.dcm"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(real / "chest_xray" / name, folder / "x")
        pair.append(read_image(scan(folder).studies[0].series[0]).pixels)
    np.testing.assert_array_equal(pair[0] + pair[1], 255.0)


def test_every_damaged_file_is_refused_with_its_reason(real, tmp_path):
    found = {}
    for path in sorted((real / "damaged").iterdir()):
        folder = tmp_path / path.stem
        folder.mkdir()
        shutil.copy(path, folder / "x")
        result = scan(folder)
        series = [series for study in result.studies for series in study.series]
        found[path.stem] = series[0].refused if series else result.rejected[0].reason
    assert found == {
        "deflate_bomb_256MiB": "expansion",
        "ok_control": "single_slice",
        "path_traversal_ids": "invalid_uid",
        "rows_cols_65535": "too_many_pixels",
        "text_renamed": "not_dicom",
        "truncated_mid_header": "missing_element",
        "truncated_mid_pixels": "truncated",
        "zero_bytes": "not_dicom",
        "zero_spacing_zero_iop": "invalid_orientation",
    }


def test_a_mosaic_is_refused_and_its_nine_encodings_are_one_image(real):
    series = [series for study in scan(real / "dcm_qa_ts").studies for series in study.series]
    assert {item.refused for item in series} == {"mosaic"}
    instances = [instance for item in series for instance in item.instances]
    assert len(instances) == 9
    try:
        first, *others = [read_pixels(instance) for instance in instances]
    except DicomError as error:
        assert error.reason == "missing_decoder"  # noqa: PT017
        pytest.skip("no decoder installed: pip install 'mm-report[dicom]'")
    for pixels in others:
        np.testing.assert_array_equal(pixels, first)


def test_enhanced_objects_become_volumes_in_time_and_kind(real):
    philips, siemens = (scan(real / "dcm_qa_enh" / "In" / name).studies[0].series for name in ("Philips", "Siemens"))
    assert [(series.told, series.num_slices) for series in philips] == [(("field map",), 32), (("magnitude",), 32)]
    assert [(series.told, series.num_slices) for series in siemens] == [((f"time {k}",), 6) for k in (1, 2, 3, 4)]
    pair = [scan(real / "dcm_qa_agfa" / name).studies[0].series for name in ("Agfa", "Siemens")]
    for one, other in zip(*pair, strict=True):
        np.testing.assert_array_equal(read_volume(one).voxels, read_volume(other).voxels)
        np.testing.assert_array_equal(read_volume(one).affine, read_volume(other).affine)
