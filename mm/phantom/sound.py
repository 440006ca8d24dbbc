"""Lung sounds of a phantom patient by chest site: breath, heart, adventitious sounds and what only sounds like them.

Wheezes are tonal and last over 100 ms, crackles are damped clicks of 5 to 15 ms (Sovijärvi et al., 2000, Definition
of terms for applications of respiratory sounds, Eur Respir Rev 10:77). Their level is the ratio of their own
root mean square while they sound to that of the breath. Speech, a steady hum and rubbing occur in healthy and
sick alike, so that neither "something tonal" nor "something sudden" gives the answer away.
"""

from functools import cache
from typing import Final

import numpy as np
from jaxtyping import Float

from mm.ontology import SOUND_RATE
from mm.phantom.patient import Patient, SiteSound

SECONDS: Final = 4.0
NUM_SAMPLES: Final = int(SOUND_RATE * SECONDS)
BREATH_RMS: Final = 0.03
PCM_STEPS: Final = 32768
_STREAM: Final = 21
_TIME: Final[np.ndarray] = np.arange(NUM_SAMPLES, dtype=np.float32) / SOUND_RATE


def render_sounds(patient: Patient) -> dict[str, Float[np.ndarray, " T"]]:
    """Four seconds at `SOUND_RATE` for each chest site, within -1 to 1 and on the steps of 16-bit PCM.

    The same patient gives the same sounds, and what is saved as WAV reads back equal.
    """
    rng = np.random.default_rng([patient.seed, _STREAM])
    breaths = float(np.clip(patient.record.values["respiratory_rate"], 9.0, 30.0))
    beats = float(np.clip(patient.record.values["heart_rate"], 45.0, 140.0))
    return {item.site: _render_site(rng, item, breaths=breaths, beats=beats) for item in patient.sounds}


def _render_site(rng: np.random.Generator, item: SiteSound, *, breaths: float, beats: float) -> Float[np.ndarray, " T"]:
    inspiration, expiration = respiration(breaths, float(rng.random()))
    # Expiration is the softer one over the lung (vesicular breathing).
    breath = noise(rng) * (0.08 + inspiration + 0.45 * expiration)
    signal = _unit(breath)
    if item.wheeze_db is not None:
        signal = signal + _gain(item.wheeze_db) * wheeze(rng, expiration, frequency_hz=item.wheeze_hz)
    if item.crackle_db is not None:
        signal = signal + _gain(item.crackle_db) * crackles(rng, inspiration, number=item.crackles)
    match item.mimic:
        case "speech":
            signal = signal + _gain(item.mimic_db) * speech(rng)
        case "hum":
            signal = signal + _gain(item.mimic_db) * hum(rng)
        case "rub":
            signal = signal + _gain(item.mimic_db) * rub(rng)
        case "none":
            pass
    loudness = 3.0 if item.site.startswith("left") else 1.2
    signal = signal + loudness * heart(rng, beats) * rng.uniform(0.5, 1.5)
    signal = signal + 0.05 * rng.standard_normal(NUM_SAMPLES, dtype=np.float32)
    scaled = signal * (BREATH_RMS * rng.uniform(0.5, 1.5))
    scaled = scaled * min(1.0, 0.95 / float(np.abs(scaled).max()))
    pcm: Float[np.ndarray, " T"] = np.rint(scaled * PCM_STEPS).astype(np.float32) / np.float32(PCM_STEPS)
    return pcm


def _gain(level_db: float) -> float:
    return float(10 ** (level_db / 20))


@cache
def _spectrum(low_hz: float, high_hz: float, slope: float) -> Float[np.ndarray, " F"]:
    """Gain of a noise that rolls off below `low_hz` and, with a power law, above `high_hz`."""
    frequency = np.fft.rfftfreq(NUM_SAMPLES, 1 / SOUND_RATE)
    rise = 1 / (1 + (low_hz / np.maximum(frequency, 1.0)) ** 4)
    fall = 1 / (1 + (frequency / high_hz) ** slope)
    gain: Float[np.ndarray, " F"] = (rise * fall).astype(np.float32)
    return gain


