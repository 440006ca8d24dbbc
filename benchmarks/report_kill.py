"""Kills `mm report` with -9 at random moments, runs it again, and compares with an undisturbed run, byte by byte.

python benchmarks/report_kill.py --studies 20 --kills 10
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PASSING = {"manifest.jsonl", "lock"}
"""Files with seconds or process numbers in them."""


def report(source: Path, out: Path, *, kill_after: float | None = None) -> bool:
    """Runs `mm report`; True where it ended by itself."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mm", "report", str(source), "-o", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        code = process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    if code:
        raise SystemExit(f"mm report ended with {code}")
    return True


def contents(out: Path) -> dict[str, bytes]:
    """Every file that must be the same in both."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in PASSING]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def anew(killed: Path, whole: Path) -> None:
    """Nothing but the secret: the same one gives the same pseudonyms."""
    shutil.rmtree(killed, ignore_errors=True)
    (killed / "private").mkdir(parents=True)
    shutil.copy(whole / "private" / "secret", killed / "private" / "secret")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=20)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = ["phantom", str(root / "phantoms"), "--studies", str(options.studies), "--seed", str(options.seed)]
        subprocess.run([sys.executable, "-m", "mm", *made], check=True, stdout=subprocess.DEVNULL)
        source, whole, killed = root / "phantoms" / "studies", root / "whole", root / "killed"
        began = time.perf_counter()
        report(source, whole)
        span = time.perf_counter() - began
        kills, partial, whole_again = 0, 0, True
        anew(killed, whole)
        while kills < options.kills:
            # Behind the start of Python and torch: the moments that can hurt.
            if report(source, killed, kill_after=draw.uniform(span * 0.1, span * 0.5)):
                whole_again &= contents(killed) == contents(whole)
                anew(killed, whole)
                continue
            kills += 1
            partial += sum(len(list(study.iterdir())) != 4 for study in killed.glob("[0-9a-f]*"))
        report(source, killed)
        lines = [json.loads(line) for line in (killed / "manifest.jsonl").read_text().splitlines()]
        done = [line["study"] for line in lines if line["status"] == "done"]
        print(
            json.dumps(
                {
                    "undisturbed seconds": round(span, 1),
                    "kills": kills,
                    "partial reports seen": partial,
                    "reports": len(done),
                    "none twice": len(set(done)) == len(done),
                    "same bytes": whole_again and contents(killed) == contents(whole),
                }
            )
        )


if __name__ == "__main__":
    main()
