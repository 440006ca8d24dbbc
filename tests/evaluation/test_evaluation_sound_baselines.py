"""The nearest sound by its mean spectrum: what it hears and what it can't."""

import numpy as np
from scipy.spatial.distance import cdist

from mm.batch import Sample
from mm.evaluation.sound_baselines import BINS, mean_log_mels, nearest


def sounding(values: np.ndarray) -> Sample:
    return Sample(study="", audio=(None, values.astype(np.float32), None, None))


def tone(hz: float, length: int = 4000) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(length) / 8000)


def test_pitch_is_heard_and_neither_loudness_nor_order() -> None:
    one, two = tone(300.0), tone(2000.0)
    found = mean_log_mels([sounding(item) for item in (one, 0.1 * one, two, np.r_[one, two], np.r_[two, one])])
    assert found.shape == (5, BINS)
    np.testing.assert_allclose(found[0], found[1], atol=0.05)
    assert found[0].argmax() < found[2].argmax()
    np.testing.assert_allclose(found[3], found[4], atol=0.5)
    assert np.abs(found[0] - found[2]).max() > 5


def test_silence_and_a_click_stay_finite() -> None:
    assert np.isfinite(mean_log_mels([sounding(np.zeros(500)), sounding(np.ones(1))])).all()


def test_nearest_is_nearest() -> None:
    rng = np.random.default_rng(0)
    known, asked, labels = rng.normal(size=(30, 5)), rng.normal(size=(40, 5)), rng.integers(0, 4, 30).tolist()
    expected = np.array(labels)[cdist(asked, known).argmin(1)]
    np.testing.assert_array_equal(nearest(known, labels, asked), expected)
