import json

import numpy as np
import pydicom
import pytest
import soundfile

from mm import ontology
from mm.data.record import parse_record
from mm.dicom.image import read_image
from mm.dicom.resample import fit_image
from mm.dicom.scan import scan
from mm.dicom.volume import read_volume
from mm.phantom.ct import render_ct
from mm.phantom.dataset import PhantomDataset, header, patient_seed
from mm.phantom.patient import draw_patient
from mm.phantom.sound import render_sounds
from mm.phantom.write import write_studies

SEED, STUDIES = 22, 2


def tree(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def patients():
    return [draw_patient(patient_seed(SEED, index)) for index in range(STUDIES)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    return root, write_studies(root, studies=STUDIES, seed=SEED, workers=1)


def test_layout(written, patients):
    root, studies = written
    visits = sum(len(patient.visits) for patient in patients)
    assert len(list((root / "studies").iterdir())) == visits
    assert {folder.name for folder in (root / "truth").iterdir()} == set(studies)
    for study in studies:
        names = {path.name for path in (root / "studies" / study).iterdir()}
        assert {"dx_0001.dcm", "ct_0001.dcm", "record.json"} <= names
        assert {f"sound_{site}.wav" for site in ontology.SOUND_SITES} <= names
        truth = {path.name for path in (root / "truth" / study).iterdir()}
        assert truth == {"findings.json", "report_en.txt", "report_zh.txt", "vqa.jsonl", "masks.npz"}


def test_pydicom_reads_every_tag_of_every_file(written):
    root, _ = written
    for path in (root / "studies").rglob("*.dcm"):
        read = pydicom.dcmread(path)
        assert read.StudyInstanceUID == path.parent.name
        for element in read.iterall():
            assert element.keyword
            assert element.value is not None
        assert read.pixel_array.size == read.Rows * read.Columns


def test_ct_and_dx_share_a_study_and_priors_share_the_patient(written, patients):
    root, _ = written
    for patient in patients:
        facts = [header(patient, visit) for visit in range(len(patient.visits))]
        reads = [
            pydicom.dcmread(path, stop_before_pixels=True)
            for fact in facts
            for path in sorted((root / "studies" / fact.study_instance_uid).glob("*_0001.dcm"))
        ]
        assert len({read.PatientID for read in reads}) == 1
        assert len({read.StudyInstanceUID for read in reads}) == len(facts)
        assert len({read.AccessionNumber for read in reads}) == len(facts)
        dates = [facts[0].study_date - fact.study_date for fact in facts]
        assert [day.days for day in dates] == [visit.days for visit in patient.visits]


def test_what_was_rendered_is_read_back(written, patients):
    root, _ = written
    found = scan(root / "studies")
    assert {item.reason for item in found.rejected} == {"not_dicom"}  # sounds and records
    assert len(found.rejected) == 5 * STUDIES
    for index, patient in enumerate(patients):
        study = next(item for item in found.studies if item.study_instance_uid == header(patient, 0).study_instance_uid)
        by_modality = {series.modality: series for series in study.series}
        volume = read_volume(by_modality["CT"])
        rendered = render_ct(patient, 0)
        np.testing.assert_array_equal(volume.voxels, np.rint(rendered.voxels))
        np.testing.assert_allclose(volume.affine, rendered.affine, atol=1e-4)
        sample = PhantomDataset(studies=STUDIES, seed=SEED, split="test")[index]
        np.testing.assert_array_equal(fit_image(read_image(by_modality["DX"])), sample.image)


def test_sounds_and_record_are_those_of_the_patient(written, patients):
    root, studies = written
    for index, (patient, study) in enumerate(zip(patients, studies, strict=True)):
        folder = root / "studies" / study
        for site, sound in render_sounds(patient).items():
            read, rate = soundfile.read(folder / f"sound_{site}.wav", dtype="float32")
            assert rate == ontology.SOUND_RATE
            np.testing.assert_array_equal(read, sound)
        sample = PhantomDataset(studies=STUDIES, seed=SEED, split="test", inputs=("record",))[index]
        assert parse_record(json.loads((folder / "record.json").read_text())) == sample.record


def test_truth_on_disk_is_truth_in_memory(written):
    root, studies = written
    dataset = PhantomDataset(studies=STUDIES, seed=SEED, split="test")
    for index, study in enumerate(studies):
        sample = dataset[index]
        folder = root / "truth" / study
        truth = json.loads((folder / "findings.json").read_text())
        assert sample.study == study == truth["study"]
        rows = [row for row in truth["findings"] if row["present"] or row["change"] == "resolved"]
        assert {row["code"] for row in truth["findings"]} == set(ontology.CODES)
        assert len(rows) == len(sample.truth.findings)
        for row in truth["findings"]:
            assert row["probability"] == (1.0 if row["present"] else 0.0)
            if row["size"] is not None:
                assert row["size"]["unit"] == ontology.finding(row["code"]).measure.unit
        assert (folder / f"report_{sample.language}.txt").read_text() == sample.text + "\n"
        asked = [json.loads(line) for line in (folder / "vqa.jsonl").read_text().splitlines()]
        if sample.language == "en":
            assert [row["question"] for row in asked] == [item.question for item in sample.questions]
        masks = np.load(folder / "masks.npz")
        assert masks["ct"].ndim == 3
        assert masks["dx"].ndim == 2


def test_sop_instance_uid_is_the_slice_of_the_centre(written):
    root, studies = written
    checked = 0
    for study in studies:
        reads = [pydicom.dcmread(path, stop_before_pixels=True) for path in (root / "studies" / study).glob("ct_*.dcm")]
        place = {read.SOPInstanceUID: float(read.ImagePositionPatient[2]) for read in reads}
        step = float(reads[0].SliceThickness)
        for row in json.loads((root / "truth" / study / "findings.json").read_text())["findings"]:
            if row["center_mm"] is not None:
                assert abs(place[row["sop_instance_uid"]] - row["center_mm"][2]) <= step / 2 + 1e-3
                checked += 1
    assert checked > 0


def test_same_seed_same_bytes_whatever_the_workers(written, tmp_path):
    root, studies = written
    again = write_studies(tmp_path / "two", studies=STUDIES, seed=SEED, workers=2)
    assert again == studies
    first, second = tree(root), tree(tmp_path / "two")
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first)


def test_a_folder_with_other_phantoms_is_refused(written):
    root, _ = written
    with pytest.raises(ValueError, match="seed"):
        write_studies(root, studies=STUDIES, seed=SEED + 1)
    with pytest.raises(ValueError, match="workers"):
        write_studies(root, studies=STUDIES, seed=SEED, workers=0)
