"""Every volume that is read of the real folders, beside what dcm2niix makes of them in the same run."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from mm.dicom.errors import DicomError
from mm.dicom.pixels import read_pixels
from mm.dicom.scan import scan
from mm.dicom.volume import read_volume

nibabel = pytest.importorskip("nibabel")

FOLDERS = {
    # folder: volumes that are read, and what dcm2niix makes of series that are refused
    "LIDC-IDRI-0001": (1, 0),
    "dcm_qa_enh/In/Philips": (2, 0),
    "dcm_qa_enh/In/Siemens": (4, 0),
    "dcm_qa_agfa/Agfa": (4, 0),
    "dcm_qa_agfa/Siemens": (4, 0),
    "dcm_qa_ts/In": (0, 9),  # mosaics
    "dicom2nifti/generic/anatomical/001": (1, 0),
    "dicom2nifti/generic/anatomical/001_implicit": (1, 0),
    "dicom2nifti/generic/anatomical/002_non_isotropic": (1, 0),
    "dicom2nifti/generic/compressed/001": (1, 0),
    "dicom2nifti/generic/compressed_rle/001": (1, 0),
    "dicom2nifti/generic/compressed_jpeg/001": (1, 0),
    "dicom2nifti/generic/compressed_jpegls/001": (1, 0),
    "dicom2nifti/generic/compressed_j2k/001": (1, 0),
    "dicom2nifti/generic/rgb/001": (0, 1),
    "dicom2nifti/failing/sliceorientation/001": (2, 0),
    "dicom2nifti/failing/slicecount/001": (1, 0),
    "dicom2nifti/failing/sliceincrement/001": (0, 1),
    "dicom2nifti/failing/sliceincrement/002": (0, 1),
    "dicom2nifti/failing/gantrytilting/001": (0, 1),
    "dicom2nifti/failing/notavolume/001": (0, 4),
}


def theirs(folder, out):
    """(stored [i j k], affine, slope, intercept) of every volume, 4-D files taken apart."""
    program = pytest.importorskip("dcm2niix").bin
    out.mkdir()
    options = ["-p", "n", "-z", "n", "-b", "n", "-f", "s%s_%r"]
    subprocess.run([program, *options, "-o", out, folder], check=False, capture_output=True)
    found = []
    for path in sorted(out.glob("*.nii")):
        if "_Tilt" in path.stem or "_Eq" in path.stem:  # resampled, if not twice
            continue
        image = nibabel.load(path)
        stored = np.asanyarray(image.dataobj.get_unscaled())
        stored = stored if stored.ndim == 4 else stored[..., None]
        slope, intercept = image.dataobj.slope, image.dataobj.inter
        found += [(stored[..., t], image.affine, slope, intercept) for t in range(stored.shape[3])]
    return found


def aligned(stored, affine, volume):
    """Their voxels in our axes and the distance of the farthest corner in mm, or None where the grids differ."""
    ours = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    turn = np.linalg.inv(affine) @ ours
    axes = np.abs(turn[:3, :3]).argmax(axis=0)  # of theirs along each of ours
    if sorted(axes) != [0, 1, 2] or tuple(np.array(stored.shape)[axes]) != volume.shape:
        return None
    corners = np.array([[z, y, x] for z in (0, 1) for y in (0, 1) for x in (0, 1)]) * (np.array(volume.shape) - 1)
    place = turn[:3, :3] @ corners.T + turn[:3, 3:]
    if np.abs(place - place.round()).max() > 0.01 or place.round().min() < 0:
        return None
    away = np.linalg.norm(affine[:3, :3] @ (place - place.round()), axis=0).max()
    flips = tuple(slice(None, None, -1 if turn[axis, k] < 0 else 1) for k, axis in enumerate(axes))
    return stored.transpose(axes)[flips], away


@pytest.mark.parametrize("name", FOLDERS)
def test_every_volume_is_dcm2niix_s(real, tmp_path, name):
    folder = real / Path(name)
    others = theirs(folder, tmp_path / "theirs")
    num_read, num_unread = FOLDERS[name]
    volumes = [
        series
        for study in scan(folder).studies
        for series in study.series
        if series.kind == "volume" and series.refused is None
    ]
    assert len(volumes) == num_read
    for series in volumes:
        try:
            volume = read_volume(series)
        except DicomError as error:
            assert error.reason == "missing_decoder"  # noqa: PT017
            pytest.skip("no decoder installed: pip install 'mm-report[dicom]'")
        stored = np.stack([read_pixels(frame.instance, frame.index) for frame in series.frames])
        slopes = np.array([frame.slope or 1.0 for frame in series.frames])
        intercepts = np.array([frame.intercept or 0.0 for frame in series.frames])
        exact = slopes[:, None, None] * stored + intercepts[:, None, None]
        rounded = exact.astype(np.float32)
        assert (np.abs(volume.voxels - rounded) <= np.spacing(np.abs(rounded))).all()
        for number, (values, affine, slope, intercept) in enumerate(others):
            found = aligned(values, affine, volume)
            if found is None or not np.array_equal(found[0], stored):
                continue
            assert found[1] < 1e-4
            if len(set(slopes.tolist())) == 1:  # dcm2niix applies the first slice's to all
                assert slope == pytest.approx(slopes[0], rel=1e-7)
                assert intercept == pytest.approx(intercepts[0], rel=1e-7)
            del others[number]
            break
        else:
            pytest.fail("dcm2niix has no such volume")
    assert len(others) == num_unread


def test_an_undone_tilt_is_dcm2niix_s(real, tmp_path):
    program = pytest.importorskip("dcm2niix").bin
    folder = real / "dicom2nifti" / "failing" / "gantrytilting" / "001"
    subprocess.run([program, "-z", "n", "-b", "n", "-o", tmp_path, folder], check=False, capture_output=True)
    (path,) = tmp_path.glob("*_Tilt*.nii")
    image = nibabel.load(path)
    (series,) = scan(folder).studies[0].series
    volume = read_volume(series, tilt="resample")
    found = aligned(np.asarray(image.dataobj), image.affine, volume)
    assert found is not None
    values, away = found
    assert away < 1e-4
    off = np.abs(values - volume.voxels)  # it rounds to integers, and interpolates to the outside at the edges
    assert (off <= 0.51).mean() > 0.998
