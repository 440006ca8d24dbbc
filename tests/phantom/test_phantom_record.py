import json

import numpy as np
import pytest

from mm.data.record import parse_record
from mm.ontology import MEASUREMENTS
from mm.phantom.patient import draw_patient
from mm.phantom.record import render_record
from mm.phantom.table import TABLE


@pytest.fixture(scope="module")
def patients():
    return [draw_patient(seed) for seed in range(150)]


def test_what_is_there_reads_back_in_canonical_units(patients):
    for patient in patients:
        record = parse_record(json.loads(json.dumps(render_record(patient))))
        for name, value in record.values.items():
            assert value == pytest.approx(patient.record.values[name], rel=2e-3), name


def test_a_fifth_is_missing_and_units_vary(patients):
    values = [parse_record(render_record(patient)).values for patient in patients]
    names = [item.name for item in MEASUREMENTS if item.name != "age"]
    missing = 1 - np.mean([name in item for item in values for name in names])
    assert missing == pytest.approx(TABLE.missing, abs=0.04)
    assert all("age" in item for item in values)
    units = {entry["unit"] for patient in patients for entry in render_record(patient)["labs"]}
    assert units >= {"mg/L", "mg/dL", "g/dL", "g/L", "umol/L", "/uL"}


def test_words_do_not_name_a_finding(patients):
    words = {parse_record(render_record(patient)).words for patient in patients}
    assert len(words) > 10
    assert not any("infection" in item or "fever" in item for item in words)


def test_infection_shows_in_the_record(patients):
    infected = [patient for patient in patients if patient.record.inflamed]
    quiet = [patient for patient in patients if not patient.record.inflamed]

    def mean(group, name):
        return np.nanmean([parse_record(render_record(one)).values.get(name, np.nan) for one in group])

    for name in ("temperature", "crp", "white_cells"):
        assert mean(infected, name) > mean(quiet, name)


def test_same_patient_same_record(patients):
    assert render_record(patients[0]) == render_record(draw_patient(0))
