"""Sounds of any make, in bounded memory."""

import numpy as np
import pytest
import soundfile

from mm.pipeline.attached import read_sound
from mm.pipeline.case import InputError


def write(path, samples, rate):
    soundfile.write(path, samples.astype(np.float32), rate, subtype="FLOAT")
    return path


@pytest.mark.parametrize("rate", [4000, 44101, 47999, 191999])
def test_odd_rates_keep_pitch_and_length(tmp_path, rate):
    tone = np.sin(2 * np.pi * 200 * np.arange(2 * rate) / rate) / 2
    sound = read_sound(write(tmp_path / "s.wav", tone, rate), rate=8000, max_seconds=30.0)
    assert len(sound) == pytest.approx(16000, rel=1e-3)
    spectrum = np.abs(np.fft.rfft(sound))
    assert np.argmax(spectrum) * 8000 / len(sound) == pytest.approx(200, abs=1)


@pytest.mark.parametrize("rate", [3999, 192001])
def test_rates_out_of_bounds_are_refused(tmp_path, rate):
    with pytest.raises(InputError, match="audio_rate"):
        read_sound(write(tmp_path / "s.wav", np.zeros(100), rate), rate=8000, max_seconds=30.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, value):
    with pytest.raises(InputError, match="audio_not_finite"):
        read_sound(write(tmp_path / "s.wav", np.array([0.0, value]), 8000), rate=8000, max_seconds=30.0)


def test_stereo_is_averaged(tmp_path):
    both = np.stack([np.full(80, 0.5), np.full(80, -0.25)], axis=1)
    assert np.allclose(read_sound(write(tmp_path / "s.wav", both, 8000), rate=8000, max_seconds=30.0), 0.125)
