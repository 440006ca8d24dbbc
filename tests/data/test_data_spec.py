import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch

from mm.data import readers
from mm.data.datamodule import SORTED_BATCHES, MultimodalData, Shuffled
from mm.data.readers import open_split, read_sound, texts
from mm.data.sounds import SoundChanges
from mm.data.spec import PhantomSpec, TableSpec, describe, load_spec, procedural
from mm.dicom.resample import IMAGE_GRID

TABLE = """
kind: jsonl
name: pictures
root: ${PICTURES}
index: rows.jsonl
image: {column: image}
prompt: {column: question}
target: {column: answer}
closed: {column: type, equals: CLOSED}
split: {column: split}
val: {share: 0.3, group: {column: image}}
"""


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = []
    for number in range(60):
        name = f"p{number % 20}.png"
        if number < 20:
            pixels = np.zeros((40, 60), np.uint8)
            pixels[:, 30:] = 200
            PIL.Image.fromarray(pixels).save(tmp_path / name)
        split = "test" if number % 20 > 14 else "train"
        kind = "CLOSED" if number % 2 else "OPEN"
        rows.append({"image": name, "question": f"what is {number}?", "answer": "yes", "type": kind, "split": split})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "pictures.yaml").write_text(TABLE)
    monkeypatch.setenv("PICTURES", str(tmp_path))
    return tmp_path / "pictures.yaml"


def test_shipped_specs_parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert isinstance(load_spec("phantom"), PhantomSpec)
    spec = load_spec("vqa_rad", root=tmp_path)
    assert isinstance(spec, TableSpec)
    assert spec.root == str(tmp_path)
    assert "root" not in describe(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("jsonl\nname", "xls\nname"), "kind must be one of phantom, jsonl, csv.*; got 'xls'"),
        (lambda text: text.replace("target:", "traget:"), "option 'traget.*'; did you mean target"),
        (
            lambda text: text.replace("{column: answer", "{colum: answer"),
            r"option 'target\.colum'; did you mean column",
        ),
        (lambda text: text.replace("image: {", "image: ["), r"pictures\.yaml line 6: not YAML"),
        (lambda text: text.replace("${PICTURES}", "${NOWHERE}"), "set NOWHERE in the environment"),
        (lambda text: text.replace("${PICTURES}", "/does/not/exist"), "is no folder; give --data.root"),
    ],
)
def test_mistakes_are_named(table: Path, change: Callable[[str], str], message: str) -> None:
    table.write_text(change(TABLE))
    with pytest.raises(ValueError, match=message):
        load_spec(table)


