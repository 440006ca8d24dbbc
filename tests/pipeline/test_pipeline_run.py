import json
import logging
import stat
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mm import ontology
from mm.dicom.volume import read_volume
from mm.pipeline.case import Case
from mm.pipeline.generate import GenerateReport
from mm.pipeline.run import run_report
from mm.report.json import read_report, to_json
from mm.report.schema import Size


def run(studies, out: Path, **options) -> tuple[int, list[dict]]:
    path = out.parent / "lines.jsonl"
    with path.open("w") as stream:
        code = run_report(studies.root, out, stream=stream, **options)
    return code, [json.loads(line) for line in path.read_text().splitlines()]


def manifest(out: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert len({line["study"] for line in lines}) == len(lines)
    return {line["study"]: line for line in lines}


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in {"manifest.jsonl", "lock"}
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_whole_study(studies, loaded, out):
    studies.beside(studies.ct(1, 1))
    studies.dx(1, 1)
    studies.ct(1, 2, days=100)
    studies.ct(1, 3, days=30)
    code, lines = run(studies, out)
    assert code == 0
    assert lines[-1] == {"event": "end", "done": 3, "failed": 0, "skipped": 0}
    folders = sorted(path.parent for path in out.glob("*/report.json"))
    assert len(folders) == 3
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {"report.json", "report.md", "report.html", "fingerprint"}
        text = (folder / "report.json").read_text()
        assert to_json(read_report(folder)) == text
    report = next(found for found in map(read_report, folders) if any(s.role == "image" for s in found.series))
    assert [(s.role, s.num_slices, s.days_before) for s in report.series] == [
        ("volume", 18, 0), ("prior", 18, 30), ("image", 1, 0),
    ]  # fmt: skip
    assert report.series[0].spacing_mm == (5.0, 8.0, 8.0)
    assert report.series[0].units == "HU"
    assert {row.name: row.count for row in report.inputs} == {
        "volume": 1, "priors": 1, "image": 1, "audio": 2, "record": 1,
    }  # fmt: skip
    nodule, fracture, effusion, infection = report.findings
    assert nodule.slice_index == 9
    assert abs(nodule.center_mm[2] - -55.0) <= 5
    assert 28.0 <= nodule.center_mm[0] <= 60.0
    assert nodule.size == Size(12.346, "mm")
    assert nodule.size_mm == 12.346
    assert nodule.change == "larger"
    assert nodule.sop_instance_uid.startswith("2.25.")
    assert nodule.frame_number is None
    assert fracture.image_pixel is not None
    assert fracture.center_mm is None
    assert infection.present
    assert "record" in infection.sources
    assert effusion.size is None
    assert report.text("en").startswith(
        "A left finding of 12 mm. A right finding of 3 mm. A finding of unmeasured size."
    )
    assert report.text("en").endswith("Impression: nodule, rib fracture and infection.")
    assert report.model.domain == "inside"
    sound = loaded.model.batches[0].audio
    assert sound is not None
    assert sound.lengths.max() == 8000  # resampled from 16 kHz


def test_a_frame_of_a_multi_frame_object_is_cited(studies, loaded, out, monkeypatch):
    def read(series):
        volume = read_volume(series)
        return replace(volume, frame_numbers=tuple(range(1, volume.shape[0] + 1)))

    studies.ct(1, 1)
    monkeypatch.setattr("mm.pipeline.load.read_volume", read)
    assert run(studies, out)[0] == 0
    (folder,) = (path.parent for path in out.glob("*/report.json"))
    nodule = read_report(folder).findings[0]
    assert nodule.frame_number == nodule.slice_index + 1


def test_no_identifier_leaks(studies, loaded, out, caplog):
    caplog.set_level(logging.DEBUG)
    studies.beside(studies.ct(7, 1, accession="ACC-77"))
    studies.ct(7, 2, skip=(5,))
    code, _ = run(studies, out)
    assert code == 1
    shown = caplog.text + (out / "manifest.jsonl").read_text()
    shown += "".join(path.read_text() for path in out.glob("*/report.*"))
    for secret in ("DOE", "PAT-7", "ACC-77", "1.2.826.0.1.3680043", "20240601", "2024-06-01", "p7_1"):
        assert secret not in shown
    private = out / "private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    for name in ("secret", "map.csv"):
        assert stat.S_IMODE((private / name).stat().st_mode) == 0o600
    rows = (private / "map.csv").read_text()
    report = read_report(next(out.glob("*/report.json")).parent)
    for key in (report.study, report.findings[0].sop_instance_uid):
        assert f"{key}," in rows


def words_in(value: object) -> list[str]:
    """Every text in a case, `source` left out."""
    if isinstance(value, str | Path):
        return [str(value)]
    if is_dataclass(value):
        return [word for item in fields(value) if item.name != "source" for word in words_in(getattr(value, item.name))]
    if isinstance(value, dict):
        return [word for pair in value.items() for word in words_in(pair)]
    if isinstance(value, tuple | list | frozenset):
        return [word for item in value for word in words_in(item)]
    return []


def test_true_identifiers_are_in_the_source_alone(studies, loaded, out, monkeypatch):
    studies.beside(studies.ct(7, 1, accession="ACC-77"))
    studies.dx(7, 1)
    studies.ct(7, 2, days=90)
    kept: list[Case] = []
    process = GenerateReport.process

    def spy(self: GenerateReport, cases: Sequence[Case]) -> list[Case]:
        done = process(self, cases)
        kept.extend([*cases, *done])
        return done

    monkeypatch.setattr(GenerateReport, "process", spy)
    assert run(studies, out)[0] == 0
    assert any(case.inputs.image for case in kept)
    words = words_in(kept)
    assert any(word.startswith("2.25.") for word in words)
    for secret in ("DOE", "PAT-7", "ACC-77", "1.2.826.0.1.3680043", "20240601", "p7_1"):
        assert not [word for word in words if secret in word]
        assert secret not in repr(kept)


def test_a_flagged_series_is_told_or_left_out(studies, loaded, out, pipeline, caplog):
    studies.ct(1, 1, intercept=1024)
    studies.dx(1, 1)
    assert run(studies, out)[0] == 0
    (folder,) = (path.parent for path in out.glob("*/report.json"))
    made = read_report(folder)
    codes = [flag.code for flag in made.series[0].quality.flags]
    assert codes == ["not_rescaled", "few_slices", "short_coverage"]
    assert made.series[0].quality.soft_tissue_hu == 1064
    assert made.series[1].quality.flags == ()
    assert "quality: not_rescaled, few_slices, short_coverage" in caplog.text
    for name in ("report.md", "report.html"):
        assert "soft tissue at 1064 HU" in (folder / name).read_text()
    assert "软组织为1064 HU" in (folder / "report.html").read_text()
    strict = pipeline(
        "stages: [{class_path: LoadVolume, init_args: {quality: fail}}, LoadImage, GenerateReport]\n"
        "writers: [JsonWriter, MarkdownWriter]\n"
    )
    assert run(studies, out, pipeline=strict)[0] == 0
    (row, *_) = read_report(folder).inputs
    assert (row.name, row.used, row.reason) == ("volume", False, "low_quality")
    assert "left out by the quality guard" in (folder / "report.md").read_text()
    alone = pipeline(
        "stages: [{class_path: LoadVolume, init_args: {quality: fail}}, GenerateReport]\nwriters: [JsonWriter]\n"
    )
    assert run(studies, out.parent / "strict", pipeline=alone)[0] == 1
    (line,) = manifest(out.parent / "strict").values()
    assert line["reason"] == "low_quality"
    assert "not_rescaled" in line["place"]


def test_what_the_model_has_not_learnt_is_not_assessed(studies, loaded, out):
    never = torch.zeros(len(ontology.FINDINGS))
    never[[item.code for item in ontology.FINDINGS].index("effusion")] = torch.inf
    loaded.model.findings = SimpleNamespace(threshold=never)
    studies.ct(1, 1)
    assert run(studies, out)[0] == 0
    (folder,) = (path.parent for path in out.glob("*/report.json"))
    sources = {item.code: item.sources for item in read_report(folder).findings}
    assert sources["nodule"] == ("volume",)
    assert sources["effusion"] == ()
    text = (folder / "report.md").read_text()
    unassessed = next(line for line in text.splitlines() if line.startswith("Not assessed: "))
    assert "ffusion" in unassessed
    assert "(" not in unassessed
    assert not [line for line in text.splitlines() if line.startswith("Looked for") and "ffusion" in line]


def test_a_study_of_which_nothing_can_be_read_is_not_lost(studies, loaded, out, caplog):
    studies.ct(1, 1)
    for path in studies.ct(2, 1).iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    (studies.root / "notes.txt").write_text("hello " * 100)
    assert run(studies, out)[0] == 1
    assert sorted((line["status"], line["reason"]) for line in manifest(out).values()) == [
        ("done", None),
        ("failed", "truncated"),
    ]
    assert "19 files (not_dicom 1, truncated 18)" in caplog.text


def test_an_empty_folder_is_told_before_the_checkpoint(studies, out):
    studies.root.mkdir()
    with pytest.raises(ValueError, match="nothing to report"):
        run(studies, out, checkpoint="no/such/checkpoint")


def test_failure_stays_with_its_study(studies, loaded, out, caplog):
    studies.ct(1, 1)
    studies.ct(2, 1, skip=(5,))
    studies.ct(3, 1, level=223)  # -777 HU: the model raises on the whole batch
    studies.ct(4, 1, slices=6)
    (studies.ct(5, 1) / "record.json").write_text("{no json")  # a side input costs no report
    code, lines = run(studies, out)
    assert code == 1
    told = sorted((line["status"], line["reason"]) for line in manifest(out).values())
    assert told == [
        ("done", None),
        ("done", None),
        ("failed", "RuntimeError"),
        ("failed", "missing_slice"),
        ("skipped", "no_eligible_series"),
    ]
    assert lines[-1]["failed"] == 2
    assert "quoted" not in caplog.text + (out / "manifest.jsonl").read_text()
    place = next(line["place"] for line in manifest(out).values() if line["reason"] == "missing_slice")
    assert place.startswith("mm/dicom/")
    assert ".py:" in place
    assert len(list(out.glob("*/report.json"))) == 2


def test_a_failure_stands_until_its_files_change(studies, loaded, out, caplog):
    studies.ct(1, 1)
    broken = studies.ct(2, 1, skip=(5,))
    studies.ct(3, 1, level=223)
    assert run(studies, out)[0] == 1
    before, batches = contents(out), len(loaded.model.batches)
    caplog.clear()
    code, lines = run(studies, out)
    assert code == 1
    assert len(loaded.model.batches) == batches  # neither the failed nor its finished batch mates
    assert contents(out) == before
    assert [line["fresh"] for line in lines if line["event"] == "study"] == [False] * 3
    assert lines[-1] == {"event": "end", "done": 1, "failed": 2, "skipped": 0}
    assert "missing_slice" in caplog.text
    for path in broken.iterdir():
        path.unlink()
    studies.ct(2, 1)
    _, lines = run(studies, out)
    assert lines[-1] == {"event": "end", "done": 2, "failed": 1, "skipped": 0}


def told(out: Path) -> dict[str, tuple[bool, str | None]]:
    return {row.name: (row.used, row.reason) for row in read_report(next(out.glob("*/report.json")).parent).inputs}


def test_a_bad_side_input_costs_no_report(studies, loaded, out):
    studies.beside(studies.ct(1, 1))
    folder = studies.dx(1, 1)
    (folder / "sound_left_upper.wav").write_bytes(b"no sound")
    (folder / "record.json").write_text("[]")
    content = (folder / "dx_0.dcm").read_bytes()
    (folder / "dx_0.dcm").write_bytes(content.replace(b"MONOCHROME2", b"MONOCHROMEX"))
    assert run(studies, out)[0] == 0
    assert told(out) == {
        "volume": (True, None),
        "priors": (False, "no_earlier_study"),
        "image": (False, "unsupported_pixels"),
        "audio": (True, "audio_unreadable"),
        "record": (False, "record_layout"),
    }


def test_a_refused_ct_beside_a_good_radiograph(studies, loaded, out):
    studies.ct(1, 1, skip=(5,))
    studies.dx(1, 1)
    assert run(studies, out)[0] == 0
    assert told(out)["volume"] == (False, "missing_slice")
    assert told(out)["image"] == (True, None)


def test_a_truncated_last_slice_fails_the_study(studies, loaded, out):
    folder = studies.ct(1, 1)
    studies.ct(2, 1)
    last = folder / "ct_011.dcm"  # 17 * 7 modulo 18
    last.write_bytes(last.read_bytes()[:-100])
    assert run(studies, out)[0] == 1
    assert sorted(line["reason"] or "" for line in manifest(out).values()) == ["", "broken_slice"]


def test_another_body_part_is_not_eligible(studies, loaded, out):
    studies.ct(1, 1)
    for path in studies.ct(2, 1).iterdir():
        path.write_bytes(path.read_bytes().replace(b"CHEST ", b"PELVIS"))
    run(studies, out)
    assert sorted(line["reason"] or "" for line in manifest(out).values()) == ["", "other_body_part"]


def test_without_orientation_there_is_no_side(studies, loaded, out):
    path = studies.dx(1, 1) / "dx_0.dcm"
    path.write_bytes(path.read_bytes().replace(b"L\\F ", b"    "))
    run(studies, out, pipeline="report_xray")
    report = read_report(next(out.glob("*/report.json")).parent)
    assert report.findings[0].image_pixel is not None
    assert report.findings[0].side == "none"
    assert "right" not in report.text("en").lower()
    path.write_bytes(path.read_bytes().replace(b"PA", b"LL"))
    with pytest.raises(ValueError, match="nothing to report"):
        run(studies, out, pipeline="report_xray")


def test_unused_context_is_told(studies, loaded, tmp_path, out, caplog):
    studies.beside(studies.ct(1, 1))
    row = {"StudyInstanceUID": "1.2.826.0.1.3680043.8.498.1.1", "audio": {"left_upper": "in/p1_1/sound_left_upper.wav"}}
    (tmp_path / "c.jsonl").write_text(json.dumps(row))
    run(studies, out, pipeline="report_ct", context=tmp_path / "c.jsonl")
    assert "audio of 1 row not used" in caplog.text
    assert "1.2.826" not in caplog.text


def test_rerun_skips_and_repeats(studies, loaded, out):
    for patient in range(5):
        studies.ct(patient, 1)
    assert run(studies, out)[0] == 0
    before, batches = contents(out), len(loaded.model.batches)
    code, lines = run(studies, out)
    assert code == 0
    assert len(loaded.model.batches) == batches
    assert [line["fresh"] for line in lines if line["event"] == "study"] == [False] * 5
    assert contents(out) == before
    assert all(line["seconds"] is not None for line in manifest(out).values())
    # A finished report that vanishes is written again with the same bytes, whatever the rest of its batch does.
    victim = next(out.glob("*/report.json")).parent
    for path in victim.iterdir():
        path.unlink()
    victim.rmdir()
    assert run(studies, out)[0] == 0
    assert contents(out) == before


def test_changed_content_is_reported_again(studies, loaded, out):
    folder = studies.ct(1, 1)
    studies.ct(2, 1)
    run(studies, out)
    before = contents(out)
    studies.beside(folder, crp=12.0)
    _, lines = run(studies, out)
    assert sorted(line["fresh"] for line in lines if line["event"] == "study") == [False, True]
    changed = {name.split("/")[0] for name, content in contents(out).items() if before.get(name) != content}
    assert len(changed) == 1


def test_torn_files_of_a_killed_run(studies, loaded, out):
    studies.ct(1, 1)
    studies.ct(2, 1)
    run(studies, out)
    before = contents(out)
    with (out / "manifest.jsonl").open("a") as file:
        file.write('{"study": "0123')
    with (out / "private" / "map.csv").open("a") as file:
        file.write("2.25.99,inst")
    (out / ".work" / "half").mkdir(parents=True)
    assert run(studies, out)[0] == 0
    assert contents(out) == before
    assert len(manifest(out)) == 2
    assert not (out / ".work").exists()


def test_out_of_domain_and_language(studies, loaded, out):
    studies.ct(1, 1, manufacturer="GE MEDICAL SYSTEMS")
    run(studies, out, pipeline="report_ct", language="zh")
    report = read_report(next(out.glob("*/report.json")).parent)
    assert report.model.domain == "outside"
    assert report.languages == ("zh", "en")
    assert next(row for row in report.inputs if row.name == "audio").reason == "not_in_pipeline"
    page = next(out.glob("*/report.html")).read_text()
    assert "outside its domain" in page
    assert '<html lang="zh">' in page


def test_xray_alone(studies, loaded, out):
    studies.dx(1, 1)
    studies.ct(2, 1)
    code, lines = run(studies, out, pipeline="report_xray")
    assert code == 0
    assert lines[-1] == {"event": "end", "done": 1, "failed": 0, "skipped": 1}
    report = read_report(next(out.glob("*/report.json")).parent)
    fracture = report.findings[0]
    # Fitted 64 x 64 from 80 x 60: 1.25 pixels a step, columns centred.
    assert fracture.image_pixel == pytest.approx((125.1, 52.6), abs=0.2)


def test_priors_need_a_patient_id(studies, loaded, out):
    studies.ct(1, 1, patient_id="")
    studies.ct(2, 1, patient_id="", days=50)
    run(studies, out)
    assert all(len(read_report(path.parent).series) == 1 for path in out.glob("*/report.json"))


def test_two_patients_under_one_study(studies, loaded, out):
    studies.ct(1, 1)
    folder = studies.ct(2, 1)
    studies.root.joinpath("other").mkdir()
    for path in list(folder.iterdir())[:4]:
        path.rename(studies.root / "other" / path.name)
    studies.ct(2, 1, patient_id="SOMEONE-ELSE", slices=18)
    code, _ = run(studies, out)
    lines = manifest(out).values()
    assert code == 1
    assert sorted((line["status"], line["reason"]) for line in lines) == [("done", None), ("failed", "two_patients")]


def test_a_sidecar_in_a_shared_folder_is_nobodys(studies, loaded, out):
    folder = studies.ct(1, 1)
    studies.beside(folder)
    for path in studies.ct(2, 1).iterdir():
        path.rename(folder / f"other_{path.name}")
    run(studies, out)
    for path in out.glob("*/report.json"):
        assert {row.name: row.used for row in read_report(path.parent).inputs}["record"] is False


@pytest.mark.parametrize("make", ["missing", "empty", "text", "thin"])
def test_nothing_eligible_writes_nothing(studies, loaded, out, make):
    if make != "missing":
        studies.root.mkdir()
    if make == "text":
        (studies.root / "notes.txt").write_text("hello " * 100)
    if make == "thin":
        studies.ct(1, 1, slices=5)
    with pytest.raises(ValueError, match="is no folder" if make == "missing" else "nothing to report") as error:
        run(studies, out)
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_an_empty_folder_is_told_before_a_wrong_checkpoint(tmp_path, out):
    with pytest.raises(ValueError, match="nothing to report"):
        run_report(tmp_path, out, checkpoint="nowhere")
    assert not out.exists()


def test_no_right_to_write(studies, loaded, tmp_path):
    studies.ct(1, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(studies, tmp_path / "file" / "out")


def test_foreign_secret_is_refused(studies, loaded, out):
    studies.ct(1, 1)
    (out / "private").mkdir(parents=True)
    (out / "private" / "secret").write_text("short")
    with pytest.raises(ValueError, match="64 hex digits"):
        run(studies, out)


def test_one_run_at_a_time(studies, loaded, out):
    from mm.pipeline.ledger import open_ledger

    studies.ct(1, 1)
    run(studies, out)
    with open_ledger(out), pytest.raises(ValueError, match="another mm report"):
        run(studies, out)
    fresh = out.with_name("fresh")
    with open_ledger(fresh), pytest.raises(ValueError, match="another mm report"):
        run(studies, fresh)
    assert not (fresh / "private" / "secret").exists()  # the holder of the lock makes it
