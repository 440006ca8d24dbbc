import logging

import pytest

from mm.data.record import parse_record
from mm.ontology import MEASUREMENTS


def test_every_unit_of_the_ontology_converts_to_the_canonical_one():
    for item in MEASUREMENTS:
        for unit, factor, offset in (*item.units, (item.unit, 1.0, 0.0)):
            canonical = 40.0
            content = {"labs": [{"name": item.name, "value": (canonical - offset) / factor, "unit": unit}]}
            assert parse_record(content).values == {item.name: pytest.approx(canonical)}


def test_fahrenheit():
    record = parse_record({"vitals": [{"name": "temperature", "value": 100.4, "unit": "[degF]"}]})
    assert record.values["temperature"] == pytest.approx(38.0)


def test_unknown_unit_is_missing_and_the_warning_holds_neither_value_nor_unit(caplog):
    with caplog.at_level(logging.WARNING):
        record = parse_record({"labs": [{"name": "crp", "value": 87.125, "unit": "furlong"}]})
    assert record.values == {}
    assert "crp" in caplog.text
    assert "furlong" not in caplog.text
    assert "87" not in caplog.text


@pytest.mark.parametrize("value", ["high", float("nan"), True, 10**400, -(10**400), 1e308, 1e39, -5])
def test_a_value_that_is_no_number_is_missing(value, caplog):
    assert parse_record({"labs": [{"name": "crp", "value": value, "unit": "mg/L"}]}).values == {}
    assert "crp" in caplog.text


@pytest.mark.parametrize("item", MEASUREMENTS, ids=lambda item: item.name)
def test_bounds_keep_what_a_sick_patient_has(item):
    extreme = {"temperature": (30, 42), "oxygen_saturation": (40, 100), "crp": (0, 500), "white_cells": (0.2, 200)}
    extreme |= {"haemoglobin": (3, 22), "creatinine": (20, 1500), "age": (0, 115), "heart_rate": (20, 240)}
    for value in extreme.get(item.name, (8, 60)):
        assert item.name in parse_record({"labs": [{"name": item.name, "value": value, "unit": item.unit}]}).values


def test_missing_parts_and_unknown_measurements_are_no_error(caplog):
    assert parse_record({}).values == {}
    record = parse_record({"labs": [{"name": "troponin", "value": 1}, {"name": "crp", "value": None, "unit": "mg/L"}]})
    assert record.values == {}
    assert not caplog.text


def test_words_and_demographics():
    record = parse_record({"demographics": {"sex": "F", "age": {"value": 720, "unit": "mo"}}, "indication": " cough "})
    assert record.words == "cough; female"
    assert record.values == {"age": pytest.approx(60.0)}
    assert parse_record({"demographics": {"age": 61}}).values == {"age": 61.0}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"labs": {"crp": 3}}, "labs"),
        ({"vitals": [3]}, "vitals"),
        ({"demographics": 3}, "demographics"),
        ({"indication": 3}, "indication"),
    ],
)
def test_wrong_layout_names_the_part(content, named):
    with pytest.raises(ValueError, match=named):
        parse_record(content)