def noise(
    rng: np.random.Generator, *, low_hz: float = 100.0, high_hz: float = 400.0, slope: float = 3.0
) -> Float[np.ndarray, " T"]:
    """Stationary noise with a root mean square of 1."""
    white = np.fft.rfft(rng.standard_normal(NUM_SAMPLES, dtype=np.float32))
    shaped = np.fft.irfft(white * _spectrum(low_hz, high_hz, slope), NUM_SAMPLES).astype(np.float32)
    result: Float[np.ndarray, " T"] = shaped / np.sqrt(np.mean(shaped**2))
    return result


def respiration(rate_per_min: float, phase: float) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
    """Flow of inspiration (the first 40 % of each cycle) and of expiration, 0 to 1.

    Args:
        rate_per_min: Breaths a minute.
        phase: Where in the cycle the recording begins, 0 to 1.
    """
    cycle = (_TIME * np.float32(rate_per_min / 60) + np.float32(phase)) % 1
    inspiration = np.where(cycle < 0.4, np.sin(np.pi * cycle / 0.4), 0.0)
    expiration = np.where(cycle >= 0.4, np.sin(np.pi * (cycle - 0.4) / 0.6), 0.0)
    return inspiration.astype(np.float32), expiration.astype(np.float32)


def heart(rng: np.random.Generator, rate_per_min: float) -> Float[np.ndarray, " T"]:
    """First and second heart sound, damped thuds near 50 Hz, with a peak of about 1."""
    signal = np.zeros(NUM_SAMPLES, np.float32)
    period = 60 / rate_per_min
    start = float(rng.uniform(-period, 0))
    for beat in np.arange(start, SECONDS, period).tolist():
        for delay, frequency, gain in ((0.0, 45.0, 1.0), (0.32 * min(period, 1.0), 60.0, 0.7)):
            _add(signal, beat + delay, gain * _damped(frequency * rng.uniform(0.9, 1.1), 0.025, 0.12))
    return signal


def wheeze(
    rng: np.random.Generator, expiration: Float[np.ndarray, " T"], *, frequency_hz: float
) -> Float[np.ndarray, " T"]:
    """A tone with weak harmonics, sliding a little, in the middle of each expiration; RMS of 1 while it sounds."""
    slide = float(rng.uniform(-0.12, 0.12))
    width = float(rng.uniform(0.25, 0.8))
    signal = np.zeros(NUM_SAMPLES, np.float32)
    for middle in _middles(expiration):
        num = int(SOUND_RATE * width * rng.uniform(0.8, 1.2))
        time = _TIME[:num]
        frequency = frequency_hz * (1 + slide * (time / time[-1] - 0.5)) * rng.uniform(0.98, 1.02)
        angle = 2 * np.pi * np.cumsum(frequency) / SOUND_RATE + rng.uniform(0, 2 * np.pi)
        tone = np.sin(angle) + rng.uniform(0.05, 0.35) * np.sin(2 * angle)
        edge = np.minimum(1, np.minimum(time, time[::-1]) / 0.03)
        _add(signal, middle - num / SOUND_RATE / 2, _unit(tone * edge))
    return signal


def crackles(rng: np.random.Generator, inspiration: Float[np.ndarray, " T"], *, number: int) -> Float[np.ndarray, " T"]:
    """Damped clicks of 5 to 15 ms around the peak of each inspiration; each has an RMS of 1."""
    signal = np.zeros(NUM_SAMPLES, np.float32)
    coarse = float(rng.uniform(0.0, 1.0))
    for middle in _middles(inspiration):
        for _ in range(number):
            frequency = (650 - 350 * coarse) * rng.uniform(0.8, 1.25)
            length = (0.005 + 0.008 * coarse) * rng.uniform(0.9, 1.15)
            _add(signal, middle + rng.uniform(-0.15, 0.4), _unit(_damped(frequency, length / 3, length)))
    return signal


