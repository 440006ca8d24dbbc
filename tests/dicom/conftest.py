import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

SECRET = "DOE^JANE"


def dataset(pixels: np.ndarray, **elements: Any) -> FileDataset:
    """One CT slice in memory; `elements` replace or (None) remove defaults."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = elements.pop("TransferSyntaxUID", ExplicitVRLittleEndian)
    data = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    values = {
        "PatientID": SECRET,
        "PatientName": SECRET,
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": "1.2.3.4",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.1",
        "StudyDate": "20240102",
        "Modality": "CT",
        "Manufacturer": "ACME",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": pixels.dtype.itemsize * 8,
        "BitsStored": pixels.dtype.itemsize * 8,
        "HighBit": pixels.dtype.itemsize * 8 - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
        "PixelSpacing": [1.0, 1.0],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [0, 0, 0],
        **elements,
    }
    for keyword, value in values.items():
        if value is not None:
            setattr(data, keyword, value)
    data.file_meta.MediaStorageSOPClassUID = data.get("SOPClassUID", CTImageStorage)
    data.file_meta.MediaStorageSOPInstanceUID = data.get("SOPInstanceUID", "1.2.3.4")
    data.PixelData = pixels.tobytes()
    data["PixelData"].VR = "OW"
    return data


def save(path: Path, pixels: np.ndarray, **elements: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset(pixels, **elements), enforce_file_format=True)
    return path


@pytest.fixture
def slices(tmp_path: Path) -> Callable[..., Path]:
    """Writes a stack along z; `change(index)` gives elements of one slice. File names say nothing of the order."""

    def write(count: int = 5, *, change: Callable[[int], dict[str, Any]] = lambda _: {}, folder: str = "in") -> Path:
        for index in range(count):
            pixels = np.full((4, 6), 100 * index, dtype=np.int16)
            elements = {
                "SOPInstanceUID": f"1.2.3.1.{count - index}",
                "ImagePositionPatient": [0, 0, 2.5 * index],
                **change(index),
            }
            save(tmp_path / folder / f"f{(index * 7) % 11}", pixels, **elements)
        return tmp_path / folder

    return write


@pytest.fixture(scope="session")
def real() -> Path:
    root = os.environ.get("MM_DATA")
    if root is None or not (Path(root) / "dicom").is_dir():
        pytest.skip("set MM_DATA to the folder of real data")
    return Path(root) / "dicom"
