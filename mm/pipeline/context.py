"""`--context FILE.jsonl|csv`: record, sounds and priors of studies, by StudyInstanceUID or AccessionNumber."""

import csv
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mm import ontology
from mm.data.json_lines import json_lines
from mm.dicom.scan import Scan
from mm.pipeline.case import ContextRow

logger = logging.getLogger(__name__)

KEYS: Final = ("StudyInstanceUID", "AccessionNumber")
COLUMNS: Final = (*KEYS, "record", "audio", "prior")


def read_context(path: Path, found: Scan) -> dict[str, ContextRow]:
    """Rows of a context file by StudyInstanceUID.

    Files named in it are taken from the folder that it lies in. `record` is a JSON file or, in JSON lines, an
    object; `audio` is a folder with sound_<site>.wav or, in JSON lines, an object of files by site; `prior` is
    one or several StudyInstanceUIDs (a list, or parted by ;). A row without a study is a warning.

    Args:
        path: JSON lines or CSV.
        found: The scanned input.

    Raises:
        ValueError: Another kind of file, an unknown column, no key, two rows for one study, or a missing file;
            the message names the line, never what stands in it.
    """
    if path.suffix not in {".jsonl", ".csv"}:
        raise ValueError(f"--context {path}: must end in .jsonl or .csv")
    if not path.is_file():
        raise ValueError(f"--context {path}: no such file")
    by_uid = {study.study_instance_uid: study.study_instance_uid for study in found.studies}
    by_number: dict[str, list[str]] = {}
    for study in found.studies:
        if study.accession_number:
            by_number.setdefault(study.accession_number, []).append(study.study_instance_uid)
    rows: dict[str, ContextRow] = {}
    for line, row in _rows(path):
        where = f"--context {path.name} line {line}"
        unknown = [name for name in row if name not in COLUMNS]
        if unknown:
            # Not its name: the first row of a table without a header is a patient's.
            column = list(row).index(unknown[0]) + 1
            raise ValueError(f"{where}: unknown column (number {column}); accepted: {', '.join(COLUMNS)}")
        uid, number = (str(row.get(key) or "").strip() for key in KEYS)
        if not uid and not number:
            raise ValueError(f"{where}: needs a StudyInstanceUID or an AccessionNumber")
        studies = [by_uid[uid]] if uid in by_uid else by_number.get(number, []) if not uid else []
        if not studies:
            logger.warning("%s: the input has no such study; the row is not used", where)
        for study_uid in studies:
            if study_uid in rows:
                raise ValueError(f"{where}: a second row for the same study; one row a study is accepted")
            rows[study_uid] = ContextRow(
                _record(row.get("record"), path.parent, where),
                _audio(row.get("audio"), path.parent, where),
                _priors(row.get("prior"), by_uid, where),
            )
    return rows


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--context {path.name}: must be UTF-8 text") from error
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines())
        for row in reader:
            if None in row:
                raise ValueError(
                    f"--context {path.name} line {reader.line_num}: more cells than the header has columns"
                )
            yield reader.line_num, row
        return
    yield from json_lines(text, where=f"--context {path.name}")


def _record(value: Any, folder: Path, where: str) -> dict[str, Any] | Path | None:
    if value is None or value == "":
        return None
    if isinstance(value, dict):
        return value
    if not isinstance(value, str) or not (folder / value).is_file():
        raise ValueError(f"{where}: record must be a JSON file that exists, or in JSON lines an object")
    return folder / value


def _audio(value: Any, folder: Path, where: str) -> dict[str, Path]:
    if value is None or value == "":
        return {}
    if isinstance(value, str) and (folder / value).is_dir():
        places = {site: folder / value / f"sound_{site}.wav" for site in ontology.SOUND_SITES}
        return {site: place for site, place in places.items() if place.is_file()}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: audio must be a folder that exists, or in JSON lines an object of files by site")
    for site, file in value.items():
        if site not in ontology.SOUND_SITES:
            raise ValueError(f"{where}: unknown sound site; accepted: {', '.join(ontology.SOUND_SITES)}")
        if not isinstance(file, str) or not (folder / file).is_file():
            raise ValueError(f"{where}: the sound of {site} must be a file that exists")
    return {site: folder / file for site, file in value.items()}


def _priors(value: Any, known: dict[str, str], where: str) -> tuple[str, ...] | None:
    if value is None or value == "":
        return None
    uids = value if isinstance(value, list) else str(value).split(";")
    given = tuple(str(uid).strip() for uid in uids)
    if any(uid not in known for uid in given):
        logger.warning("%s: a prior is not in the input; it is not used", where)
    return tuple(uid for uid in given if uid in known)
