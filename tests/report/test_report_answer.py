"""The schema of structured answers, judged by jsonschema."""

from dataclasses import fields

import jsonschema
import pytest

from mm import ontology
from mm.phantom.patient import draw_patient
from mm.report.answer import findings_schema
from mm.report.schema import ReportedFinding, Size

VALID = jsonschema.Draft202012Validator(findings_schema())
NODULE = {"code": "nodule", "side": "left", "size": {"value": 12, "unit": "mm"}, "change": "new"}


def said(item):
    """A true finding as an answer says it, its size as a report prints it."""
    measure, size = ontology.finding(item.code).measure, None
    if item.size is not None:
        value = round(item.size, measure.decimals) if measure.decimals else round(item.size)
        size = {"value": value, "unit": measure.unit}
    return {"code": item.code, "side": item.side, "size": size, "change": item.change}


def test_whatever_is_true_of_a_phantom_can_be_said():
    patients = [draw_patient(seed) for seed in range(25)]
    for patient in patients:
        VALID.validate({"findings": [said(item) for item in patient.findings]})
    assert len({item.code for patient in patients for item in patient.findings}) > 8


def test_an_answer_speaks_the_words_of_the_report():
    VALID.check_schema(findings_schema())
    assert {*NODULE} < {item.name for item in fields(ReportedFinding)}
    assert {*NODULE["size"]} == {item.name for item in fields(Size)}
    VALID.validate({"findings": []})
    VALID.validate({"findings": [NODULE] * 8})


@pytest.mark.parametrize(
    "change",
    [
        {"code": "cancer"},
        {"side": "none", "code": "wheeze"},
        {"code": "cardiomegaly"},  # has no side, and a ratio for a size
        {"size": {"value": 12, "unit": "ml"}},
        {"size": {"value": 12.5, "unit": "mm"}},  # a report prints no half millimetres
        {"size": {"value": 61, "unit": "mm"}},
        {"size": 12},
        {"change": "better"},
        {"code": "infection", "side": "none", "size": None},  # isn't followed
        {"probability": 0.9},
    ],
)
def test_what_the_ontology_rules_out_cannot_be_said(change):
    assert not VALID.is_valid({"findings": [NODULE | change]})
