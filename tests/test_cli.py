import subprocess
import sys
import time
from pathlib import Path

import pytest

from mm.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    output = capsys.readouterr()
    code = stopped.value.code
    assert isinstance(code, int)
    return code, output.out, output.err


def test_help_answers_under_a_second():
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "mm", "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 1.0
    assert "not a medical device" in " ".join(done.stdout.split())


def test_help_imports_nothing_heavy():
    code = (
        "import sys, mm.cli\ntry: mm.cli.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_mistyped_option_is_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    code, _, err = run(capsys, "report", str(tmp_path), "--ou", str(tmp_path / "out"))
    assert code == 2
    assert "--out" in err


def test_an_unknown_recipe_names_the_known_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    code, _, err = run(capsys, "report", str(tmp_path), "-o", str(tmp_path / "out"), "-c", "nope")
    assert code == 2
    assert "nope" in err
    assert "report_ct" in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_audit_is_asked_of_what_has_one(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    code, _, err = run(capsys, "evaluate", "-c", "eval_vqa", "-o", str(tmp_path / "out"), "--audit")
    assert code == 2
    assert "VqaEvaluation: Option 'audit' is not accepted" in err
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_nothing_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    code, _, err = run(capsys, "report", str(tmp_path), "-o", str(tmp_path / "out"))
    assert code == 2
    assert str(tmp_path) in err