def speech(rng: np.random.Generator) -> Float[np.ndarray, " T"]:
    """A voice through the chest wall: a wavering harmonic stack in syllables; RMS of 1 while it sounds."""
    pitch = float(rng.uniform(90, 220))
    num = int(SOUND_RATE * rng.uniform(0.6, 1.8))
    time = _TIME[:num]
    waver = 1 + 0.06 * np.sin(2 * np.pi * rng.uniform(1.0, 3.0) * time + rng.uniform(0, 2 * np.pi))
    angle = 2 * np.pi * np.cumsum(pitch * waver) / SOUND_RATE
    formant = float(rng.uniform(300, 700))
    voice = np.zeros(num)
    for harmonic in range(1, 9):
        gain = 0.15 + np.exp(-(((harmonic * pitch - formant) / 180) ** 2))
        voice += gain / harmonic**0.5 * np.sin(harmonic * angle + rng.uniform(0, 2 * np.pi))
    syllables = 0.5 - 0.5 * np.cos(2 * np.pi * rng.uniform(3.0, 5.0) * time)
    signal = np.zeros(NUM_SAMPLES, np.float32)
    _add(signal, rng.uniform(0.1, SECONDS - 1.9), _unit(voice * syllables))
    return signal


def hum(rng: np.random.Generator) -> Float[np.ndarray, " T"]:
    """A machine in the room: mains frequency and its harmonics, the same from beginning to end; RMS of 1."""
    base = float(rng.choice((50.0, 60.0))) * 2
    angle = 2 * np.pi * base * _TIME
    tones = sum(rng.uniform(0.2, 1.0) / order * np.sin(order * angle + rng.uniform(0, 6.28)) for order in range(1, 6))
    return _unit(np.asarray(tones, np.float32))


def rub(rng: np.random.Generator) -> Float[np.ndarray, " T"]:
    """The stethoscope rubs: a few bursts of broad noise, 60 to 200 ms each; RMS of about 1 while it sounds."""
    envelope = np.zeros(NUM_SAMPLES, np.float32)
    for _ in range(int(rng.integers(2, 6))):
        num = int(SOUND_RATE * rng.uniform(0.06, 0.2))
        _add(envelope, rng.uniform(0, SECONDS - 0.2), np.hanning(num).astype(np.float32) * 1.6)
    bursts: Float[np.ndarray, " T"] = envelope * noise(rng, low_hz=250.0, high_hz=1500.0, slope=2.0)
    return bursts


def _damped(frequency: float, decay_s: float, length_s: float) -> Float[np.ndarray, " N"]:
    time = np.arange(max(2, int(length_s * SOUND_RATE)), dtype=np.float32) / SOUND_RATE
    damped: Float[np.ndarray, " N"] = np.sin(2 * np.pi * frequency * time) * np.exp(-time / decay_s)
    return damped


def _unit(event: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    unit: Float[np.ndarray, " N"] = event / np.sqrt(np.mean(event**2))
    return unit


def _add(signal: Float[np.ndarray, " T"], start_s: float, event: Float[np.ndarray, " N"]) -> None:
    """Adds an event in place; what lies outside the recording is cut."""
    first = round(start_s * SOUND_RATE)
    cut = max(0, -first)
    part = event[cut : max(cut, NUM_SAMPLES - first)]
    signal[first + cut : first + cut + len(part)] += part.astype(np.float32)


def _middles(flow: Float[np.ndarray, " T"]) -> list[float]:
    """Seconds at which a flow peaks inside the recording; at least one."""
    inner = (flow[1:-1] > flow[:-2]) & (flow[1:-1] >= flow[2:]) & (flow[1:-1] > 0.5)
    found = [(index + 1) / SOUND_RATE for index in np.flatnonzero(inner).tolist()]
    whole = [middle for middle in found if 0.2 <= middle <= SECONDS - 0.4]
    return whole or [float(np.argmax(flow[: int(NUM_SAMPLES * 0.8)])) / SOUND_RATE]
