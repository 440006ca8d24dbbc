"""kill -9 at random moments, then the same command again: the same bytes as an undisturbed run."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import FakeLoaded, FakeModel
import mm
from mm.data.tokenizer import train_tokenizer
from mm.pipeline.run import run_report
from mm.training.checkpoint import Card, Identity, Preprocessing

class Slow(FakeModel):
    def generate(self, *arguments, **options):
        time.sleep(0.02)
        return super().generate(*arguments, **options)

words = train_tokenizer(["cough and fever " * 4], vocab_size=300)
kept = Preprocessing(grid=(16, 32, 32), spacing_mm=(6.0, 8.0, 8.0), image_size=64)
made = FakeLoaded(Slow(), words, kept, Identity("default", "ab" * 32), Card("default"), {})
mm.load = lambda _path="default": made
print("ready", flush=True)
sys.exit(run_report(Path(sys.argv[2]), Path(sys.argv[3])))
"""


def start(script: Path, source: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(script), str(Path(__file__).parent), str(source), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def reports(out: Path) -> dict[str, bytes]:
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    passing = {"manifest.jsonl", "lock"}
    return {str(path.relative_to(out)): content for path, content in kept.items() if path.name not in passing}


@pytest.mark.slow
def test_killed_at_ten_moments(studies, tmp_path):
    for patient in range(20):
        studies.beside(studies.ct(patient, 1))
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    whole = tmp_path / "whole"
    began = time.perf_counter()
    assert start(script, studies.root, whole).wait() == 0
    span = time.perf_counter() - began
    draw = random.Random(0)
    killed = tmp_path / "killed"
    (killed / "private").mkdir(parents=True)
    shutil.copy(whole / "private" / "secret", killed / "private" / "secret")
    stopped = 0
    for _ in range(10):
        process = start(script, studies.root, killed)
        time.sleep(draw.uniform(0, span / 4))
        process.kill()
        stopped += process.wait() < 0
        for folder in killed.glob("[0-9a-f]*"):
            assert len(list(folder.iterdir())) == 4  # none partial
    assert stopped >= 5
    assert start(script, studies.root, killed).wait() == 0
    assert reports(killed) == reports(whole)
    lines = [json.loads(line) for line in (killed / "manifest.jsonl").read_text().splitlines()]
    assert len({line["study"] for line in lines}) == len(lines) == 20
    assert {line["status"] for line in lines} == {"done"}
    assert not (killed / ".work").exists()
