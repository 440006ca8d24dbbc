import sys
from pathlib import Path

import pytest

from mm.pipeline.build import build_pipeline
from mm.pipeline.generate import GenerateReport
from mm.pipeline.load import LoadImage, LoadPriors, LoadVolume
from mm.pipeline.stage import Pipeline
from mm.pipeline.write import JsonWriter

WRITERS = "writers: [JsonWriter]\n"


@pytest.mark.parametrize("name", ["report", "report_ct", "report_xray"])
def test_shipped_pipelines(name):
    built = build_pipeline(name)
    assert built.generate in built.pipeline.stages
    assert len(built.pipeline.writers) == 3


def test_short_and_long_names_are_the_same(pipeline):
    stages = "stages: [{}LoadVolume, {}GenerateReport]\n"
    short = build_pipeline(pipeline(stages.format("", "") + WRITERS))
    path = stages.format("mm.pipeline.load.", "mm.pipeline.generate.")
    assert build_pipeline(pipeline(path + WRITERS)).digest == short.digest


def test_digest_tells_options_but_not_where_the_checkpoint_lies(pipeline):
    def digest(volume: str, generate: str) -> str:
        text = f"""stages:
  - {{class_path: LoadVolume, init_args: {{{volume}}}}}
  - {{class_path: GenerateReport, init_args: {{{generate}}}}}
"""
        return build_pipeline(pipeline(text + WRITERS)).digest

    plain = digest("min_slices: 16", "checkpoint: default")
    assert digest("min_slices: 16", "checkpoint: elsewhere/default") == plain
    assert digest("min_slices: 17", "checkpoint: default") != plain
    assert digest("min_slices: 16", "batch_size: 2") != plain


def test_order_is_checked_when_built():
    with pytest.raises(ValueError, match=r"^stage 2 \(GenerateReport\) needs 'volume' or 'image'; no earlier stage"):
        Pipeline((_NoInput(), GenerateReport()), (JsonWriter(),))
    with pytest.raises(ValueError, match=r"^stage 1 \(LoadPriors\) needs 'volume'; no earlier stage provides one$"):
        Pipeline((LoadPriors(), LoadVolume(), GenerateReport()), (JsonWriter(),))
    with pytest.raises(ValueError, match="no stage provides 'report'"):
        Pipeline((LoadImage(),), (JsonWriter(),))
    with pytest.raises(ValueError, match="writers"):
        Pipeline((LoadImage(), GenerateReport()), ())


class _NoInput(LoadImage):
    provides = frozenset()


HEAD = "stages: [{class_path: LoadVolume, init_args: "
BAD = {
    "unknown class": (
        "stages: [LoadVolumes, GenerateReport]",
        "stage 1: unknown class 'LoadVolumes'; accepted: .*LoadVol",
    ),
    "unknown option": (
        "stages: [{class_path: LoadVolume, init_args: {min_slice: 3}}, GenerateReport]",
        r"stage 1 \(LoadVolume\): unknown option 'min_slice'; accepted: modality, min_slices",
    ),
    "wrong type": (HEAD + "{min_slices: many}}, GenerateReport]", "min_slices.*int"),
    "bad value": (HEAD + "{min_slices: 0}}, GenerateReport]", "min_slices must be 1"),
    "denied": ("stages: [os.system, GenerateReport]", "names the class 'os.system'; only classes of mm"),
    "denied inside": ("stages: [mm.pipeline.run.sys, GenerateReport]", "mm.pipeline.run.sys"),
    "order": ("stages: [LoadRecord, GenerateReport]", r"stage 2 \(GenerateReport\) needs 'volume' or 'image'"),
    "unknown key": ("stages: [LoadVolume, GenerateReport]\nstagse: []", "unknown key 'stagse'"),
    "no lists": ("evaluation: 3", "a pipeline has two lists, stages and writers"),
    "no YAML": ("stages: [", "line .*not YAML"),
    "shape": ("stages: [{LoadVolume: {min_slices: 3}}]", "class names, or class_path with init_args"),
    "twice": ("stages: [LoadVolume, GenerateReport, GenerateReport]", "exactly one GenerateReport"),
    "language": (
        "stages: [LoadVolume, {class_path: GenerateReport, init_args: {languages: [fr]}}]", "languages",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_told_in_one_line(pipeline, case):
    text, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        build_pipeline(pipeline(f"{text}\n{WRITERS}"))
    assert "\n" not in str(error.value)


def test_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(ValueError, match="report_xray"):
        build_pipeline("reprot")


def test_a_users_stage_needs_trust(pipeline, tmp_path: Path, monkeypatch):
    (tmp_path / "own_stages.py").write_text(
        "from mm.pipeline.load import LoadVolume\n"
        "class LoadMine(LoadVolume):\n    'Mine.'\n"
        "class NoStage:\n    'No stage.'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = pipeline("stages: [own_stages.LoadMine, GenerateReport]\n" + WRITERS)
    with pytest.raises(ValueError, match="--trust"):
        build_pipeline(path)
    assert "own_stages" not in sys.modules
    built = build_pipeline(path, trust=("own_stages",))
    assert type(built.pipeline.stages[0]).__name__ == "LoadMine"
    with pytest.raises(ValueError, match=r"own_stages\.NoStage"):
        build_pipeline(pipeline("stages: [own_stages.NoStage, GenerateReport]\n" + WRITERS), trust=("own_stages",))
