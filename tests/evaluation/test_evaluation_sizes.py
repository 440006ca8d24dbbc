import numpy as np
import pytest

from mm import ontology
from mm.batch import DetectedFinding, FindingTruth, GeneratedReport
from mm.evaluation.reports import Judged
from mm.evaluation.sizes import change_by_sizes, nodule_size_errors, size_error_table

SPACING = (5.0, 2.75, 2.75)
PLACE = (10.0, 60.0, 60.0)
FAR = (40.0, 20.0, 20.0)


def detected(
    code: str, size: float | None, *, voxel: tuple[float, float, float] | None = PLACE, present: bool = True
) -> DetectedFinding:
    return DetectedFinding(code, present, 0.9, "left", voxel, None, size, "unknown")


def test_nodule_sizes_are_compared_where_they_match() -> None:
    true = tuple(
        FindingTruth("nodule", True, "left", (0.0, 0.0, 0.0), None, size, "unknown", ("volume",))
        for size in (10.0, 20.0, 5.0)
    )
    found = (detected("nodule", 13.0), detected("nodule", 18.5, voxel=FAR))
    report = GeneratedReport("en", found, ())
    item = Judged(report, (), None, true, (PLACE, FAR, (0.0, 0.0, 0.0)))
    errors = nodule_size_errors([item], SPACING)
    assert (errors["8-15 mm"].found, errors["8-15 mm"].median, errors["8-15 mm"].bias) == (1, 3.0, 3.0)
    assert errors["15-31 mm"].bias == -1.5
    assert (errors["3-8 mm"].true, errors["3-8 mm"].found) == (1, 0)
    assert np.isnan(errors["3-8 mm"].median)
    assert (errors["all"].true, errors["all"].found) == (3, 2)
    assert errors["all"].mean == pytest.approx(2.25)
    assert "| 8-15 mm | 1 | 1 | 3.0 | 3.0 | +3.0 |" in size_error_table(errors)


@pytest.mark.parametrize(
    ("now", "before", "said"),
    [
        ([detected("effusion", 100.0)], [], "new"),
        ([], [detected("effusion", 100.0)], "resolved"),
        ([detected("effusion", 100.0)], [detected("effusion", 70.0)], "larger"),
        ([detected("effusion", 70.0)], [detected("effusion", 100.0)], "smaller"),
        ([detected("effusion", 100.0)], [detected("effusion", 90.0)], "stable"),
        ([], [], "stable"),
        # The largest instance counts, and only what is seen in the volume.
        ([detected("effusion", 20.0), detected("effusion", 100.0)], [detected("effusion", 95.0)], "stable"),
        ([detected("effusion", 100.0, present=False)], [detected("effusion", 100.0, voxel=None)], "stable"),
    ],
)
def test_change_from_two_sizes(now, before, said) -> None:
    column = ontology.INDEX["effusion"]
    rows = change_by_sizes([now], [before], resolved=True)
    assert ontology.CHANGES[rows[0, column]] == said
    assert set(np.delete(rows[0], column)) == {ontology.CHANGES.index("stable")}
    forced = ontology.CHANGES[change_by_sizes([now], [before], resolved=False)[0, column]]
    assert forced == ("smaller" if said == "resolved" else said)
