"""The evaluations on small tables on disk, with a tiny, untrained model, and on a few rows of real data."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
import yaml

import mm
from mm.batch import SPECIAL_IDS
from mm.data.collate import collate
from mm.data.readers import open_split
from mm.data.spec import load_spec
from mm.evaluation.evaluate import run_evaluation
from mm.evaluation.vqa_listed import AnswerList

COLOURS = ("red", "green", "blue", "grey")
SPLITS = ("train", "train", "train", "val", "test", "test")
SPEC = "kind: jsonl\nname: {name}\nroot: {root}\nindex: {name}.jsonl\nsplit: {{column: split}}\n"
real = pytest.mark.skipif("MM_DATA" not in os.environ, reason="needs MM_DATA")


def spec(folder: Path, name: str, rows: list[dict[str, Any]], keys: str) -> Path:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{name}.yaml"
    path.write_text(SPEC.format(name=name, root=folder) + keys)
    return path


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """24 pictures with two captions, one report, a question each, and 24 sounds of four kinds."""
    folder = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(0)
    captions, reports, questions, sounds = [], [], [], []
    for number in range(24):
        split, colour = SPLITS[number % 6], COLOURS[number // 6]
        PIL.Image.fromarray(rng.integers(0, 256, (40, 60), dtype=np.uint8)).save(folder / f"{number}.png")
        soundfile.write(folder / f"{number}.wav", rng.normal(size=2000) / 9, 8000)
        given = {"image": f"{number}.png", "split": split}
        captions.append({**given, "captions": [f"A {colour} thing.", f"Thing {number}."]})
        effusion = "Left pleural effusion." if number % 4 == 0 else "No pleural effusion."
        reports.append({**given, "report": f"{effusion} Heart size is normal. Study {colour}."})
        asked = {"question": f"Is it {colour}?", "answer": "Yes" if number % 2 else "no", "kind": "CLOSED"}
        questions += [{**given, **asked}, {**given, "question": "Which colour?", "answer": colour, "kind": "OPEN"}]
        sounds.append({"sound": f"{number}.wav", "split": split, "label": colour, "who": "ab"[number % 2]})
    image = "image: {column: image}\n"
    return {
        "captions": spec(folder, "captions", captions, image + "target: {column: captions}\n"),
        "reports": spec(folder, "reports", reports, image + "target: {column: report}\n"),
        "questions": spec(folder, "questions", questions, image + "target: {column: answer}\n"
                          "prompt: {column: question}\nclosed: {column: kind, equals: CLOSED}\n"),
        "sounds": spec(folder, "sounds", sounds, "target: {column: label}\ngroup: {column: who}\n"
                       "audio: {column: sound, rate: 8000}\n"),
    }  # fmt: skip


def evaluate(name: str, out: Path, *options: str, **more: Any) -> dict[str, Any]:
    page = run_evaluation(name, out, overrides=options, **more)
    assert page == (out / "results.md").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert "sha256 of their ids" in content["facts"]["split"]
    assert (out / "results.png").is_file()
    return content


def test_images_and_several_captions(tables: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = f"checkpoint={tiny_checkpoint}", f"spec={tables['captions']}", "source=image", "audit=true"
    found = evaluate("eval_retrieval", tmp_path, *options)
    scores, items = found["scores"], found["items"]
    assert found["facts"]["distinct texts"] == "12 of 16"
    assert {"image -> text", "text -> image", "image -> text, strict", "control: shuffled pairs"} <= set(scores)
    strict, loose = scores["image -> text, strict"], scores["image -> text"]
    assert strict["chance_at_10"] == pytest.approx(1 - (6 * 5) / (16 * 15))  # two captions of sixteen
    assert loose["recall_at_1"] >= strict["recall_at_1"]
    assert all(0 <= item["right"]["value"] <= 1 for item in scores["audit"].values())
    assert items["ids"] == [f"captions-{row}" for row in (4, 5, 10, 11, 16, 17, 22, 23)]
    assert np.mean(items["scores"]["image -> text, R@1"]) == pytest.approx(strict["recall_at_1"])
    assert np.mean(items["scores"]["text -> image, R@5"]) == pytest.approx(
        scores["text -> image, strict"]["recall_at_5"]
    )
    again = evaluate("eval_retrieval", tmp_path / "again", *options, against=tmp_path / "results.json")
    compared = again["scores"]["against"]
    assert compared["image -> text, R@1"]["p"] == 1.0
    assert compared["image -> text, R@1"]["ours"] == compared["image -> text, R@1"]["theirs"]
    other = tmp_path / "val"
    with pytest.raises(ValueError, match=r"other items \(8 of them, here 4\)"):
        evaluate("eval_retrieval", other, *options, "split=val", against=tmp_path / "results.json")
    assert (other / "results.json").is_file()  # the work isn't lost


def test_sounds_told_apart_by_prompt(tables: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = f"checkpoint={tiny_checkpoint}", f"spec={tables['sounds']}"
    found = evaluate("eval_digits", tmp_path, *options, 'templates=["a {label} noise", "the noise is {label}"]')
    scores = found["scores"]
    counts = np.array(scores["confusion"])
    assert scores["classes"] == sorted(COLOURS)
    assert counts.sum(1).tolist() == [2, 2, 2, 2]
    assert scores["accuracy"]["ours"]["value"] == np.trace(counts) / 8
    assert scores["accuracy"]["baseline: constant, always blue"]["value"] == 0.25
    assert set(scores["by_group"]) == {"a", "b"}
    assert scores["supervised"] is False
    assert "zero-shot by prompt" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "confusion.png").is_file()
    assert sum(found["items"]["scores"]["accuracy"]) == np.trace(counts)
    assert "baseline: nearest training sound by mean log-mel" in scores["accuracy"]


def test_labels_that_were_trained_on_are_called_so(
    tables: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = mm.load(tiny_checkpoint)
    loaded.card.__dict__["stages"] = ({"task": "AlignTask", "data": {"name": "sounds"}},)
    monkeypatch.setattr(mm, "load", lambda path: loaded)
    found = evaluate("eval_digits", tmp_path, f"checkpoint={tiny_checkpoint}", f"spec={tables['sounds']}")
    assert found["scores"]["supervised"] is True
    assert "supervised by prompt" in (tmp_path / "results.md").read_text().splitlines()[0]


def test_who_is_held_out_must_have_been_so_in_training(
    tables: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = mm.load(tiny_checkpoint)
    monkeypatch.setattr(mm, "load", lambda path: loaded)
    options = f"checkpoint={tiny_checkpoint}", f"spec={tables['sounds']}"
    for trained, asked in ((None, "held_out=a"), ("b", "held_out=a"), ("a", "held_out=null")):
        loaded.card.__dict__["stages"] = ({"task": "AlignTask", "data": {"name": "sounds", "held_out": trained}},)
        with pytest.raises(ValueError, match=rf"held out of sounds \({trained or 'nothing'}\), .*; got"):
            evaluate("eval_digits", tmp_path, *options, asked)
    assert not tmp_path.joinpath("results.json").exists()
    loaded.card.__dict__["stages"] = ({"task": "AlignTask", "data": {"name": "sounds", "held_out": "a"}},)
    found = evaluate("eval_digits", tmp_path, *options, "held_out=a")
    assert list(found["scores"]["by_group"]) == ["a"]
    assert found["facts"]["held out"] == "who a"
    assert len(found["items"]["ids"]) == 12


@pytest.mark.parametrize("answers", ["written", "listed"])
def test_questions_on_a_table(tables: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, answers: str) -> None:
    found = evaluate(
        "eval_vqa", tmp_path, f"checkpoint={tiny_checkpoint}", f"spec={tables['questions']}", f"answers={answers}"
    )
    scores = found["scores"]
    assert {"ours", "baseline: question only", "baseline: image only"} <= set(scores)
    assert found["facts"]["questions"] == "16 on 16 test studies, 8 of them closed"
    assert len(found["items"]["ids"]) == 16
    assert np.mean(found["items"]["scores"]["exact"]) == pytest.approx(scores["ours"]["overall"]["value"])
    if answers == "listed":
        assert "1.000 of the questions" in found["facts"]["answers on the list"]
        assert "of 6 training answers" in found["facts"]["answers"]


def test_the_listed_answer_is_the_most_probable_one(tables: dict[str, Path], tiny_checkpoint: Path) -> None:
    loaded = mm.load(tiny_checkpoint)
    samples = open_split(load_spec(tables["questions"]), "test", studies=6)
    some = [samples[index] for index in range(6)]
    listed = AnswerList.of([question for sample in some for question in sample.questions])
    batch = collate(some, loaded.tokenizer, rows=("questions",))
    assert batch.writing is not None
    with torch.no_grad():
        scores = loaded.model.score(batch, [[*loaded.tokenizer.encode(t), SPECIAL_IDS.end] for t in listed.spellings])
        output = loaded.model(batch).writing  # the true answers, read at once
    said = output.logits.log_softmax(-1).gather(1, output.targets[:, None])[:, 0]
    forced = torch.zeros(6).index_add(0, output.rows, said)
    places = [listed.spellings.index(sample.questions[0].answer) for sample in some]
    assert torch.allclose(scores[torch.arange(6), places], forced, atol=1e-5)
    asked = [question for sample in some for question in sample.questions]
    best = [listed.answers[listed.means[row.argmax()]] for row in scores]
    assert listed.choose(loaded, batch, asked) == best


def test_reports_of_a_table_and_of_a_file(tables: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = f"spec={tables['reports']}", "labeler=xray"
    bare = evaluate("eval_texts", tmp_path / "bare", *options)
    assert bare["facts"]["checkpoint"] == "none"
    free = bare["scores"]["findings"]["baseline: most frequent training text"]
    assert free["support"]["pleural_effusion"] == 2
    rows = [json.loads(line) for line in (tables["reports"].parent / "reports.jsonl").read_text().splitlines()]
    said = [{"study": f"reports-{n}", "text": row["report"]} for n, row in enumerate(rows) if row["split"] == "test"]
    file = tmp_path / "ours.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in reversed(said)))
    more = f"texts={file}", f"checkpoint={tiny_checkpoint}", "audit=true"
    found = evaluate("eval_texts", tmp_path / "ours", *options, *more)
    text, findings = found["scores"]["text"], found["scores"]["findings"]
    assert text["ours"]["bleu"][3]["value"] == pytest.approx(1)
    assert findings["ours"]["macro"]["value"] == findings["ours"]["micro"]["value"] == 1
    assert "baseline: text of the nearest training image" in text
    audits = found["scores"]["audit"]
    assert audits == found["scores"]["audit_of_references"]  # ours are the references
    assert audits["negate"]["finding F1"]["noticed"]
    assert not set(audits) & set(bare["scores"])
    file.write_text(json.dumps(said[0]) + "\n")
    with pytest.raises(ValueError, match=r"lacks 7 of 8 studies, such as reports-5"):
        evaluate("eval_texts", tmp_path / "few", *options, f"texts={file}")
    assert not (tmp_path / "few").exists()


@pytest.fixture(scope="module")
def deaf(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of volumes, without any other encoder."""
    from mm.training.checkpoint import Card, build, save

    loaded = mm.load(tiny_checkpoint)
    config = yaml.safe_load(yaml.safe_dump(loaded.config))
    config["init_args"] = {key: config["init_args"][key] for key in ("fusion", "volume")}
    folder = tmp_path_factory.mktemp("deaf") / "deaf"
    save(build(config), folder, config=config, tokenizer=loaded.tokenizer, card=Card("deaf"))
    return folder


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("eval_retrieval", ["spec={captions}"], r"data spec captions has \(image\); got 'volume'"),
        ("eval_retrieval", ["spec={captions}", "source=audio"], r"data spec captions has \(image\); got 'audio'"),
        ("eval_retrieval", ["spec={captions}", "source=image", "split=dev"], "split"),
        ("eval_retrieval", ["spec={captions}", "source=image", "seed=1"], "seed is of procedural patients"),
        ("eval_retrieval", ["spec={questions}", "source=image"], "questions has questions and answers, and no texts"),
        ("eval_retrieval", ["spec={captions}", "source=image", "checkpoint={deaf}"], r"encoder for \(volume\)"),
        ("eval_retrieval", ["checkpoint={deaf}"], "has no text encoder"),
        ("eval_digits", ["spec={captions}", "source=image"], "must be one of 2 to 1000 labels"),
        ("eval_digits", ["spec={sounds}", "source=image"], r"sounds has \(audio\); got 'image'"),
        ("eval_digits", ["spec={sounds}", "templates=[a noise]"], r"templates must each have \{label\} once"),
        ("eval_digits", ["spec=phantom"], "no labels to classify"),
        ("eval_vqa", ["spec={captions}"], "captions has no questions"),
        ("eval_vqa", ["spec={questions}", "answers=spoken"], "answers"),
        ("eval_vqa", ["answer_limit=5"], "answers: listed"),
        ("eval_vqa", ["checkpoint={deaf}"], "has no decoder"),
        ("eval_texts", ["spec={captions}"], "several captions an image"),
        ("eval_texts", ["spec=phantom"], "eval_report scores its reports"),
        ("eval_texts", ["spec={reports}", "labeler=mri"], "labeler"),
        ("eval_texts", ["spec={reports}", "texts=nowhere.jsonl"], "'nowhere.jsonl' can't be read"),
        ("eval_texts", ["spec={reports}", "checkpoint={deaf}"], "no image encoder"),
        ("eval_texts", ["spec={sounds}", "checkpoint=default"], "data spec sounds has none; leave it out"),
    ],
)
def test_what_cannot_be_is_told_before_there_is_a_folder(
    name: str, options: list[str], message: str, tables: dict[str, Path], tiny_checkpoint: Path, deaf: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MM_DATA", str(tmp_path))
    for folder in ("audio/fsdd", "iu_xray_reports"):
        (tmp_path / folder).mkdir(parents=True)
    given = [option.format(**tables, deaf=deaf, label="{label}") for option in options]
    if name != "eval_texts" and not any(option.startswith("checkpoint=") for option in given):
        given.append(f"checkpoint={tiny_checkpoint}")
    with pytest.raises(ValueError, match=message):
        run_evaluation(name, tmp_path / "out", overrides=given)
    assert not (tmp_path / "out").exists()


def test_a_broken_first_file_is_told_before_there_is_a_folder(
    tables: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rows = [{"image": "none.png", "captions": ["a"], "split": "test"}] * 2
    path = spec(tmp_path, "broken", rows, "image: {column: image}\ntarget: {column: captions}\n")
    with pytest.raises(ValueError, match=r"broken: missing below .*: 'none\.png' \(row 1\); put"):
        run_evaluation(
            "eval_retrieval",
            tmp_path / "out",
            overrides=[f"checkpoint={tiny_checkpoint}", f"spec={path}", "source=image"],
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", ["no json", "[]", '{"facts": {}}', '{"facts": {}, "items": {"ids": [1], "scores": {"a": [1, 2]}}}']
)
def test_a_run_that_cannot_be_compared_with(content: str, tables: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"against: 'results\.json'"):
        run_evaluation("eval_texts", tmp_path / "out", overrides=[f"spec={tables['reports']}"], against=file)
    assert not (tmp_path / "out").exists()


@real
def test_a_constant_report_of_iu_xray_already_scores(tmp_path: Path) -> None:
    found = evaluate("eval_texts", tmp_path, "studies=60")["scores"]
    constant = found["text"]["baseline: constant, the training text likest to all"]
    assert 0.05 < constant["bleu"][3]["value"] < 0.25
    assert constant["collapse"]["distinct"] < 0.05
    assert found["findings"]["baseline: constant, the training text likest to all"]["micro"]["value"] == 0


@real
@pytest.mark.parametrize("name", ["flickr8k", "medpix2"])
def test_real_images_and_texts(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    grey = tmp_path / f"{name}.yaml"  # the tiny encoder sees no colours
    grey.write_text(mm.shipped(name).read_text(encoding="utf-8").replace(", colour: true", ""), encoding="utf-8")
    options = f"checkpoint={tiny_checkpoint}", f"spec={grey}", "source=image", "studies=12"
    found = evaluate("eval_retrieval", tmp_path, *options)
    number = 60 if name == "flickr8k" else 12
    assert found["facts"]["distinct texts"].split(" of ")[-1] in (str(number), found["facts"]["distinct texts"])
    assert found["scores"]["image -> text, strict"]["chance_at_10"] == pytest.approx(
        1 - np.prod([(number - number // 12 - k) / (number - k) for k in range(10)])
    )
