"""kill -9 at random moments, then the same command again: the same bytes as an undisturbed run."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import FakeLoaded, FakeModel
import mm
from mm.data.tokenizer import train_tokenizer
from mm.pipeline.run import run_report
from mm.training.checkpoint import Card, Identity, Preprocessing

class Slow(FakeModel):
    def write(self, *arguments, **options):
        time.sleep(0.02)
        return super().write(*arguments, **options)

words = train_tokenizer(["cough and fever " * 4], vocab_size=300)
kept = Preprocessing(grid=(16, 32, 32), spacing_mm=(6.0, 8.0, 8.0), image_size=64)
made = FakeLoaded(Slow(), words, kept, Identity("default", "ab" * 32), Card("default"), {})
mm.load = lambda _path="default": made
for line in sys.stdin:  # the heavy imports once, then a process of its own for every run
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as stream:
            os._exit(run_report(Path(sys.argv[2]), Path(line.strip()), stream=stream))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runner:
    """Starts runs one after the other, each a process that can be killed."""

    def __init__(self, script: Path, source: Path) -> None:
        command = [sys.executable, str(script), str(Path(__file__).parent), str(source)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def run(self, out: Path, *, kill_after: float | None = None) -> int:
        """Exit code; negative where the run was killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{out}\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(self.process.stdout.readline())


def reports(out: Path) -> dict[str, bytes]:
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    passing = {"manifest.jsonl", "lock"}
    return {str(path.relative_to(out)): content for path, content in kept.items() if path.name not in passing}


@pytest.mark.slow
def test_killed_at_ten_moments(studies, tmp_path):
    for patient in range(20):
        studies.beside(studies.ct(patient, 1))
    script, whole, killed = tmp_path / "run.py", tmp_path / "whole", tmp_path / "killed"
    script.write_text(SCRIPT)
    runner = Runner(script, studies.root)
    runner.run(tmp_path / "warm")
    began = time.perf_counter()
    assert runner.run(whole) == 0
    span = time.perf_counter() - began
    (killed / "private").mkdir(parents=True)
    shutil.copy(whole / "private" / "secret", killed / "private" / "secret")
    draw = random.Random(0)
    stopped = 0
    for _ in range(10):
        stopped += runner.run(killed, kill_after=draw.uniform(0, span / 2)) == -signal.SIGKILL
        for folder in killed.glob("[0-9a-f]*"):
            assert len(list(folder.iterdir())) == 4  # none partial
    assert stopped >= 5
    assert runner.run(killed) == 0
    runner.process.communicate()
    assert reports(killed) == reports(whole)
    lines = [json.loads(line) for line in (killed / "manifest.jsonl").read_text().splitlines()]
    assert len({line["study"] for line in lines}) == len(lines) == 20
    assert {line["status"] for line in lines} == {"done"}
    assert not (killed / ".work").exists()
