"""NIfTI out and in. The references are nibabel, the equation of PS3.3 C.7.6.2.1.1, and dcm2niix on real series."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import SECRET, save

from mm.cli import main
from mm.dicom.errors import REASONS
from mm.dicom.nifti import NIFTI_REASONS, NiftiError, read_nifti, write_nifti
from mm.dicom.scan import scan
from mm.dicom.volume import Volume, read_volume

TILT = np.deg2rad(20)
PLANES = {
    "axial": ((1, 0, 0), (0, 1, 0), "LPS"),
    "coronal": ((1, 0, 0), (0, 0, -1), "LIP"),
    "sagittal": ((0, 1, 0), (0, 0, -1), "PIR"),
    "oblique": ((1, 0, 0), (0, float(np.cos(TILT)), float(np.sin(TILT))), "LPS"),
}
SPACING = (0.75, 0.5)  # between rows, between columns
STEP = 2.5


def write_series(folder, plane="axial", *, series="1.2.3.1", count=5, **elements):
    """A series of random pixels; returns its slices as (position, pixels) in the order of the normal."""
    along_row, along_column, _ = PLANES[plane]
    normal = np.cross(along_row, along_column)
    rng = np.random.default_rng(7)
    slices = []
    for index in range(count):
        position = np.array([-20.0, 10.0, 5.0]) + STEP * index * normal
        pixels = rng.integers(-1000, 2000, (4, 6), dtype=np.int16)
        save(
            folder / f"{series}_{(index * 7) % 11}",
            pixels,
            **{
                "SOPInstanceUID": f"{series}.{count - index}",
                "SeriesInstanceUID": series,
                "ImageOrientationPatient": [*along_row, *along_column],
                "ImagePositionPatient": position.tolist(),
                "PixelSpacing": list(SPACING),
                **elements,
            },
        )
        slices.append((position, pixels))
    return slices


def verb(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["volume", *map(str, arguments)])
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def only_volume(folder):
    return read_volume(scan(folder).studies[0].series[0])


def reason_of(path):
    with pytest.raises(NiftiError) as caught:
        read_nifti(path)
    assert SECRET not in str(caught.value)
    assert str(path.name) not in str(caught.value)
    assert NIFTI_REASONS[caught.value.reason] in str(caught.value)
    return caught.value.reason


def image(data, affine=None, *, sform=1, qform=1):
    made = nibabel.Nifti1Image(data, np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine)
    made.set_sform(made.affine, code=sform)
    made.set_qform(made.affine, code=qform)
    return made


@pytest.fixture
def nifti(tmp_path):
    """A good file of 5 x 4 x 3 voxels, as a file to break: `nifti(**fields)` changes elements of its header."""

    def write(data=None, *, name="x.nii", **fields):
        values = np.arange(60, dtype=np.int16).reshape(5, 4, 3) if data is None else data
        raw = bytearray(image(values).to_bytes())
        header = nibabel.Nifti1Header(bytes(raw[:348]), check=False)
        for key, value in fields.items():
            header[key] = value
        raw[:348] = header.binaryblock
        (tmp_path / name).write_bytes(gzip.compress(bytes(raw)) if name.endswith("gz") else bytes(raw))
        return tmp_path / name

    return write


@pytest.mark.parametrize("plane", PLANES)
def test_every_voxel_lies_where_the_header_says(tmp_path, capsys, plane):
    slices = write_series(tmp_path / "in", plane)
    code, out, _ = verb(capsys, tmp_path / "in", tmp_path / "out")
    assert code == 0
    assert out == "0001_CT.nii.gz  study 1  5 x 4 x 6 voxels of 2.5 x 0.75 x 0.5 mm  HU, int16\n"
    written = nibabel.load(tmp_path / "out" / "0001_CT.nii.gz")
    along_row, along_column, codes = PLANES[plane]
    assert "".join(nibabel.aff2axcodes(written.affine)) == codes
    for affine, code in (written.get_sform(coded=True), written.get_qform(coded=True)):
        assert code == 1
        np.testing.assert_allclose(affine, written.affine, atol=1e-4)
    assert written.header.get_xyzt_units()[0] == "mm"
    assert written.get_data_dtype() == np.int16
    values = np.asarray(written.dataobj)
    for position, pixels in slices:
        row, column = np.indices(pixels.shape).reshape(2, -1)
        lps = position + np.outer(column * SPACING[1], along_row) + np.outer(row * SPACING[0], along_column)
        place = nibabel.affines.apply_affine(np.linalg.inv(written.affine), lps * [-1, -1, 1])
        np.testing.assert_allclose(place, place.round(), atol=1e-4)
        np.testing.assert_array_equal(values[tuple(place.round().astype(int).T)], pixels.reshape(-1))


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(("slope", "dtype"), [(1, "int16"), (0.1, "float32")])
def test_a_round_trip_changes_nothing(tmp_path, plane, slope, dtype):
    write_series(tmp_path / "in", plane, RescaleSlope=slope)
    volume = only_volume(tmp_path / "in")
    assert write_nifti(volume, tmp_path / "x.nii.gz") == dtype
    back = read_nifti(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(back.voxels, volume.voxels)
    assert back.voxels.dtype == np.float32
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-5)
    assert (back.units, back.sop_instance_uids) == ("HU", ())
    first = (tmp_path / "x.nii.gz").read_bytes()
    write_nifti(volume, tmp_path / "x.nii.gz")
    assert (tmp_path / "x.nii.gz").read_bytes() == first  # no time, no name inside


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(32767, "int16"), (-32768, "int16"), (32768, "float32"), (-32769, "float32"), (0.5, "float32")],
)
def test_int16_only_where_nothing_is_lost(tmp_path, value, dtype):
    voxels = np.zeros((2, 3, 4), np.float32)
    voxels[1, 2, 3] = value
    assert write_nifti(Volume(voxels, np.eye(4), "arbitrary"), tmp_path / "x.nii.gz") == dtype
    back = read_nifti(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(back.voxels, voxels)
    assert back.units == "arbitrary"


def test_what_a_header_of_nifti_can_not_hold(tmp_path):
    with pytest.raises(NiftiError, match="too_many_voxels"):
        write_nifti(Volume(np.zeros((1, 1, 32768), np.float32), np.eye(4), "HU"), tmp_path / "x.nii.gz")
    with pytest.raises(ValueError, match=r"\.nii\.gz"):
        write_nifti(Volume(np.zeros((1, 1, 1), np.float32), np.eye(4), "HU"), tmp_path / "x.nii")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("name", ["x.nii", "X.NII.GZ"])
def test_files_of_others(tmp_path, dtype, order, name):
    data = np.random.default_rng(1).integers(0, 100, (5, 4, 3)).astype(dtype)
    affine = np.array([[0, 0, 3.0, -7], [1.5, 0.1, 0, 20], [0.2, -2.0, 0, 3], [0, 0, 0, 1]])
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    made = nibabel.Nifti1Image(data[..., None], affine, header)  # a fourth axis of one entry is none
    made.set_sform(affine, code=2)
    made.set_qform(np.eye(4), code=1)
    made.header.set_slope_inter(1, 0)
    raw = bytearray(made.to_bytes())
    raw[112:120] = np.array([0.5, -1000], np.dtype(np.float32).newbyteorder(order)).tobytes()
    (tmp_path / name).write_bytes(gzip.compress(bytes(raw)) if name.endswith("GZ") else bytes(raw))
    volume = read_nifti(str(tmp_path / name))
    np.testing.assert_array_equal(volume.voxels, (data * 0.5 - 1000).transpose(2, 1, 0).astype(np.float32))
    for index in [(0.0, 0.0, 0.0), (2.0, 3.0, 4.0), (1.0, 0.0, 2.0)]:
        x, y, z = nibabel.affines.apply_affine(affine, index[::-1])
        assert volume.to_mm(index) == pytest.approx((-x, -y, z), abs=1e-5)


def test_the_sform_goes_before_the_qform_unless_it_is_a_template(tmp_path):
    data = np.zeros((2, 2, 2), np.int16)
    for sform, qform, expected in [(1, 1, 2.0), (0, 1, 5.0), (4, 1, 5.0), (2, 0, 2.0)]:
        made = image(data, np.diag([2.0, 2.0, 2.0, 1.0]))
        made.set_qform(np.diag([5.0, 5.0, 5.0, 1.0]), code=qform)
        made.set_sform(np.diag([2.0, 2.0, 2.0, 1.0]), code=sform)
        nibabel.save(made, tmp_path / "x.nii")
        assert read_nifti(tmp_path / "x.nii").spacing_mm == pytest.approx((expected,) * 3)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dim": [4, 5, 4, 3, 2, 1, 1, 1]}, "not_3d"),
        ({"dim": [2, 5, 4, 1, 1, 1, 1, 1]}, "not_3d"),
        ({"dim": [3, 5, -4, 3, 1, 1, 1, 1]}, "not_3d"),
        ({"dim": [9, 5, 4, 3, 1, 1, 1, 1]}, "not_3d"),
        ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, "too_many_voxels"),
        ({"dim": [3, 5, 4, 4, 1, 1, 1, 1]}, "truncated"),
        ({"dim": [3, 5, 4, 2, 1, 1, 1, 1]}, "too_long"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "no_place"),
        ({"srow_y": [0, np.inf, 0, 0]}, "no_place"),
        ({"srow_z": [0, 0, 0, 0]}, "no_place"),
        ({"sform_code": 0, "qform_code": 0}, "no_place"),
        ({"sform_code": 4, "qform_code": 3}, "no_place"),
        ({"sform_code": 0, "quatern_b": 7.0}, "no_place"),
        ({"sform_code": 0, "pixdim": [1, -2, 2, 3, 0, 0, 0, 0]}, "no_place"),
        ({"xyzt_units": 1}, "unsupported_unit"),
        ({"datatype": 128}, "unsupported_type"),
        ({"datatype": 32}, "unsupported_type"),
        ({"datatype": 4097}, "unsupported_type"),
        ({"scl_slope": 1.0, "scl_inter": np.nan}, "invalid_scaling"),
        ({"scl_slope": 3e38, "scl_inter": 0.0}, "not_finite"),
        ({"vox_offset": np.nan}, "damaged"),
        ({"vox_offset": 3e9}, "damaged"),
        ({"vox_offset": 0}, "damaged"),
        ({"magic": b"ni1"}, "not_nifti"),
        ({"sizeof_hdr": 540}, "not_nifti"),
    ],
)
@pytest.mark.parametrize("name", [f"{SECRET}.nii", f"{SECRET}.nii.gz"])
def test_a_hostile_header_is_refused_by_name(nifti, fields, reason, name):
    fields = {key: np.asarray(value) if isinstance(value, list) else value for key, value in fields.items()}
    assert reason_of(nifti(name=name, descrip=SECRET.encode(), **fields)) == reason


def test_four_axes_are_told_with_what_would_be_read(nifti):
    with pytest.raises(NiftiError, match=r"split a series in time or direction first \(its axes: 5 x 4 x 3 x 2\)"):
        read_nifti(nifti(np.zeros((5, 4, 3, 2), np.int16)))


def test_a_broken_file_is_refused_by_name(nifti, tmp_path):
    good, packed = nifti().read_bytes(), nifti(name="x.nii.gz").read_bytes()
    for content, name, reason in [
        (b"", "a.nii", "truncated"),
        (good[:200], "a.nii", "truncated"),
        (good[:-1], "a.nii", "truncated"),
        (good + b"\0", "a.nii", "too_long"),
        (gzip.compress(good[:-1]), "a.nii.gz", "truncated"),
        (gzip.compress(good + b"\0"), "a.nii.gz", "too_long"),
        (packed[:-12], "a.nii.gz", "truncated"),
        (packed[:40] + b"\xff" * 20 + packed[60:], "a.nii.gz", "damaged"),
        (packed[:-8] + b"\0" * 8, "a.nii.gz", "damaged"),  # another checksum
        (good, "a.nii.gz", "damaged"),
        (packed * 5, "a.nii", "not_nifti"),
        (good, "a.hdr", "not_nifti"),
        (good, "a.img.gz", "not_nifti"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert reason_of(tmp_path / name) == reason
    nan = np.full((2, 2, 2), np.nan, np.float32)
    assert reason_of(nifti(nan)) == "not_finite"
    os.mkfifo(tmp_path / "pipe.nii")
    assert reason_of(tmp_path / "pipe.nii") == "not_nifti"
    with pytest.raises(FileNotFoundError):
        read_nifti(tmp_path / "none.nii")


def test_bombs_take_no_memory(nifti, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(np, "empty", lambda *given, **kinds: made.append(given) or pytest.fail("memory was taken"))
    # A header that declares a gibibyte in a file that can't hold it.
    assert reason_of(nifti(name="a.nii.gz", dim=np.array([3, 1024, 1024, 1024, 1, 1, 1, 1]))) == "truncated"
    monkeypatch.undo()
    # One that declares 120 bytes and goes on for 64 MiB: the rest is never inflated.
    bomb = nifti().read_bytes() + bytes(1 << 26)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(bomb))
    del bomb
    read = []
    whole = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: read.append(size) or whole(self, size))
    assert reason_of(tmp_path / "b.nii.gz") == "too_long"
    assert sum(read) == 352 + 120 + 1


def test_a_folder_of_all_sorts(tmp_path, capsys, caplog):
    source = tmp_path / SECRET
    write_series(source, series="1.2.3.1")
    write_series(source, "sagittal", series="1.2.3.2", SOPClassUID="1.2.840.10008.5.1.4.1.1.4", Modality="DOE JANE")
    write_series(source, series="1.2.3.3", ImagePositionPatient=[0, 0, 0])  # all in one place
    write_series(source, series="1.2.3.4", count=1, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(source, series="1.2.3.5", PixelSpacing=[1e-6, 1e-6])  # an affine of no extent
    write_series(source, "coronal", series="1.2.3.6")
    (source / "note.txt").write_text(SECRET)
    code, out, err = verb(capsys, source, tmp_path / "out", "--json")
    assert code == 1
    assert err == ""
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["row"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line.get("file") for line in lines] == [
        "0001_CT.nii.gz", "0002_OT.nii.gz", None, None, None, "0006_CT.nii.gz",
    ]  # fmt: skip
    assert lines[0]["shape"] == [5, 4, 6]
    assert lines[1]["units"] == "arbitrary"
    assert [line["refused"] for line in lines if "refused" in line] == ["duplicate_position", "localizer", "ValueError"]
    assert [line["is_volume"] for line in lines if "refused" in line] == [True, False, True]
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert sorted(files) == ["0001_CT.nii.gz", "0002_OT.nii.gz", "0006_CT.nii.gz"]
    secrets = (SECRET, "DOE", "1.2.3", "20240102")
    told = [out, caplog.text, *files]
    assert not any(secret in text for secret in secrets for text in told)
    for path in files.values():
        content = path.read_bytes()
        assert not any(secret.encode() in text for secret in secrets for text in (content, gzip.decompress(content)))


def test_exit_codes(tmp_path, capsys):
    write_series(tmp_path / "good")
    write_series(tmp_path / "radiograph", count=1, SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1", Modality="DX")
    write_series(tmp_path / "good", series="1.2.3.9", count=1, SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1", Modality="DX")
    (tmp_path / "empty").mkdir()
    code, out, _ = verb(capsys, tmp_path / "good", tmp_path / "out")
    assert code == 0  # nobody expects a volume of a radiograph
    assert f"0002_OT  study 1  passed over: not_a_volume: {REASONS['not_a_volume']}\n" in out
    code, out, err = verb(capsys, tmp_path / "good", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "must be a new or an empty folder" in err
    for name in ("radiograph", "empty", "none"):
        code, out, err = verb(capsys, tmp_path / name, tmp_path / "other")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert not (tmp_path / "other").exists()
    broken = save(tmp_path / "good" / "x", np.zeros((4, 6), np.int16), SOPInstanceUID="1.9.1", SeriesInstanceUID="1.9")
    broken.write_bytes(broken.read_bytes()[:-5])
    code, out, _ = verb(capsys, tmp_path / "good", tmp_path / "third")
    assert code == 1  # a series of which nothing is left
    assert f"1 file not read, truncated: {REASONS['truncated']}\n" in out


def test_nothing_half_written_is_left(tmp_path, capsys, monkeypatch):
    write_series(tmp_path / "in")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = verb(capsys, tmp_path / "in", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "No space left" in err
    assert list((tmp_path / "out").iterdir()) == []


def test_without_nibabel_the_extra_is_named(tmp_path, capsys, monkeypatch):
    write_series(tmp_path / "in")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    code, _, err = verb(capsys, tmp_path / "in", tmp_path / "out")
    assert code == 2
    assert "pip install 'mm-report[nifti]'" in err
    assert not (tmp_path / "out").exists()


def test_the_page_names_every_reason():
    page = (Path(__file__).parents[2] / "docs" / "dicom.md").read_text(encoding="utf-8")
    assert all(f"`{reason}`" in page for reason in NIFTI_REASONS)


def dcm2niix_files(folder, out):
    """What dcm2niix makes of a folder, without the files it resampled (_Tilt, _Eq)."""
    program = pytest.importorskip("dcm2niix").bin
    out.mkdir()
    options = ["-z", "n", "-b", "n", "-f", "s%s_%r"]
    subprocess.run([program, *options, "-o", out, folder], check=False, capture_output=True)
    return [nibabel.load(path) for path in sorted(out.glob("*.nii")) if not path.stem.endswith(("_Tilt", "_Eq_1"))]


def disagreement(volume, other):
    """Largest distance of voxel centres in mm, and of values in units of the last place of float32.

    None where the two grids don't hold the same number of voxels or overlap only in part.
    """
    index = np.indices(volume.shape).reshape(3, -1)
    ras = np.diag([-1, -1, 1]) @ (volume.affine[:3, :3] @ index + volume.affine[:3, 3:])
    to_ras = other.affine
    place = np.linalg.solve(to_ras[:3, :3], ras - to_ras[:3, 3:])
    nearest = place.round().astype(int)
    values = np.asarray(other.dataobj)
    if values.shape[3:] != () or values.size != volume.voxels.size:
        return None
    if nearest.min() < 0 or (nearest >= np.array(values.shape)[:, None]).any():
        return None
    flat = np.ravel_multi_index(tuple(nearest), values.shape)
    if np.unique(flat).size != flat.size:
        return None
    away = np.linalg.norm(to_ras[:3, :3] @ (place - nearest), axis=0).max()
    ours, theirs = volume.voxels.reshape(-1), values.reshape(-1)[flat].astype(np.float32)
    return float(away), float((np.abs(ours - theirs) / np.spacing(np.abs(theirs).clip(min=1e-3))).max())


@pytest.mark.parametrize("name", ["LIDC-IDRI-0001", "anatomical/001", "anatomical/002_non_isotropic", "compressed/001"])
def test_voxels_and_places_are_dcm2niix_s(real, tmp_path, name):
    folder = real / name if name.startswith("LIDC") else real / "dicom2nifti" / "generic" / name
    (series,) = scan(folder).studies[0].series
    (tmp_path / "in").mkdir()
    for index, path in enumerate(series.files[60:66] or series.files):  # six slices of the CT
        shutil.copy(path, tmp_path / "in" / str(index))
    volume = only_volume(tmp_path / "in")
    write_nifti(volume, tmp_path / "ours.nii.gz")
    (theirs,) = dcm2niix_files(tmp_path / "in", tmp_path / "theirs")
    for ours in (volume, read_nifti(tmp_path / "ours.nii.gz")):
        away, ulps = disagreement(ours, theirs)
        assert away < 1e-3
        assert ulps <= 1
