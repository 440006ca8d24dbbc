"""Small real DICOM studies, and a stand-in for the model that answers from what it is given."""

import datetime as dt
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

import mm
from mm.batch import Batch, DetectedFinding, GeneratedReport, GeneratedSentence
from mm.data.tokenizer import Tokenizer, train_tokenizer
from mm.findings import FindingHead
from mm.training.checkpoint import Card, Identity, Preprocessing

CT, DX = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.1.1"
NAME = "DOE^JANE"


def uid(*parts: int) -> str:
    return "1.2.826.0.1.3680043.8.498." + ".".join(str(part) for part in parts)


def write_dicom(path: Path, sop_class: str, instance: str, pixels: np.ndarray, **elements: Any) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(None, Dataset(), file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = sop_class, instance
    data.PatientName = NAME
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    for name, value in elements.items():
        setattr(data, name, value)
    data.PixelData = pixels.astype("<i2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


@dataclass(frozen=True)
class StudyMaker:
    """Writes studies below `root`; study n of patient p has the UID uid(p, n)."""

    root: Path

    def ct(
        self, patient: int, number: int, *, days: int = 0, slices: int = 18, manufacturer: str = "mm phantom",
        patient_id: str | None = None, skip: tuple[int, ...] = (), level: int = 0, intercept: int = 0,
        accession: str = "",
    ) -> Path:  # fmt: skip
        """A CT with a bright cube as a nodule at slice `slices // 2`."""
        folder = self.root / f"p{patient}_{number}"
        voxels = np.full((slices, 32, 32), -1000 + level, dtype=np.int16)
        voxels[:, 6:26, 4:28] = 40
        voxels[slices // 2 - 1 : slices // 2 + 2, 10:14, 20:24] = 900
        made = dt.date(2024, 6, 1) - dt.timedelta(days=days)
        for z in range(slices):
            if z in skip:
                continue
            write_dicom(
                folder / f"ct_{(7 * z) % slices:03d}.dcm", CT, uid(patient, number, 1, z + 1), voxels[z],
                PatientID=patient_id if patient_id is not None else f"PAT-{patient}",
                StudyInstanceUID=uid(patient, number), SeriesInstanceUID=uid(patient, number, 1),
                Modality="CT", StudyDate=made.strftime("%Y%m%d"),
                AccessionNumber=accession, Manufacturer=manufacturer, BodyPartExamined="CHEST",
                PixelSpacing=[8.0, 8.0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                ImagePositionPatient=[-128.0, -128.0, -100.0 + 5.0 * z], SliceThickness=5.0,
                RescaleSlope=1, RescaleIntercept=intercept, RescaleType="HU",
            )  # fmt: skip
        return folder

    def dx(self, patient: int, number: int, *, manufacturer: str = "mm phantom") -> Path:
        """A radiograph in the study's folder."""
        folder = self.root / f"p{patient}_{number}"
        pixels = np.tile(np.arange(60, dtype=np.int16), (80, 1))
        write_dicom(
            folder / "dx_0.dcm", DX, uid(patient, number, 2, 1), pixels,
            PatientID=f"PAT-{patient}", StudyInstanceUID=uid(patient, number),
            SeriesInstanceUID=uid(patient, number, 2), Modality="DX",
            StudyDate="20240601", AccessionNumber="", Manufacturer=manufacturer, ViewPosition="PA",
            PatientOrientation=["L", "F"], ImagerPixelSpacing=[5.0, 5.0],
        )  # fmt: skip
        return folder

    def beside(self, folder: Path, *, crp: float = 84.0, rate: int = 16000) -> None:
        """A record and two sounds."""
        record = {"indication": "cough", "labs": [{"name": "crp", "value": crp, "unit": "mg/L"}]}
        (folder / "record.json").write_text(json.dumps(record))
        sound = np.sin(np.arange(rate) / 20).astype(np.float32) / 4
        for site in ("left_upper", "right_lower"):
            soundfile.write(folder / f"sound_{site}.wav", sound, rate)


@pytest.fixture
def studies(tmp_path: Path) -> StudyMaker:
    return StudyMaker(tmp_path / "in")


TEXTS = {
    "en": ("A <side> finding of <size>.", "Impression: <findings>."),
    "zh": ("<side>侧，<size>。", "印象：<findings>。"),
}


class FakeModel:
    """Finds the brightest voxel and pixel; counts what it saw. Raises where a volume holds -777 HU."""

    findings: FindingHead | None = None

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def read(self, batch: Batch) -> Batch:
        return batch

    def write(self, batch: Batch, *, tokenizer: Any, language: str, sampling: Any) -> list[GeneratedReport]:
        self.batches.append(batch)
        reports = []
        for b in range(batch.size):
            findings = []
            if batch.volumes is not None and int(batch.volumes.count[b]):
                current = batch.volumes.values[b, 0, 0]
                if bool((current == -777).any()):
                    raise RuntimeError(f"{NAME} must not be quoted")
                z, y, x = np.unravel_index(int(current.argmax()), current.shape)
                change = "larger" if int(batch.volumes.count[b]) > 1 else "unknown"
                place = (float(z), float(y), float(x))
                findings.append(DetectedFinding("nodule", True, 0.91234567, "left", place, None, 12.3456, change))
            if batch.image is not None and bool(batch.image.present[b]):
                findings.append(
                    DetectedFinding("rib_fracture", True, 0.8, "right", None, (100.0, 50.0), 3.0, "unknown")
                )
            findings.append(DetectedFinding("effusion", False, 0.02, "none", None, None, None, "unknown"))
            infected = batch.record is not None and float(batch.record.values[b].max()) > 50
            findings.append(DetectedFinding("infection", infected, 0.7, "none", None, None, None, "unknown"))
            one, end = TEXTS[language]
            sentences = [GeneratedSentence("finding", one, i, -0.5) for i, item in enumerate(findings) if item.present]
            sentences.append(GeneratedSentence("impression", end, None, -0.25))
            reports.append(GeneratedReport(language, tuple(findings), tuple(sentences)))
        return reports


@dataclass(frozen=True)
class FakeLoaded:
    model: FakeModel
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    identity: Identity
    card: Card
    config: dict[str, Any]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> FakeLoaded:
    words = train_tokenizer(["cough and fever " * 4], vocab_size=300)
    kept = Preprocessing(grid=(16, 32, 32), spacing_mm=(6.0, 8.0, 8.0), image_size=64, sound_rate=8000)
    card = Card("default", "A model that answers.", kind="demonstration")
    made = FakeLoaded(FakeModel(), words, kept, Identity("default", "ab" * 32), card, {})
    monkeypatch.setattr(mm, "load", lambda _path="default": made)
    return made


@pytest.fixture
def pipeline(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "own.yaml"
        path.write_text(text)
        return path

    return write
