"""Changed sounds: what each change does, alone; the same draw gives the same sound; nothing asked, nothing changed."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from mm.batch import Sample
from mm.data.datamodule import Drawn, NumberedDataset
from mm.data.sounds import ChangedSounds, SoundChanges, changed

ALL = SoundChanges(speed=0.2, shift=0.05, colour_db=10.0, band_hz=600.0, gap=0.2, noise_db=(5.0, 40.0), longest_s=0.6)


class Tones(Dataset[Sample]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        return Sample(study=str(index), audio=(None, tone(300.0 * (index + 1)), None, None), text="tone")


def tone(hz: float, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(round(8000 * seconds)) / 8000).astype(np.float32)


def hz_of(sound: np.ndarray) -> float:
    """The loudest frequency."""
    power = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), n=1 << 16))
    return float(power.argmax() * 8000 / (1 << 16))


def power(sound: np.ndarray) -> float:
    return float(np.square(sound).mean())


def draws(sound: np.ndarray, number: int = 20, **changes: Any) -> list[np.ndarray]:
    torch.manual_seed(0)
    return [changed(sound, SoundChanges(**changes)) for _ in range(number)]


def test_nothing_asked_nothing_changed() -> None:
    sound = tone(440.0, 0.37)
    np.testing.assert_array_equal(changed(sound, SoundChanges()), sound)


def test_speed_moves_length_and_pitch_alike() -> None:
    sound = tone(500.0)
    found = draws(sound, speed=0.2)
    factors = np.array([len(sound) / len(other) for other in found])
    np.testing.assert_allclose([hz_of(other) / 500 for other in found], factors, rtol=2e-3)
    assert factors.min() >= 1 / 1.2 - 1e-3
    assert factors.max() <= 1.2 + 1e-3
    assert factors.min() < 0.95
    assert factors.max() > 1.05
    for other in found:  # neither louder nor quieter
        assert power(other) == pytest.approx(power(sound), rel=0.02)


def test_what_would_fold_back_is_cut_off() -> None:
    """3.9 kHz played faster lies above half the rate: an alias would be heard at 3 kHz or so."""
    faster = [other for other in draws(tone(3900.0), speed=0.3) if len(other) < 7500]
    assert faster
    assert all(power(other) < 0.01 for other in faster)


def test_shift_keeps_the_middle() -> None:
    sound = np.arange(1.0, 1001.0, dtype=np.float32)
    lengths = []
    for other in draws(sound, shift=0.01):  # 80 samples
        lengths.append(len(other))
        inside = other[other > 0]
        assert inside[0] <= 81
        assert inside[-1] >= 920
        np.testing.assert_array_equal(np.diff(inside), 1.0)
    assert min(lengths) < 1000 < max(lengths)
    assert all(len(other) >= 2 for other in draws(sound[:4], shift=1.0))


def test_colour_is_smooth_and_bounded() -> None:
    rng = np.random.default_rng(0)
    sound = rng.normal(size=4000).astype(np.float32)
    before = np.abs(np.fft.rfft(sound))
    for other in draws(sound, colour_db=6.0):
        gain = 20 * np.log10(np.abs(np.fft.rfft(other)) / before)[1:-1]
        assert np.abs(gain).max() <= 6.01
        assert np.abs(np.diff(gain)).max() < 0.1


def test_an_erased_band_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    sound = rng.normal(size=4000).astype(np.float32)
    before = np.fft.rfft(sound)
    widths = []
    for other in draws(sound, band_hz=800.0):
        after = np.fft.rfft(other)
        gone = np.abs(after) < 1e-3 * np.abs(before)
        np.testing.assert_allclose(after[~gone], before[~gone], atol=1e-2)
        assert np.abs(np.diff(gone.astype(int))).sum() <= 2  # one run
        widths.append(gone.sum() * 2.0)  # Hz
    assert max(widths) <= 804
    assert max(widths) > 400


def test_a_gap_is_one_stretch() -> None:
    sound = np.ones(1000, np.float32)
    lengths = []
    for other in draws(sound, gap=0.3):
        lengths.append(int((other == 0).sum()))
        assert np.abs(np.diff(other)).sum() <= 2
    assert max(lengths) <= 300
    assert max(lengths) > 150


@pytest.mark.parametrize("decibels", [0.0, 20.0])
def test_noise_has_the_asked_power(decibels: float) -> None:
    sound = tone(440.0)
    for other in draws(sound, number=5, noise_db=(decibels, decibels)):
        assert 10 * np.log10(power(sound) / power(other - sound)) == pytest.approx(decibels, abs=0.3)


def test_a_long_sound_loses_its_ends_and_a_short_one_nothing() -> None:
    sound = np.arange(1.0, 1001.0, dtype=np.float32)
    starts = set()
    for other in draws(sound, longest_s=0.05):
        assert len(other) == 400
        np.testing.assert_array_equal(np.diff(other), 1.0)
        starts.add(float(other[0]))
    assert len(starts) > 5
    assert all(len(other) == 1000 for other in draws(sound, longest_s=1.0))


def test_all_at_once_on_the_shortest_sound() -> None:
    for length in (1, 2, 7):
        for other in draws(np.ones(length, np.float32), **asdict(ALL)):
            assert len(other) >= 1
            assert np.isfinite(other).all()


def test_a_draw_is_the_same_whenever_it_is_made() -> None:
    """What exact resume stands on: the seed of the draw says all, not what was drawn before."""
    samples = NumberedDataset(ChangedSounds(Tones(), ALL))

    def heard(study: int, seed: int) -> np.ndarray:
        _, sample = samples[Drawn(study, seed)]
        assert [site is None for site in sample.audio] == [True, False, True, True]
        assert sample.audio[1] is not None
        return sample.audio[1]

    first = heard(1, 7)
    torch.rand(5)
    other = heard(1, 8)
    np.testing.assert_array_equal(heard(1, 7), first)
    assert len(other) != len(first) or not np.array_equal(other, first)
    assert len(samples) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"speed": 1.0}, "sounds.speed must be at least 0 and below 1, got 1.0"),
        ({"gap": -0.1}, "sounds.gap must be at least 0 and below 1, got -0.1"),
        ({"band_hz": -1.0}, "sounds.band_hz must be at least 0, got -1.0"),
        ({"noise_db": (9.0, 3.0)}, r"sounds.noise_db must be the lowest and the highest ratio, got \[9.0, 3.0\]"),
        ({"longest_s": 0.0}, "sounds.longest_s must be above 0, got 0.0"),
    ],
)
def test_bad_settings_name_the_argument(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SoundChanges(**change)
