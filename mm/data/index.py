"""Rows of a data set's index: JSON lines, CSV, Parquet, or the names of files; which split each belongs to."""

import csv
import difflib
import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from mm.data.columns import Carve, Column, TextColumn
from mm.data.json_lines import json_lines
from mm.data.spec import SPLITS, Format, Split, TableSpec
from mm.files import file_digest

Row: TypeAlias = dict[str, Any]
"""Columns of a row, and its number in the index (from 0) under `__row__`."""


def rows_by_split(spec: TableSpec) -> dict[Split, list[Row]]:
    """All rows but those that `drop_empty` takes, and `exclude` from train and val.

    Raises:
        ValueError: An index is missing or broken, a row lacks a column or names no split, or nothing is `held_out`.
    """
    kept: dict[Split, list[Row]] = {"train": [], "val": [], "test": []}
    rows = list(_rows(spec))
    _check_columns([row for _, row in rows], spec)
    if spec.held_out is not None:
        assert spec.group is not None
        known = sorted({value(row, spec.group.column) for _, row in rows})
        if spec.held_out not in known:
            several = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
            raise ValueError(f"data spec {spec.name}: held_out must be one of {spec.group.column} ({several}); "
                             f"got {spec.held_out!r}")  # fmt: skip
    for given, row in rows:
        if spec.drop_empty and not _texts_of(row, spec.target):
            continue
        split = _split_of(row, spec, given)
        if split == "test" or not is_flagged(row, spec.exclude):
            kept[split].append(row)
    return kept


def _check_columns(rows: list[Row], spec: TableSpec) -> None:
    """Whether every column that the spec names is one of some row at least; told once, not for each row."""
    known = {key for row in rows for key in row if key != "__row__"}
    for key in ("image", "audio", "prompt", "target", "closed", "region", "side", "group", "exclude", "split"):
        asked = getattr(spec, key)
        names = () if asked is None else (asked.column, *getattr(asked, "then", ()))
        for name in names:
            if rows and name not in known:
                close = difflib.get_close_matches(name, sorted(known), n=1)
                meant = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"data spec {spec.name}: {key} names column {name!r}, which no row of the index has; "
                                 f"they have {', '.join(sorted(known))}{meant}")  # fmt: skip


def num_rows(spec: TableSpec) -> int:
    """Rows of the index, left out or not."""
    return sum(1 for _ in _rows(spec))


def index_digest(spec: TableSpec) -> str:
    """Hash of the index (of kind `files`: of the names), whatever the files hold that it names."""
    if spec.format == "files":
        assert isinstance(spec.index, str)
        names = "\n".join(row["path"] for row in _file_rows(spec))
        return hashlib.sha256(names.encode()).hexdigest()
    digests = [file_digest(inside(spec.root, name)) for _, name in _indexes(spec)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def targets(row: Row, spec: TableSpec) -> tuple[str, ...]:
    """The texts of a row: an answer, a report of one or more columns, or captions.

    Raises:
        ValueError: A column is missing, a value has no words, or there is no text at all.
    """
    asked = spec.target
    offered = _texts_of(row, asked)
    if not offered:
        named = ", ".join((asked.column, *asked.then))
        raise ValueError(f"row {row['__row__'] + 1} has no text in {named}; fill it in, or drop_empty: true")
    if asked.words is None:
        return offered
    if not all(item in asked.words for item in offered):
        raise ValueError(f"row {row['__row__'] + 1}: target.words has no entry for its value of {asked.column!r}")
    return tuple(asked.words[item] for item in offered)


def _texts_of(row: Row, asked: TextColumn) -> tuple[str, ...]:
    content = cell(row, asked.column)
    if isinstance(content, list | tuple):
        return tuple(text for item in content if (text := _text(item)).strip())
    parts = [value(row, name) for name in (asked.column, *asked.then)]
    text = " ".join(part for part in parts if part.strip())
    return (text,) if text else ()


def value(row: Row, column: str) -> str:
    """A column of a row, as text; what is empty or null is "".

    Raises:
        ValueError: The row doesn't have it; the message lists the columns.
    """
    return _text(cell(row, column))


def cell(row: Row, column: str) -> Any:
    """A column of a row as it stands.

    Raises:
        ValueError: The row doesn't have it; the message lists the columns.
    """
    if column not in row:
        known = ", ".join(sorted(key for key in row if key != "__row__"))
        raise ValueError(f"row {row['__row__'] + 1} has no column {column!r}; it has {known}")
    return row[column]


def is_flagged(row: Row, column: Column | None) -> bool:
    """True where there is such a column and it has the value that means yes."""
    return column is not None and value(row, column.column) == column.equals


def inside(root: str | Path, name: str) -> Path:
    """A path of the index, resolved.

    Raises:
        ValueError: It is empty, or leads out of `root` (by `..`, from `/` or through a link).
    """
    base = Path(root).resolve()
    if not name.strip() or "\0" in name:
        raise ValueError(f"path {name!r} names no file")
    path = (base / name).resolve()
    if not path.is_relative_to(base):
        raise ValueError(f"path {name!r} leads out of the data set's root; move the file or set the root above both")
    return path


def read_index(path: Path, form: Format = "jsonl") -> list[Row]:
    """Rows of an index file.

    Raises:
        ValueError: The file is missing or not of that form.
        ImportError: Parquet without pyarrow.
    """
    if not path.is_file():
        raise ValueError(f"index {str(path)!r} does not exist")
    if form == "parquet":
        rows = _parquet(path)
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"index {path.name!r} is not UTF-8 text") from error
        if form == "jsonl":
            return [{**row, "__row__": line - 1} for line, row in json_lines(text, where=path.name)]
        rows = list(_csv(text, where=path.name))
    return [{**row, "__row__": number} for number, row in enumerate(rows)]


