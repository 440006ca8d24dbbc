from dataclasses import replace

import numpy as np
import pytest

from mm import ontology
from mm.dicom.resample import IMAGE_GRID, MODEL_GRID
from mm.evaluation.labels import labels
from mm.phantom.dataset import PhantomDataset, labelled, patient_seed, words
from mm.phantom.patient import draw_patient
from mm.phantom.text import finding_templates

STUDIES = 8


@pytest.fixture(scope="module")
def dataset():
    return PhantomDataset(studies=STUDIES, seed=11, split="train")


@pytest.fixture(scope="module")
def samples(dataset):
    return [dataset[index] for index in range(STUDIES)]


def test_shapes_and_roles(samples):
    for sample in samples:
        assert 1 <= len(sample.volumes) <= 2
        for volume, visit in zip(sample.volumes, sample.truth.visits, strict=True):
            assert volume.shape == visit.bits.shape == MODEL_GRID.shape
            assert volume.dtype == np.float32
            assert -1100 < volume.min() < -900
            assert volume.max() > 100
        assert sample.image.shape == (IMAGE_GRID, IMAGE_GRID) == sample.truth.image_bits.shape
        assert len(sample.audio) == len(ontology.SOUND_SITES)
        assert sample.record.values["age"] > 0
        assert sample.days[0] == 0
        assert sample.report[-1].kind == "impression"
        assert "<" not in sample.text
        assert 4 <= len(sample.questions) <= 8
        assert list(sample.inputs()) == ["volume", "image", "audio", "record"]


def test_centres_lie_on_their_masks(samples):
    hits = []
    for sample in samples:
        for visit in sample.truth.visits:
            for item, center in zip(visit.findings, visit.centers, strict=True):
                assert (center is None) == (item.center_mm is None)
                if center is not None:
                    z, y, x = np.round(center).astype(int)
                    near = visit.bits[max(z - 1, 0) : z + 2, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
                    hits.append(bool((near >> ontology.INDEX[item.code] & 1).any()))
    assert len(hits) > 5
    assert np.mean(hits) > 0.95


def test_pixel_centres_lie_on_their_masks(samples):
    hits = []
    for sample in samples:
        for item, center in zip(sample.truth.findings, sample.truth.image_centers, strict=True):
            assert (center is None) == (item.image_center_mm is None)
            if center is not None:
                y, x = np.round(center).astype(int)
                near = sample.truth.image_bits[max(y - 4, 0) : y + 5, max(x - 4, 0) : x + 5]
                hits.append(bool((near >> ontology.INDEX[item.code] & 1).any()))
    assert len(hits) > 3
    assert np.mean(hits) > 0.95


def test_masks_and_findings_agree(samples):
    for sample in samples:
        current = sample.truth.visits[0]
        for item in current.findings:
            if item.center_mm is not None and item.present and (item.size or 0) > 6:
                assert (current.bits >> ontology.INDEX[item.code] & 1).any(), item


def test_report_has_one_sentence_a_finding(samples):
    for sample in samples:
        about = [sentence.finding for sentence in sample.report if sentence.kind == "finding"]
        assert sorted(about) == list(range(len(sample.truth.findings)))
        assert (sample.report[0].kind == "comparison") == (len(sample.volumes) > 1)


def test_deterministic(dataset, samples):
    again = PhantomDataset(studies=STUDIES, seed=11, split="train")[3]
    np.testing.assert_array_equal(again.volumes[0], samples[3].volumes[0])
    np.testing.assert_array_equal(again.image, samples[3].image)
    np.testing.assert_array_equal(again.audio[0], samples[3].audio[0])
    assert again.text == samples[3].text
    assert again.questions == samples[3].questions
    assert patient_seed(11, 0) != patient_seed(12, 0) != patient_seed(11, 1)


def test_language_and_split():
    few = [PhantomDataset(studies=200, seed=4, split="test", inputs=("record",))[i] for i in range(50)]
    english = np.mean([sample.language == "en" for sample in few])
    assert english == pytest.approx(0.8, abs=0.15)
    train = [PhantomDataset(studies=200, seed=4, split="train", inputs=("record",))[i] for i in range(50)]
    held = {
        template.text
        for template in finding_templates("en", "infection", "unknown", "none", sided=False)
        if template.split == "test"
    }
    assert not any(sentence.text in held for sample in train for sentence in sample.report)
    assert [sample.language for sample in few] == [sample.language for sample in train]


def test_what_no_input_shows_is_not_said():
    heard = [PhantomDataset(studies=30, seed=4, split="train", inputs=("audio",))[i] for i in range(30)]
    codes = {item.code for sample in heard for item in sample.truth.findings}
    assert codes == {"airflow_obstruction"}
    assert all(sample.volumes == () and sample.image is None and sample.record is None for sample in heard)
    assert all("comparison" not in {sentence.kind for sentence in sample.report} for sample in heard)


def test_without_a_prior_nothing_has_changed():
    patient = next(
        patient
        for patient in (draw_patient(patient_seed(1, index)) for index in range(200))
        if any(item.change == "resolved" for item in patient.findings)
    )
    alone = labelled(patient.findings, inputs=ontology.SOURCES, compared=False)
    assert all(item.present and item.change == "unknown" for item in alone)
    assert labelled(patient.findings, inputs=ontology.SOURCES, compared=True) == patient.findings
    assert alone == tuple(replace(item, change="unknown") for item in patient.findings if item.present)


def test_every_other_patient_has_what_is_asked_for_and_the_others_are_the_same():
    rich = PhantomDataset(studies=12, seed=4, split="train", inputs=("record",), every_other="calcification")
    plain = PhantomDataset(studies=12, seed=4, split="train", inputs=("record",))
    drawn = [draw_patient(rich.patient_seed(index)).present for index in range(12)]
    assert all("calcification" in present for present in drawn[::2])
    assert not all("calcification" in present for present in drawn[1::2])
    assert all(rich.patient_seed(index) == plain.patient_seed(index) for index in range(1, 12, 2))
    assert len({rich.patient_seed(index) for index in range(12)}) == 12
    with pytest.raises(ValueError, match="every_other must be among nodule"):
        PhantomDataset(studies=1, seed=0, split="train", every_other="plaque")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="priors"):
        PhantomDataset(studies=1, seed=0, split="train", priors=-1)
    with pytest.raises(IndexError):
        PhantomDataset(studies=1, seed=0, split="train")[1]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_rule_labeler_reads_the_truth_back_from_every_report(language):
    for index in range(40):
        patient = draw_patient(patient_seed(2, index))
        days = patient.visits[1].days if len(patient.visits) > 1 else None
        findings = labelled(patient.findings, inputs=ontology.SOURCES, compared=days is not None)
        said = words(patient, findings, days=days, language=language, split="test")
        read = labels(said.text, language)
        assert {code for code, status in read.items() if status == "present"} == patient.present
