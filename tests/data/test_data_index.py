import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mm.data.index import index_digest, inside, read_index, rows_by_split
from mm.data.readers import TableDataset, open_split, read_sound, texts
from mm.data.spec import TableSpec, load_spec

ROWS = [{"id": str(n), "patient": f"p{n // 2}", "text": f"a text, no. {n}\nand more", "part": "abc"[n % 3]}
        for n in range(60)]  # fmt: skip
SPEC = """
kind: {kind}
name: words
root: {root}
index: {index}
target: {{column: text}}
"""
SPLIT = "split: {column: part, train: [a], val: [b], test: [c]}\n"


def made(folder: Path, rest: str = SPLIT, *, kind: str = "jsonl", index: str = "rows.jsonl") -> TableSpec:
    (folder / "words.yaml").write_text(SPEC.format(kind=kind, root=folder, index=index) + rest)
    spec = load_spec(folder / "words.yaml")
    assert isinstance(spec, TableSpec)
    return spec


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pa = pytest.importorskip("pyarrow", reason="the extra mm-report[parquet] is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(("kind", "write"), [("jsonl", write_jsonl), ("csv", write_csv), ("parquet", write_parquet)])
def test_every_form_gives_the_same_rows(
    kind: str, write: Callable[[Path, list[dict[str, Any]]], None], tmp_path: Path
) -> None:
    write(tmp_path / f"rows.{kind}", ROWS)
    spec = made(tmp_path, kind=kind, index=f"rows.{kind}")
    split = rows_by_split(spec)
    for number, part in enumerate(("train", "val", "test")):
        assert split[part] == [{**row, "__row__": 3 * n + number} for n, row in enumerate(ROWS[number::3])]  # type: ignore[index]
    assert len(index_digest(spec)) == 64


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"pip install 'mm-report\[parquet\]'"):
        read_index(tmp_path / "rows.parquet", "parquet")


def test_an_index_for_each_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "one.jsonl", ROWS[:40])
    write_jsonl(tmp_path / "two.jsonl", ROWS[40:])
    carved = "val: {share: 0.3, group: {column: patient}}\n"
    split = rows_by_split(made(tmp_path, carved, index="{train: one.jsonl, test: two.jsonl}"))
    assert [row["id"] for row in split["test"]] == [str(n) for n in range(40, 60)]
    assert len(split["train"]) + len(split["val"]) == 40
    assert split["val"]


