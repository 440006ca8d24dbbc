import json
import logging
from pathlib import Path

import pytest

from mm.dicom.scan import scan
from mm.pipeline.context import read_context
from mm.pipeline.run import run_report
from mm.report.json import read_report

STUDY = "1.2.826.0.1.3680043.8.498.1.1"
PRIOR = "1.2.826.0.1.3680043.8.498.1.2"


@pytest.fixture
def found(studies):
    studies.ct(1, 1, slices=3, accession="A1")
    studies.ct(1, 2, slices=3, days=9)
    return scan(studies.root)


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_csv_and_jsonl_say_the_same(found, tmp_path):
    (tmp_path / "r.json").write_text("{}")
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "sound_left_upper.wav").touch()
    table = write(tmp_path, "c.csv", f"AccessionNumber,record,audio,prior\nA1,r.json,sounds,{PRIOR}\n")
    row = {"StudyInstanceUID": STUDY, "record": "r.json", "audio": "sounds", "prior": [PRIOR]}
    lines = write(tmp_path, "c.jsonl", json.dumps(row) + "\n\n")
    assert read_context(table, found) == read_context(lines, found)
    read = read_context(lines, found)[STUDY]
    assert read.record == tmp_path / "r.json"
    assert list(read.audio) == ["left_upper"]
    assert read.priors == (PRIOR,)


BAD = {
    "kind": ("c.txt", "", "must end in .jsonl or .csv"),
    "column": (
        "c.csv",
        f"StudyInstanceUID,recrod\n{STUDY},x\n",
        r"line 2: unknown column \(number 2\); accepted: StudyInst",
    ),
    "key": ("c.jsonl", "{}", "line 1: needs a StudyInstanceUID or an AccessionNumber"),
    "json": ("c.jsonl", "\n{", "line 2: not JSON"),
    "list": ("c.jsonl", "[]", "line 1: must be a JSON object"),
    "cells": ("c.csv", "StudyInstanceUID\na,b\n", "line 2: more cells"),
    "twice": ("c.csv", f"StudyInstanceUID\n{STUDY}\n{STUDY}\n", "line 3: a second row"),
    "record": ("c.csv", f"StudyInstanceUID,record\n{STUDY},none.json\n", "record must be a JSON file that exists"),
    "audio": ("c.csv", f"StudyInstanceUID,audio\n{STUDY},none\n", "audio must be a folder that exists"),
    "site": ("c.jsonl", json.dumps({"StudyInstanceUID": STUDY, "audio": {"back": "x"}}), "accepted: left_upper"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named_by_line(found, tmp_path, case):
    name, text, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        read_context(write(tmp_path, name, text), found)
    assert "\n" not in str(error.value)
    assert STUDY not in str(error.value)
    assert "recrod" not in str(error.value)


def test_missing_file(found, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_context(tmp_path / "none.csv", found)


def test_a_row_without_a_study_is_a_warning(found, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    rows = read_context(write(tmp_path, "c.csv", "StudyInstanceUID\n1.2.3\n"), found)
    assert rows == {}
    assert "line 2: the input has no such study" in caplog.text
    assert "1.2.3" not in caplog.text


def test_context_reaches_the_report(studies, loaded, tmp_path):
    studies.ct(1, 1)
    studies.ct(2, 1, days=40)
    row = {
        "StudyInstanceUID": STUDY,
        "record": {"labs": [{"name": "crp", "value": 9.0, "unit": "mg/dL"}]},
        "prior": "1.2.826.0.1.3680043.8.498.2.1",
    }
    out, context = tmp_path / "out", write(tmp_path, "c.jsonl", json.dumps(row))
    with (tmp_path / "lines").open("w") as stream:
        assert run_report(studies.root, out, context=context, stream=stream) == 0
    reports = [read_report(path.parent) for path in out.glob("*/report.json")]
    told = next(report for report in reports if len(report.series) == 2)
    assert told.days_to_prior == 40
    assert next(item for item in told.inputs if item.name == "record").detail == ("crp 90 mg/L",)
