from dataclasses import replace

import numpy as np
import pytest

from mm.ontology import SOUND_RATE, SOUND_SITES
from mm.phantom import sound
from mm.phantom.patient import SiteSound, draw_patient


@pytest.fixture(scope="module")
def patient():
    return draw_patient(3)


def quiet(site="left_upper"):
    return SiteSound(site, None, 400.0, None, 6, "none", 0.0)


def site_spectrum(item, seed=0):
    rng = np.random.default_rng(seed)
    return spectrum(sound._render_site(rng, item, breaths=15.0, beats=70.0))


def spectrum(signal):
    return np.abs(np.fft.rfft(signal)) ** 2, np.fft.rfftfreq(len(signal), 1 / SOUND_RATE)


def test_four_sites_four_seconds_within_range_and_the_same_again(patient):
    rendered = sound.render_sounds(patient)
    assert tuple(rendered) == SOUND_SITES
    again = sound.render_sounds(patient)
    for site, signal in rendered.items():
        assert signal.dtype == np.float32
        assert signal.shape == (4 * SOUND_RATE,)
        assert np.abs(signal).max() <= 0.96
        assert signal.std() > 1e-3
        np.testing.assert_array_equal(signal, again[site])
        steps = signal * sound.PCM_STEPS
        np.testing.assert_array_equal(steps, np.rint(steps))


def test_breath_lies_between_100_and_1000_hz_and_is_not_tonal():
    power, frequency = spectrum(sound.noise(np.random.default_rng(0)))
    inside = (frequency > 80) & (frequency < 1000)
    assert power[inside].sum() / power.sum() > 0.9
    assert power.max() / power.sum() < 0.01


@pytest.mark.parametrize("pitch", [180.0, 400.0, 750.0])
def test_wheeze_is_a_tone_at_its_pitch_longer_than_100_ms(pitch):
    _, expiration = sound.respiration(15.0, 0.0)
    tone = sound.wheeze(np.random.default_rng(1), expiration, frequency_hz=pitch)
    power, frequency = spectrum(tone)
    peak = frequency[power.argmax()]
    assert abs(peak / pitch - 1) < 0.15
    near = np.abs(frequency / pitch - 1) < 0.2
    assert power[near].sum() / power.sum() > 0.75
    on = np.abs(tone) > 0.05
    assert on.sum() / SOUND_RATE > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_wheeze_stands_out_of_the_breath_by_its_level(seed):
    breath, frequency = site_spectrum(quiet(), seed)
    loud, _ = site_spectrum(replace(quiet(), wheeze_db=20.0), seed)
    near = np.abs(frequency - 400) < 60
    assert loud[near].sum() / loud.sum() > 3 * breath[near].sum() / breath.sum()


def test_crackles_are_sudden_and_short():
    inspiration, _ = sound.respiration(15.0, 0.0)
    clicks = sound.crackles(np.random.default_rng(2), inspiration, number=6)
    on = np.flatnonzero(np.abs(clicks) > 0.02)
    starts = np.flatnonzero(np.diff(on, prepend=-1000) > 0.004 * SOUND_RATE)
    assert 1 <= len(starts) <= 12
    assert len(on) / SOUND_RATE < 6 * 0.016
    kurtosis = np.mean(clicks**4) / np.mean(clicks**2) ** 2
    assert kurtosis > 20


@pytest.mark.parametrize("mimic", ["speech", "hum", "rub"])
def test_mimics_are_audible_and_have_unit_level(mimic):
    signal = getattr(sound, mimic)(np.random.default_rng(3))
    on = signal[np.abs(signal) > 0.02]
    assert 0.5 < np.sqrt(np.mean(on**2)) < 2.0
    assert on.size / SOUND_RATE > 0.05


def test_a_hum_is_steady_and_a_wheeze_is_not():
    _, expiration = sound.respiration(15.0, 0.0)
    rng = np.random.default_rng(4)

    def level(signal):
        return signal.reshape(16, -1).std(axis=1)

    assert level(sound.hum(rng)).min() > 0.5 * level(sound.hum(rng)).max()
    assert level(sound.wheeze(rng, expiration, frequency_hz=300.0)).min() < 0.05


def test_heart_beats_at_its_rate():
    signal = sound.heart(np.random.default_rng(5), 60.0)
    power, frequency = spectrum(signal)
    assert power[(frequency > 20) & (frequency < 120)].sum() / power.sum() > 0.85
    envelope = np.abs(signal).reshape(-1, 80).max(axis=1)
    correlation = np.correlate(envelope - envelope.mean(), envelope - envelope.mean(), "full")[len(envelope) :]
    assert 90 <= 60 + correlation[60:140].argmax() + 1 <= 110  # 100 bins of 10 ms are one beat