def test_carved_splits_share_no_group_and_one_share_does_not_move_the_other(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    carve = "val: {{share: {}, group: {{column: patient}}}}\ntest: {{share: 0.3, group: {{column: patient}}}}\n"
    tests = []
    for share in (0.2, 0.6):
        split = rows_by_split(made(tmp_path, carve.format(share)))
        groups = [{row["patient"] for row in split[part]} for part in ("train", "val", "test")]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 30
        assert all(groups)
        tests.append(groups[2])
    assert tests[0] == tests[1]


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("", "no split; give split"),
        ("val: {share: 0.5, group: {column: patient}}\n", "no split; give split"),
        (SPLIT + "val: {share: 1.0, group: {column: patient}}\n", r"val.share must be above 0 and below 1, got 1.0"),
        (SPLIT + "pattern: x\n", "pattern belongs to kind files"),
        (SPLIT + "format: csv\n", "format is no key"),
        (SPLIT + "audio: {column: id, rate: 0}\n", "audio.rate must be at least 1 Hz, got 0"),
        (SPLIT + "audio: {column: id, rate: 8000, site: knee}\n", "audio.site must be one of left_upper"),
    ],
)
def test_what_does_not_fit_together_is_named(rest: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        made(tmp_path, rest)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,b\n1\n", "line 2: 1 cells, but the header names 2"),
        ("a,a\n1,2\n", "the header must name every column once"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_a_broken_csv_is_named(content: str | bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words):
        read_index(tmp_path / "rows.csv", "csv")


def test_one_group_is_held_out_and_all_others_are_trained_on(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    made(tmp_path, SPLIT + "group: {column: patient}\n")
    spec = load_spec(tmp_path / "words.yaml", held_out="p7")
    assert isinstance(spec, TableSpec)
    split = rows_by_split(spec)
    assert [row["id"] for row in split["test"]] == ["14", "15"]
    rest = [row for row in ROWS if row["patient"] != "p7"]
    assert {row["id"] for row in split["train"]} == {row["id"] for row in rest if row["part"] != "b"}
    assert {row["id"] for row in split["val"]} == {row["id"] for row in rest if row["part"] == "b"}
    carved = "val: {share: 0.3, group: {column: id}}\ngroup: {column: patient}\nheld_out: p7\n"
    split = rows_by_split(made(tmp_path, carved))  # and without any other split
    assert [row["id"] for row in split["test"]] == ["14", "15"]
    assert len(split["train"]) + len(split["val"]) == 58
    assert len(split["val"]) > 5


def test_what_cannot_be_held_out_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"held_out must be one of patient \(p0, p1, p10, .*, \.\.\.\); got 'p30'"):
        open_split(made(tmp_path, SPLIT + "group: {column: patient}\nheld_out: p30\n"), "train")
    for rest in (SPLIT, SPLIT + "group: {column: patient}\ntest: {share: 0.1, group: {column: id}}\n"):
        with pytest.raises(ValueError, match="held_out needs a group, one index for all splits and no carved test"):
            made(tmp_path, rest + "held_out: p7\n")
    with pytest.raises(ValueError, match=r"phantom\.yaml is procedural and takes no held_out; got 'p7'"):
        load_spec("phantom", held_out="p7")


def test_an_unknown_split_and_an_empty_text_are_named_before_training(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [*ROWS[:4], {**ROWS[4], "part": "d"}])
    with pytest.raises(ValueError, match=r"split must be one of a, b, c; got 'd' in row 5"):
        open_split(made(tmp_path), "train")
    write_jsonl(tmp_path / "rows.jsonl", [*ROWS[:3], {**ROWS[3], "text": " "}, {**ROWS[6], "text": None}])
    with pytest.raises(ValueError, match="row 4 has no text in text"):
        open_split(made(tmp_path), "train")
    assert len(rows_by_split(made(tmp_path, SPLIT + "drop_empty: true\n"))["train"]) == 1


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\0b", "link/x"])
def test_no_path_leads_out_of_the_root(name: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="path"):
        inside(root, name)
    assert inside(root, "a/../b.png") == (root / "b.png").resolve()


def test_an_index_or_glob_outside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leads out"):
        rows_by_split(made(tmp_path, index="../rows.jsonl"))
    with pytest.raises(ValueError, match="must be a glob below the root"):
        rows_by_split(made(tmp_path, SPLIT + "pattern: '.*'\n", kind="files", index="'../*'"))


def test_captions_are_drawn_in_training_and_the_first_elsewhere(tmp_path: Path) -> None:
    five = [f"caption {n}" for n in range(5)]
    write_jsonl(tmp_path / "rows.jsonl", [{"text": five, "part": part} for part in "abc"])
    spec = made(tmp_path)
    train, test = open_split(spec, "train"), open_split(spec, "test")
    assert isinstance(test, TableDataset)
    assert {train[0].text for _ in range(100)} == set(five)
    assert {test[0].text for _ in range(20)} == {"caption 0"}
    assert test.texts(0) == tuple(five)
    assert sorted(texts(spec)) == five


def test_names_of_files_are_rows_and_sounds_are_read(tmp_path: Path) -> None:
    for digit in range(3):
        for take in range(4):
            time = np.arange(4000) / 4000
            soundfile.write(tmp_path / f"{digit}_ann_{take}.wav", 0.5 * np.sin(2 * np.pi * 200 * time), 4000)
    spec = made(
        tmp_path,
        r"""
pattern: '(?P<digit>\d)_(?P<who>[a-z]+)_(?P<take>\d)\.wav'
split: {column: take, val: ["1"], test: ["0"], rest: train}
audio: {column: path, rate: 4000, site: right_lower}
""".replace("\n\n", "\n"),
        kind="files",
        index="'*.wav'",
    )
    spec_text = (tmp_path / "words.yaml").read_text()
    words = '{column: digit, words: {"0": zero, "1": one, "2": two}}'
    (tmp_path / "words.yaml").write_text(spec_text.replace("{column: text}", words))
    spec = load_spec(tmp_path / "words.yaml")  # type: ignore[assignment]
    assert [len(rows) for rows in rows_by_split(spec).values()] == [6, 3, 3]
    sample = open_split(spec, "test")[2]
    assert sample.text == "two"
    assert [sound is None for sound in sample.audio] == [True, True, True, False]
    sound = sample.audio[3]
    assert sound is not None
    assert len(sound) == 8000  # a second at the model's rate, and still 200 Hz
    assert np.abs(np.fft.rfft(sound)).argmax() == 200
    with pytest.raises(ValueError, match=r"has 4000 Hz, but the data spec says audio.rate 8000"):
        read_sound(tmp_path / "0_ann_0.wav", rate=8000)
    (tmp_path / "strange.wav").touch()
    with pytest.raises(ValueError, match=r"'strange.wav' doesn't fit the pattern"):
        rows_by_split(spec)