def test_a_spec_imports_nothing_foreign(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (table.parent / "foreign_column.py").write_text("from mm.data.spec import Column\n")
    monkeypatch.syspath_prepend(str(table.parent))
    evil = "split: {class_path: foreign_column.Column, init_args: {column: split}}"
    table.write_text(TABLE.replace("split: {column: split}", evil))
    with pytest.raises(ValueError, match=r"data spec pictures\.yaml: ") as error:
        load_spec(table)
    assert "\n" not in str(error.value)
    assert "foreign_column" not in sys.modules


def test_what_was_procedural_is_known_by_its_description(table: Path) -> None:
    assert procedural(describe(load_spec("phantom")))
    assert not procedural(describe(load_spec(table)))


def test_validation_is_carved_by_image(table: Path) -> None:
    spec = load_spec(table)
    images = {}
    for split in ("train", "val", "test"):
        rows = open_split(spec, split).rows  # type: ignore[attr-defined]
        images[split] = {row["image"] for row in rows}
        assert len(rows) == 3 * len(images[split])  # a group stays whole
    assert not images["train"] & images["val"]
    assert images["test"] == {f"p{n}.png" for n in range(15, 20)}


def test_rows_become_samples(table: Path) -> None:
    samples = open_split(load_spec(table), "test")
    sample = samples[1]
    assert sample.image is not None
    assert sample.image.shape == (IMAGE_GRID, IMAGE_GRID)
    assert 0.0 <= float(sample.image.min()) <= float(sample.image.max()) <= 1.0
    assert sample.questions[0].answer == "yes"
    assert open_split(load_spec(table), "test", inputs=())[1].image is None
    assert {samples[i].questions[0].closed for i in range(len(samples))} == {True, False}  # type: ignore[arg-type]


def test_the_part_of_the_body_is_told_of_training_rows_alone(table: Path) -> None:
    table.write_text(TABLE + "region: {column: type}\n")
    for split, told in (("train", {"CLOSED", "OPEN"}), ("val", {""}), ("test", {""})):
        samples = open_split(load_spec(table), split, inputs=())
        found = [samples[i].questions[0].region for i in range(len(samples))]  # type: ignore[arg-type]
        assert set(found) == told
    table.write_text(TABLE + "region: {column: orgn}\n")
    with pytest.raises(ValueError, match="region names column 'orgn'"):
        open_split(load_spec(table), "train")


def test_a_missing_column_or_picture_is_named(table: Path) -> None:
    for change, message in (
        (("column: answer", "column: anwser"), r"target names column 'anwser', which no row .*; did you mean answer\?"),
        (("{column: question}", "{column: reply}"), r"prompt names column 'reply', .*; they have answer, image, quest"),
    ):
        table.write_text(TABLE.replace(*change))
        with pytest.raises(ValueError, match=message):
            open_split(load_spec(table), "train")
    table.write_text(TABLE)
    (table.parent / "p15.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"pictures, row 16: image 'p15.png' is broken, .*; replace the file or take"):
        open_split(load_spec(table), "test")[0]
    (table.parent / "p16.png").unlink()
    with pytest.raises(ValueError, match=r"missing below .*: 'p16.png' \(row 17\); put the files there"):
        open_split(load_spec(table), "test")
    assert len(open_split(load_spec(table), "test", inputs=())) == 15  # words need no files


def test_a_column_that_some_row_lacks_is_told_before_training(table: Path) -> None:
    lines = (table.parent / "rows.jsonl").read_text().splitlines()
    lines[15] = json.dumps({key: item for key, item in json.loads(lines[15]).items() if key != "question"})
    (table.parent / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="row 16 has no column 'question'; it has answer, image, split, type"):
        open_split(load_spec(table), "test")


def test_loaders_yield_numbers_and_batches(table: Path) -> None:
    data = MultimodalData(spec=str(table), batch_size=4, workers=0, vocab_size=300)
    numbers, batch = next(iter(data.val_dataloader()))
    assert numbers.tolist() == [0, 1, 2, 3]
    assert batch.size == 4
    assert batch.image is not None
    assert batch.writing is not None
    data.texts_only = True
    assert next(iter(data.val_dataloader()))[1].image is None
    assert next(iter(data.loader("train", start=5, everything=True)))[0].tolist() == [5, 6, 7, 8]
    assert any("what is" in text for text in texts(data.spec))


def test_numbers_out_of_range_are_refused(table: Path) -> None:
    with pytest.raises(ValueError, match=r"data.batch_size must be at least 1, got 0"):
        MultimodalData(spec=str(table), batch_size=0)
    with pytest.raises(ValueError, match=r"data.mirror must be a share from 0 to 1, got 2.0"):
        MultimodalData(spec=str(table), mirror=2.0)
    with pytest.raises(ValueError, match=r"data.tokenizer 'nowhere'"):
        _ = MultimodalData(spec=str(table), tokenizer="nowhere").tokenizer


def test_only_training_pictures_are_mirrored_and_none_from_a_cache(table: Path) -> None:
    data = MultimodalData(spec=str(table), batch_size=4, workers=0, vocab_size=300, mirror=1.0)
    for split, bright in (("train", slice(0, 128)), ("val", slice(128, 256))):
        _, batch = next(iter(data.loader(split)))
        assert batch.image is not None
        assert float(batch.image.values[..., bright].sum()) > 0.95 * float(batch.image.values.sum())
    _, batch = next(iter(data.loader("train", everything=True)))
    assert batch.image is not None
    assert float(batch.image.values[..., 128:].sum()) > 0.95 * float(batch.image.values.sum())
    data.texts_only = True
    with pytest.raises(ValueError, match=r"data.mirror 1.0 can't mirror inputs that are cached"):
        data.loader("train")


def test_only_training_sounds_are_changed_and_none_from_a_cache(tmp_path: Path) -> None:
    for take in range(6):
        tone = np.sin(np.arange(1000) / 9)
        soundfile.write(tmp_path / f"{take % 2}_{'ab'[take // 3]}_{take}.flac", tone, 8000)
    changes = SoundChanges(noise_db=(0.0, 0.0))

    def data(**more: Any) -> MultimodalData:
        settings = {"batch_size": 3, "workers": 0, "inputs": ("audio",), "vocab_size": 300, "sounds": changes}
        return MultimodalData(spec="fsdd", root=str(tmp_path), held_out="b", **settings | more)

    def heard(data: MultimodalData, *, everything: bool = False) -> torch.Tensor:
        _, batch = next(iter(data.loader("train", everything=everything)))
        assert batch.audio is not None
        return batch.audio.values[:, 0]

    plain = heard(data(sounds=None))
    assert plain.shape == (len(data().dataset("train")), 1000)  # type: ignore[arg-type]
    assert float(heard(data()).std()) == pytest.approx(float(plain.std()) * 2**0.5, rel=0.1)
    assert torch.equal(heard(data()), heard(data()))
    assert torch.equal(heard(data(), everything=True), plain)
    cached = data()
    cached.texts_only = True
    with pytest.raises(ValueError, match=r"data.sounds can't change inputs that are cached"):
        cached.loader("train")


def test_order_differs_by_epoch_and_goes_on_where_it_stopped() -> None:
    first, again, resumed = (Shuffled(50, seed=1, batch_size=4) for _ in range(3))
    assert list(first) == list(again)
    assert sorted(item.study for item in first) == list(range(50))
    before = list(first)
    first.set_epoch(1)
    assert [item.study for item in first] != [item.study for item in before]
    assert {item.seed for item in first}.isdisjoint(item.seed for item in before)
    resumed.go_on(1, 3)
    assert list(resumed) == list(first)[12:]
    assert len(resumed) == 50
    resumed.set_epoch(2)
    first.set_epoch(2)
    assert list(resumed) == list(first)


def test_batches_of_sounds_are_of_like_length_and_still_an_order_of_all() -> None:
    seconds = torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist()
    plain = Shuffled(50, seed=1, batch_size=4)
    alike, resumed = (Shuffled(50, seed=1, batch_size=4, seconds=seconds) for _ in range(2))
    order = [item.study for item in alike]
    stretches = [range(start, min(start + SORTED_BATCHES * 4, 48)) for start in range(0, 48, SORTED_BATCHES * 4)]
    for stretch in stretches:
        drawn = [list(plain)[place].study for place in stretch]
        assert [order[place] for place in stretch] == sorted(drawn, key=seconds.__getitem__)
    assert order[48:] == [item.study for item in plain][48:]  # what a last, dropped batch loses is drawn, not the long
    assert {item.study: item.seed for item in alike} == {item.study: item.seed for item in plain}
    resumed.go_on(0, 3)
    assert list(resumed) == list(alike)[12:]


def test_training_sounds_come_by_length_and_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for take in range(20):
        soundfile.write(tmp_path / f"{take % 2}_{'ab'[take > 15]}_{take}.flac", np.ones(600 + 100 * take) / 2, 8000)
    read: list[str] = []

    def counted(path: Path, *, rate: int) -> np.ndarray:
        read.append(path.name)
        return read_sound(path, rate=rate)

    monkeypatch.setattr(readers, "read_sound", counted)
    data = MultimodalData(
        spec="fsdd", root=str(tmp_path), held_out="b", batch_size=4, workers=0, inputs=("audio",), vocab_size=300
    )
    loader = data.loader("train")
    lengths = []
    for _ in range(2):
        for _, batch in loader:
            assert batch.audio is not None
            lengths.append(batch.audio.lengths[:, 0])
    assert len(read) == len(set(read))
    assert len(torch.cat(lengths)) > len(read)
    assert 1 < len(loader) <= SORTED_BATCHES
    for earlier, later in pairwise(lengths[: len(loader)]):
        assert earlier.max() < later.min()
    read.clear()
    monkeypatch.setattr(readers, "KEPT_SAMPLES", 1000)
    again = data.dataset("train")
    longest = int(np.argmax(again.seconds()))  # type: ignore[attr-defined]
    first, _, last, _ = (again[index] for index in (0, 0, longest, longest))
    assert len(read) == 3  # what there is no room for is read again
    assert [len(sample.audio[0]) for sample in (first, last)] == [600, max(map(int, torch.cat(lengths)))]  # type: ignore[arg-type]
