"""report.json: the same report gives the same bytes, and reads back as the same report."""

import json
from dataclasses import asdict
from pathlib import Path

from mm.dicom.quality import Flag, Quality
from mm.report.schema import (
    NOTICE,
    SCHEMA,
    InputUsed,
    Json,
    ModelIdentity,
    Report,
    ReportedFinding,
    ReportedSentence,
    SeriesUsed,
    Size,
)


def to_json(report: Report) -> str:
    """The report as JSON text; no clock time, fixed order of keys, UTF-8."""
    content: Json = {
        "schema": SCHEMA,
        "notice": NOTICE["en"],
        "study": report.study,
        "model": asdict(report.model),
        "series": [asdict(item) for item in report.series],
        "inputs": [asdict(item) for item in report.inputs],
        "findings": [asdict(item) for item in report.findings],
        "sentences": [asdict(item) for item in report.sentences],
    }
    return json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> Report:
    """Reads `to_json` back (without the key images, which are not in it).

    Raises:
        ValueError: Not a report, or of another schema; the message says which one was expected.
    """
    content: Json = json.loads(text)
    given = content.get("schema") if isinstance(content, dict) else None
    if given != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA!r}, got {given!r}")
    return Report(
        study=content["study"],
        model=ModelIdentity(**content["model"]),
        series=tuple(_series(item) for item in content["series"]),
        inputs=tuple(InputUsed(**_tuples(item)) for item in content["inputs"]),
        findings=tuple(_finding(item) for item in content["findings"]),
        sentences=tuple(ReportedSentence(**item) for item in content["sentences"]),
    )


def read_report(folder: Path) -> Report:
    """The report of a folder that `mm report` wrote.

    Raises:
        ValueError: As `from_json`.
        OSError: There is no report.json.
    """
    return from_json((folder / "report.json").read_text(encoding="utf-8"))


def _series(item: Json) -> SeriesUsed:
    kept = item.get("quality", {})  # reports from before the quality guard have none
    flags = tuple(Flag(**flag) for flag in kept.get("flags", ()))
    return SeriesUsed(**{**_tuples(item), "quality": Quality(**{**kept, "flags": flags})})


def _finding(item: Json) -> ReportedFinding:
    size = None if item["size"] is None else Size(**item["size"])
    return ReportedFinding(**{**_tuples(item), "size": size})


def _tuples(item: Json) -> Json:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in item.items()}
