"""What the benchmark reads of a database of outlines, on one made for it."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from mm.dicom.volume import Volume

ROOT = Path(__file__).parents[2] / "benchmarks"
ORIGIN, STEP, PIXEL = (-150.0, -120.0, -300.0), 2.5, 0.7


@pytest.fixture
def lidc(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import lidc_nodules

    return lidc_nodules


def square(z: float, column: int, row: int, half: int) -> tuple[float, str]:
    points = [(column + a, row + b) for a, b in ((-half, -half), (half, -half), (half, half), (-half, half))]
    return z, "\n".join(f"{x},{y}" for x, y in points) + "\n"


def test_outlines_become_nodules_in_patient_millimetres(lidc, tmp_path: Path) -> None:
    file = tmp_path / "made.sqlite"
    made = sqlite3.connect(file)
    made.execute("create table scans (id integer, series_instance_uid text)")
    made.execute("create table annotations (id integer, scan_id integer)")
    made.execute(
        "create table contours (annotation_id integer, inclusion boolean, image_z_position float, coords text)"
    )
    made.execute("insert into scans values (7, '1.2.3')")
    outlines = {
        1: [square(-290.0, 100, 200, 10), square(-287.5, 100, 200, 5)],
        2: [square(-290.0, 102, 200, 8)],
        3: [square(-200.0, 300, 50, 6)],
    }
    for reader, contours in outlines.items():
        made.execute("insert into annotations values (?, 7)", (reader,))
        made.executemany("insert into contours values (?, 1, ?, ?)", [(reader, *item) for item in contours])
    made.execute("insert into contours values (1, 0, -290.0, '0,0\n')")  # a hole is no outline
    made.commit()
    made.close()
    affine = np.array([[0, 0, PIXEL, ORIGIN[0]], [0, PIXEL, 0, ORIGIN[1]], [STEP, 0, 0, ORIGIN[2]], [0, 0, 0, 1.0]])
    volume = Volume(np.zeros((60, 8, 8), np.float32), affine, "HU")
    drawn = lidc.read_annotations(file, "1.2.3", volume)
    first = drawn[0]
    # Columns are x and rows are y.
    assert first.center_mm == pytest.approx((-150 + 70, -120 + 140, -288.75))
    assert first.diameter_mm == pytest.approx(20 * 2**0.5 * PIXEL)
    nodules = lidc.together(drawn)
    assert sorted(len(nodule.readers) for nodule in nodules) == [1, 2]
    (two,) = [nodule for nodule in nodules if len(nodule.readers) == 2]
    assert lidc.inside((-80.0, 20.0, -290.0), two)
    assert not lidc.inside((-80.0, 20.0, -280.0), two)
    with pytest.raises(ValueError, match="has no series"):
        lidc.read_annotations(file, "9", volume)
