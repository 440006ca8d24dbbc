import warnings

import numpy as np
import pytest

from mm.evaluation.chest_labels import KINDS
from mm.evaluation.chest_scores import NO_FINDING, Labelled, chest_scores, chest_tables

REPORTS = [
    "No focal consolidation. Heart size normal.",
    "Left pleural effusion. No pneumothorax.",
    "Possible pneumonia.",
    "Pneumothorax on the right. Left pleural effusion.",
]


def test_reports_are_read_into_columns():
    found = Labelled.of(REPORTS, "xray")
    names = (*KINDS["xray"], NO_FINDING)
    said = [{names[k] for k in row.nonzero()[0]} for row in found.positive]
    assert said == [{NO_FINDING}, {"pleural_effusion"}, set(), {"pneumothorax", "pleural_effusion"}]
    assert {names[k] for k in found.doubted[2].nonzero()[0]} == {"pneumonia"}


@pytest.mark.parametrize("kind", ["xray", "ct"])
def test_f1_is_scikit_learns(kind):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    columns = len(KINDS[kind]) + 1
    ours, theirs = (
        Labelled(positive, positive | (rng.random((60, columns)) < 0.1))
        for positive in (rng.random((2, 60, columns)) < 0.2)
    )
    theirs.positive[:, 3] = False  # a finding that no reference has doesn't count in the macro mean
    scores = chest_scores(ours, theirs, kind, rounds=20)
    kept = theirs.positive.any(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = metrics.f1_score(theirs.positive, ours.positive, average=None, zero_division=0)
        micro = metrics.f1_score(theirs.positive[:, :-1], ours.positive[:, :-1], average="micro")
        doubted = metrics.f1_score(theirs.doubted[:, :-1], ours.doubted[:, :-1], average="micro")
    assert scores.macro.value == pytest.approx(each[:-1][kept[:-1]].mean())
    assert scores.macro_no_finding.value == pytest.approx(each[kept].mean())
    assert scores.micro.value == pytest.approx(micro)
    assert scores.micro_doubted.value == pytest.approx(doubted)
    assert np.isnan(list(scores.each.values())[3])
    assert list(scores.support.values()) == theirs.positive.sum(0).tolist()


def test_a_report_against_itself_is_perfect():
    known = Labelled.of(REPORTS, "xray")
    scores = chest_scores(known, known, "xray", rounds=20)
    assert scores.macro.value == scores.micro.value == scores.macro_doubted.value == 1
    overall, each = chest_tables({"ours": scores}, "xray").items()
    assert "13 findings, 2 of which" in overall[0]
    assert "| pneumonia | 0 | - |" in each[1]
