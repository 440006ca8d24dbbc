import numpy as np
import pytest

from mm import ontology
from mm.batch import FindingTruth
from mm.evaluation.conspicuous import (
    COLUMNS,
    CUT_OFFS,
    Conspicuous,
    conspicuous_f1,
    counted,
    largest,
    recall_by_grade,
    size_table,
)
from mm.phantom.dataset import labelled, patient_seed
from mm.phantom.patient import draw_patient

K = len(ontology.CODES)
NODULE = ontology.INDEX["nodule"]


def truth(code: str, size: float | None, *, present: bool = True) -> FindingTruth:
    return FindingTruth(code, present, "left", None, None, size, "unknown", ("volume",))


def test_the_cut_offs_are_frozen() -> None:
    assert CUT_OFFS == {
        "nodule": 8, "consolidation": 30, "effusion": 100, "pneumothorax": 5, "cardiomegaly": 0.55, "emphysema": 12,
        "rib_fracture": 3, "calcification": 50,
    }  # fmt: skip
    for code in ("cardiomegaly", "emphysema"):
        assert ontology.grade(code, CUT_OFFS[code]) == "moderate"
        assert ontology.grade(code, np.nextafter(CUT_OFFS[code], 0)) == "small"


def test_a_finding_below_its_cut_off_counts_neither_way() -> None:
    studies = [
        [truth("nodule", 7.9)],
        [truth("nodule", 8.0)],
        [truth("nodule", 4.0), truth("nodule", 20.0)],
        [truth("nodule", 30.0, present=False)],
        [],
    ]
    sizes = largest(studies)
    assert sizes[:3, NODULE].tolist() == [7.9, 8.0, 20.0]
    assert np.isnan(sizes[3:]).all()
    present = ~np.isnan(sizes)
    kept = counted(present, sizes)
    assert kept[:, NODULE].tolist() == [False, True, True, True, True]
    found = present.copy()
    assert conspicuous_f1(found, present, kept) == 1.0
    found[0, NODULE] = False  # the faint one: nothing is lost
    assert conspicuous_f1(found, present, kept) == 1.0
    found[1, NODULE] = False
    assert conspicuous_f1(found, present, kept) == pytest.approx(2 / 3)
    found[4, NODULE] = True
    assert conspicuous_f1(found, present, kept) == pytest.approx(2 / 4)
    others = [k for k in range(K) if k not in COLUMNS]
    assert not kept[:, others].any()


def test_patients_of_the_generator() -> None:
    drawn = [draw_patient(patient_seed(5, index)).findings for index in range(150)]
    studies = [labelled(findings, inputs=("volume", "image"), compared=False) for findings in drawn]
    sizes = largest(studies)
    present = np.array([[any(item.code == code for item in found) for code in ontology.CODES] for found in studies])
    kept = counted(present, sizes)
    for code, least in CUT_OFFS.items():
        k = ontology.INDEX[code]
        # Every finding of the table has patients on both sides of its cut-off: none is for nothing.
        assert (sizes[present[:, k], k] < least).any()
        assert (sizes[present[:, k], k] >= least).any()
        assert kept[~present[:, k], k].all()
    perfect = Conspicuous.of(present, present, kept)
    assert (perfect.conspicuous.value, perfect.all_sizes.value) == (1.0, 1.0)
    only_large = present & (kept | ~np.isin(np.arange(K), COLUMNS))
    missing = Conspicuous.of(only_large, present, kept)
    assert missing.conspicuous.value == 1.0 > missing.all_sizes.value
    page = size_table(only_large, present, sizes)
    assert page.count("**1.00**") == len(CUT_OFFS)
    assert "| nodule | >= 8 mm |" in page


def test_recall_by_grade() -> None:
    sizes = np.array([4.0, 6.0, 10.0, 25.0, np.nan])
    found = np.array([True, False, True, True, True])
    assert recall_by_grade(found, sizes, "nodule") == {"small": (0.5, 2), "moderate": (1.0, 1), "large": (1.0, 1)}
    empty = recall_by_grade(found[4:], sizes[4:], "nodule")
    assert np.isnan(empty["small"][0])
