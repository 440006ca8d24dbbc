import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing import SYNTAXES, try_numbers
from hostile import CASES
from raw import EXPLICIT, FRAMES, of_syntax, try_folder

from mm.dicom.errors import REASONS

INPUTS = 2000
SECONDS, MIB = 1.0, 256
LENT = ("missing_decoder",)
"""Where a decoder isn't installed, what is wrong with a codestream isn't looked at."""

MEASURE = """
import json, resource, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from raw import try_folder, of_syntax, EXPLICIT, FRAMES

def peak():
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024

root = Path(sys.argv[2])
for folder in sorted(path for path in root.iterdir() if path.name.startswith("good")):
    try_folder(folder)
base = peak()
for folder in sorted(path for path in root.iterdir() if not path.name.startswith("good")):
    start, busy = time.perf_counter(), time.process_time()
    told = sorted(set(try_folder(folder)))
    seconds = min(time.perf_counter() - start, 2 * (time.process_time() - busy) + 0.5)
    print(json.dumps({"name": folder.name, "told": told, "seconds": seconds, "mib": peak() - base}), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What becomes of each case, all in one process of its own: what one takes up, or breaks, shows with the next."""
    root = tmp_path_factory.mktemp("hostile")
    for number, syntax in enumerate((EXPLICIT, *FRAMES)):  # decoders are loaded before memory is counted
        (root / f"good{number}").mkdir()
        for index in (1, 2):
            (root / f"good{number}" / str(index)).write_bytes(of_syntax(syntax, index).bytes())
    names = {}
    for number, (name, case) in enumerate(CASES.items()):
        folder = root / f"{number:03d}"
        folder.mkdir()
        case.make(folder)
        names[folder.name] = name
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(Path(__file__).parent), str(root)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (names.get(f"{len(lines):03d}"), done.stderr[-2000:])
    return {names[line["name"]]: line for line in lines}


def test_there_are_enough():
    assert len(CASES) >= 140


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_by_name_in_bounded_time_and_memory(outcomes, name):
    told, wanted = set(outcomes[name]["told"]), CASES[name].reasons
    assert told <= REASONS.keys() | {"read"}
    assert not wanted or told & {*wanted, *LENT}, told
    assert outcomes[name]["seconds"] < SECONDS
    assert outcomes[name]["mib"] < MIB


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_the_files_that_hostile_ones_are_made_of_are_good(tmp_path, syntax):
    for index in (1, 2, 3):
        (tmp_path / str(index)).write_bytes(of_syntax(syntax, index).bytes())
    assert try_folder(tmp_path) in (["read"], *([name] for name in LENT), ["missing_decoder"] * 4)


def test_the_damaged_files(real):
    if not (real / "damaged").is_dir():
        pytest.skip("the damaged files aren't there")
    told = try_folder(real / "damaged")
    assert {"expansion", "invalid_uid", "too_many_pixels", "truncated", "not_dicom"} <= set(told)


@pytest.mark.slow
def test_random_changes_end_in_reasons():
    tally = try_numbers(range(INPUTS))
    assert tally.uncaught == []
    assert tally.slow == []
    assert tally.leaks == []
    assert len(tally.reasons) > 12
    assert tally.reasons["read"] > INPUTS / 200


def test_nothing_is_written_beside_the_files(tmp_path):
    made = of_syntax(EXPLICIT).but({0x0020000D: ("UI", b"../../x")})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(made.bytes())
    try_folder(tmp_path / "in")
    assert [Path(root, name) for root, _, files in os.walk(tmp_path) for name in files] == [tmp_path / "in" / "a"]
