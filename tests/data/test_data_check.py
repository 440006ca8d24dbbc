import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import soundfile

from mm.cli import main
from mm.data.check import check
from mm.data.check_text import check_table
from mm.data.spec import load_spec

REAL = pytest.mark.skipif("MM_DATA" not in os.environ, reason="the real data sets need MM_DATA")
SPEC = """
kind: jsonl
name: pictures
root: {root}
index: rows.jsonl
image: {{column: image}}
target: {{column: text}}
side: {{column: side}}
group: {{column: patient}}
split: {{column: split}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(8):
        PIL.Image.fromarray(rng.integers(0, 255, (20, 20), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "7.png").write_bytes((tmp_path / "0.png").read_bytes())
    (tmp_path / "6.png").write_bytes(b"no picture")
    (tmp_path / "pictures.yaml").write_text(SPEC.format(root=tmp_path))
    return tmp_path


def row(image: str, text: str, split: str = "train", *, patient: str | None = None, side: str = "") -> dict[str, Any]:
    return {"image": image, "text": text, "split": split, "patient": patient or image, "side": side}


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "pictures.yaml"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["data", "check", *arguments])
    output = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, output.out, output.err


def test_a_sound_data_set_has_nothing_to_tell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(folder, [row("0.png", "a left nodule", side="left"), row("1.png", "clear", "test"),
                          row("2.png", "no nodule", "val")])  # fmt: skip
    code, out, _ = run(capsys, str(spec))
    assert code == 0
    assert "3 rows (train 1, val 1, test 1), 3 files" in out
    assert "nothing is missing or broken" in out


def test_everything_wrong_is_counted(folder: Path) -> None:
    found = check(
        load_spec(
            write(
                folder,
                [
                    row("0.png", "opacity of the left lung", side="right"),  # 1: against the column
                    row("1.png", "opacity of the left lung"),  # 2 and 3: equal but for the side
                    row("1.png", "Opacity of the RIGHT lung"),
                    row("7.png", "clear", "test"),  # the picture of row 1
                    row("2.png", "clear", "test", patient="0.png"),  # the patient of row 1
                    row("3.png", " "),
                    row("none.png", "clear"),
                    row("6.png", "clear"),
                    row("../secret.png", "clear"),
                    row("4.png", "both lungs", side="left"),  # no conflict
                    row("5.png", "no left effusion"),  # worth a look
                    row("5.png", "right rib fracture"),
                ],
            )
        )
    )
    assert found.rows == {"train": 10, "val": 0, "test": 2}
    assert found.missing.examples == ["none.png"]
    assert found.broken.count == 2
    assert "leads out" in " ".join(found.broken.examples)
    assert "6.png" in " ".join(found.broken.examples)
    assert found.texts.examples[0].startswith("train: row 6 has no text")
    assert found.faulty
    [leak] = found.group_leaks
    assert (leak.first, leak.second, leak.shared, leak.of, leak.rows) == ("train", "test", 1, 2, 1)
    [leak] = found.file_leaks
    assert (leak.first, leak.second, leak.shared, leak.of, leak.rows) == ("train", "test", 1, 2, 1)
    assert found.duplicate_files.examples == ["7.png is 0.png"]
    assert (found.num_texts, found.distinct_texts, found.most_common) == (11, 6, 5)
    assert found.conflicts.count == 2
    assert found.opposite.examples == ["rows 2 and 3", "rows 11 and 12"]
    assert found.lengths["test"].median == 1
    table = check_table(found)
    assert "lung" not in table  # no text of a patient, only places
    assert "leak: 1 of the 2 groups of test are in train too (1 rows of test: 5)" in table
    assert "leak: 1 of the 2 files (by content) of test are in train too (1 rows of test: 4)" in table
    assert "unless that is meant, move the rows" in table


def test_codes_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(folder, [row("none.png", "clear"), *(row(f"x{n}.png", "clear") for n in range(20))])
    code, out, _ = run(capsys, str(spec), "--json")
    assert code == 1
    found = json.loads(out)
    assert found["missing"]["count"] == 21
    assert len(found["missing"]["examples"]) == 10
    code, _, err = run(capsys, "no_such_spec")
    assert code == 2
    assert "no_such_spec" in err
    (folder / "rows.jsonl").unlink()
    code, _, err = run(capsys, str(spec))
    assert code == 2
    assert len(err.strip().splitlines()) == 1


def test_leaks_are_told_and_not_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(folder, [row("0.png", "a"), row("0.png", "b", "test")])
    code, out, _ = run(capsys, str(spec))
    assert code == 0
    assert out.count("leak:") == 2


def test_the_page_is_self_contained_and_escapes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "<script>alert(1)</script>"
    spec = write(folder, [row("0.png", evil), row("6.png", "x", "test"), row('"><img src=x>', "y", "val")])
    page = folder / "page.html"
    code, _, _ = run(capsys, str(spec), "--html", str(page))
    assert code == 1
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert text.count("<img ") == text.count('src="data:image/jpeg;base64,') == 1
    assert "http://" not in text
    assert "https://" not in text
    assert text.count("can't be shown") == 2
    code, _, err = run(capsys, str(spec), "--html", str(folder / "nowhere" / "page.html"))
    assert code == 2
    assert "does not exist" in err


def test_the_page_plays_short_sounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, seconds in enumerate((1, 60)):
        soundfile.write(tmp_path / f"{number}.wav", np.zeros(8000 * seconds, np.float32), 8000)
    lines = [{"sound": f"{number}.wav", "text": "a <b>", "split": "train"} for number in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    spec = tmp_path / "sounds.yaml"
    spec.write_text(
        f"kind: jsonl\nname: sounds\nroot: {tmp_path}\nindex: rows.jsonl\naudio: {{column: sound, rate: 8000}}\n"
        "target: {column: text}\nsplit: {column: split}\n"
    )
    page = tmp_path / "page.html"
    assert run(capsys, str(spec), "--html", str(page))[0] == 0
    text = page.read_text()
    assert text.count("<audio ") == text.count('src="data:audio/') == 1  # the other is too long
    assert text.count(".wav</p>") == 2
    assert text.count("<p>a &lt;b&gt;</p>") == 2


def test_the_page_holds_a_few_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(folder, [row(f"{n % 6}.png", f"text {n}") for n in range(500)])
    run(capsys, str(spec), "--html", str(folder / "page.html"))
    assert 12 < (folder / "page.html").read_text().count("<article>") <= 24


def test_procedural_patients_share_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "phantom")
    assert code == 0
    assert "20,000" in out
    text = (Path(__file__).parents[2] / "data_specs" / "phantom.yaml").read_text()
    (tmp_path / "same.yaml").write_text(text.replace("seed: 3", "seed: 1"))
    assert check(load_spec(tmp_path / "same.yaml")).group_leaks[0].shared == 200
    code, _, err = run(capsys, "phantom", "--html", str(tmp_path / "page.html"))
    assert code == 2
    assert "procedural" in err


@REAL
def test_vqa_rad_leaks_by_design() -> None:
    found = check(load_spec("vqa_rad"))
    assert not found.faulty
    assert found.rows["test"] == 451
    assert found.rows["train"] + found.rows["val"] == 1797
    assert sum(leak.shared for leak in found.file_leaks if leak.second == "test") == 202
    assert {leak.of for leak in found.file_leaks if leak.second == "test"} == {203}


@REAL
@pytest.mark.parametrize(
    ("name", "rows"),
    [("fsdd", (1200, 300)), ("iu_xray", (3826, None))],
)
def test_other_real_data_is_whole(name: str, rows: tuple[int, int | None]) -> None:
    found = check(load_spec(name))
    assert not found.faulty
    if rows[1] is None:
        assert sum(found.rows.values()) == rows[0]
        assert not found.group_leaks
    else:
        assert (found.rows["train"] + found.rows["val"], found.rows["test"]) == rows
        assert {leak.shared for leak in found.group_leaks} == {6}