def _csv(text: str, *, where: str) -> Iterator[Row]:
    lines = csv.reader(io.StringIO(text), strict=True)
    header = next(lines, [])
    if len(set(header)) < len(header) or not all(header):
        raise ValueError(f"{where}: the header must name every column once")
    for cells in lines:
        if not cells:
            continue
        if len(cells) != len(header):
            raise ValueError(f"{where} line {lines.line_num}: {len(cells)} cells, but the header names {len(header)}")
        yield dict(zip(header, cells, strict=True))


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("a Parquet index needs pyarrow: pip install 'mm-report[parquet]'") from error
    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"index {path.name!r} is not Parquet") from error
    return rows


def _indexes(spec: TableSpec) -> Iterator[tuple[Split | None, str]]:
    if isinstance(spec.index, str):
        yield None, spec.index
        return
    for split in SPLITS:
        name = getattr(spec.index, split)
        if name is not None:
            yield split, name


def _rows(spec: TableSpec) -> Iterator[tuple[Split | None, Row]]:
    if spec.format == "files":
        yield from ((None, row) for row in _file_rows(spec))
        return
    for split, name in _indexes(spec):
        yield from ((split, row) for row in read_index(inside(spec.root, name), spec.format))


def _file_rows(spec: TableSpec) -> list[Row]:
    assert isinstance(spec.index, str)
    assert spec.pattern is not None
    if ".." in Path(spec.index).parts or Path(spec.index).is_absolute():
        raise ValueError(f"data spec {spec.name}: index must be a glob below the root, got {spec.index!r}")
    root, rows = Path(spec.root), []
    for number, path in enumerate(sorted(root.glob(spec.index))):
        name = path.relative_to(root).as_posix()
        found = re.fullmatch(spec.pattern, name)
        if found is None:
            raise ValueError(f"data spec {spec.name}: file {name!r} doesn't fit the pattern; narrow the index's glob")
        rows.append({"path": name, **found.groupdict(), "__row__": number})
    return rows


def _split_of(row: Row, spec: TableSpec, given: Split | None) -> Split:
    split = given or "train"
    if spec.split is not None:
        text = value(row, spec.split.column)
        means: dict[str, Split] = {text: name for name in SPLITS for text in getattr(spec.split, name)}
        if text not in means and spec.split.rest is None:
            known = ", ".join(means)
            raise ValueError(
                f"data spec {spec.name}: split must be one of {known}; got {text!r} in row {row['__row__'] + 1}"
            )
        split = means.get(text) or spec.split.rest or split
    if spec.held_out is not None:
        assert spec.group is not None
        if value(row, spec.group.column) == spec.held_out:
            return "test"
        split = "train" if split == "test" else split
    if split == "train" and spec.test is not None and _carved(row, spec.test, start=4):
        return "test"
    if split == "train" and spec.val is not None and _carved(row, spec.val, start=0):
        return "val"
    return split


def _carved(row: Row, carve: Carve, *, start: int) -> bool:
    """By other bytes of one hash for the two splits, so that neither choice depends on the other's share."""
    digest = hashlib.sha256(value(row, carve.group.column).encode()).digest()
    return int.from_bytes(digest[start : start + 4], "big") < carve.share * 2**32


def _text(content: Any) -> str:
    """Text of a cell; booleans as JSON and Parquet write them."""
    if content is None:
        return ""
    return str(content).lower() if isinstance(content, bool) else str(content)
