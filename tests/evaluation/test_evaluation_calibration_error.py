import numpy as np
import pytest
import torch

from mm import ontology
from mm.evaluation.calibration_error import BINS, by_chance, calibration, calibration_error, calibration_table


@pytest.mark.parametrize("seed", range(3))
def test_torchmetrics_says_the_same(seed: int) -> None:
    classification = pytest.importorskip("torchmetrics.functional.classification")
    rng = np.random.default_rng(seed)
    probability = rng.beta(0.5, 1.5, 400)
    truth = rng.random(400) < probability**2
    theirs = classification.binary_calibration_error(
        torch.from_numpy(probability), torch.from_numpy(truth).long(), n_bins=BINS, norm="l1"
    )
    assert calibration_error(probability, truth) == pytest.approx(float(theirs), abs=1e-6)


def test_by_hand() -> None:
    always = np.ones(10)
    assert calibration_error(always, always.astype(bool)) == 0.0
    assert calibration_error(always, np.zeros(10, dtype=bool)) == 1.0
    half = np.full(8, 0.5)
    assert calibration_error(half, np.arange(8) < 2) == pytest.approx(0.25)


def test_exact_probabilities_have_an_error_by_chance_alone() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.random(100), rng.random(50_000)
    assert by_chance(many) < 0.01 < 0.05 < by_chance(few)
    seen = [calibration_error(few, rng.random(100) < few) for _ in range(300)]
    assert by_chance(few) == pytest.approx(np.mean(seen), abs=0.01)


def test_overconfidence_shows() -> None:
    rng = np.random.default_rng(1)
    probability = rng.random((300, len(ontology.CODES)))
    truth = rng.random(probability.shape) < probability
    found = calibration(probability, truth)
    assert found.pooled.value < 0.04
    assert set(found.findings) == set(ontology.CODES)
    assert found.mean == pytest.approx(np.mean([error for error, _ in found.findings.values()]))
    sure = calibration(np.where(probability > 0.5, 0.99, 0.01), truth)
    assert sure.pooled.value > 0.15 > sure.pooled_chance
    assert "all findings pooled" in calibration_table(found)
