import io

import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from mm.phantom.instances import DX_STEPS, Header, ct_instances, dx_instance, uid

HEADER = Header.of(seed=5, visit=0, days=0.0, sex="F", age=61)


def oblique(degrees=4.0, spacing=(5.0, 2.7, 2.6)):
    angle = np.radians(degrees)
    affine = np.eye(4)
    affine[:3, 0] = [0, 0, spacing[0]]
    affine[:3, 1] = np.array([-np.sin(angle), np.cos(angle), 0]) * spacing[1]
    affine[:3, 2] = np.array([np.cos(angle), np.sin(angle), 0]) * spacing[2]
    affine[:3, 3] = [-171.123456789, 3.5, -1000.25]
    return affine


@pytest.fixture(scope="module")
def series():
    voxels = np.random.default_rng(0).integers(-1024, 3000, (5, 12, 10)).astype(np.float32)
    affine = oblique()
    return voxels, affine, list(ct_instances(HEADER, voxels, affine, kernel="SOFT"))


def test_ct_pixels_and_geometry_come_back(series):
    voxels, affine, instances = series
    for index, (instance, content) in enumerate(instances):
        read = pydicom.dcmread(io.BytesIO(content))
        hu = read.pixel_array * float(read.RescaleSlope) + float(read.RescaleIntercept)
        np.testing.assert_array_equal(hu, voxels[index])
        assert read.SOPInstanceUID == instance == read.file_meta.MediaStorageSOPInstanceUID
        assert read.InstanceNumber == index + 1
        position = np.array(read.ImagePositionPatient, float)
        np.testing.assert_allclose(position, affine[:3, 3] + index * affine[:3, 0], atol=1e-5)
        row, column = np.array(read.ImageOrientationPatient, float).reshape(2, 3)
        np.testing.assert_allclose(row * float(read.PixelSpacing[1]), affine[:3, 2], atol=1e-8)
        np.testing.assert_allclose(column * float(read.PixelSpacing[0]), affine[:3, 1], atol=1e-8)


def test_ct_header_is_valid(series):
    reads = [pydicom.dcmread(io.BytesIO(content)) for _, content in series[2]]
    assert len({read.SOPInstanceUID for read in reads}) == len(reads)
    assert len({read.SeriesInstanceUID for read in reads}) == 1
    for read in reads:
        assert read.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        assert read.SOPClassUID == CTImageStorage
        for element in read:
            assert element.value is not None
            if element.VR == "DS":
                values = [element.value] if element.VM == 1 else element.value
                assert all(len(str(value)) <= 16 for value in values)
            if element.VR == "UI":
                assert pydicom.uid.UID(str(element.value)).is_valid
        assert read.PatientID.startswith("PHANTOM-")
        assert (read.StudyDate, read.Modality, read.RescaleType) == ("20260630", "CT", "HU")
        assert len(read.AccessionNumber) <= 16


def test_dx_comes_back_and_is_valid():
    pixels = np.random.default_rng(1).random((31, 20)).astype(np.float32)
    instance, content = dx_instance(HEADER, pixels, spacing_mm=(1.4, 1.4))
    read = pydicom.dcmread(io.BytesIO(content))
    np.testing.assert_allclose(read.pixel_array / DX_STEPS, pixels, atol=0.5 / DX_STEPS + 1e-6)
    assert read.SOPClassUID == DigitalXRayImageStorageForPresentation
    assert read.SOPInstanceUID == instance
    assert (read.Modality, read.ViewPosition, read.PresentationIntentType) == ("DX", "PA", "FOR PRESENTATION")
    assert list(read.PatientOrientation) == ["L", "F"]
    assert read.StudyInstanceUID == HEADER.study_instance_uid
    assert read.BitsStored == 12


def test_uids_and_headers_follow_from_the_seed():
    prior = Header.of(seed=5, visit=1, days=30.0, sex="F", age=61)
    assert prior.patient_id == HEADER.patient_id
    assert prior.study_instance_uid != HEADER.study_instance_uid
    assert (HEADER.study_date - prior.study_date).days == 30
    assert Header.of(seed=5, visit=0, days=0.0, sex="F", age=61) == HEADER
    assert all(len(uid("a", number)) == 44 for number in range(50))
