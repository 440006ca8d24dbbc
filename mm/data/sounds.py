"""Sounds changed a little each time they are trained on: another speaker, room and microphone, the same words.

Speed changes as Ko et al., "Audio augmentation for speech recognition" (Interspeech 2015), which move the pitch and
the formants with the tempo; erased bands and stretches as Park et al., "SpecAugment" (Interspeech 2019), here on the
waveform, so that every front end has them.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from torch.utils.data import Dataset

from mm.batch import Sample
from mm.ontology import SOUND_RATE

_COLOURS: Final = 4
"""Cosines over the spectrum that the colour of a sound is drawn from."""
_SILENCE: Final = 1e-8
"""Power that noise is measured against in digital silence."""


@dataclass(frozen=True)
class SoundChanges:
    """How far each sound may be changed; every amount is drawn anew, evenly between none and these.

    The defaults leave sounds as they are.

    Attributes:
        speed: Share by which it is played faster or slower: .2 draws factors from 1 / 1.2 to 1.2.
        shift: Seconds that are cut off or added in silence at either end.
        colour_db: Decibels by which frequencies are raised or lowered, smoothly over the spectrum.
        band_hz: Width of a band that is erased.
        gap: Share of the sound that is erased, in one stretch.
        noise_db: Signal-to-noise ratios that white noise is added at, the lowest and the highest; None for no noise.
        longest_s: Seconds; of a longer sound a stretch of this length is taken. None for the whole sound.
    """

    speed: float = 0.0
    shift: float = 0.0
    colour_db: float = 0.0
    band_hz: float = 0.0
    gap: float = 0.0
    noise_db: tuple[float, float] | None = None
    longest_s: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "noise_db":
                if value is not None and not value[0] <= value[1]:
                    raise ValueError(f"sounds.noise_db must be the lowest and the highest ratio, got {list(value)}")
            elif item.name == "longest_s":
                if value is not None and round(value * SOUND_RATE) < 1:
                    raise ValueError(f"sounds.longest_s must be above 0, got {value}")
            elif not 0 <= value < (1 if item.name in ("speed", "gap") else math.inf):
                most = " and below 1" if item.name in ("speed", "gap") else ""
                raise ValueError(f"sounds.{item.name} must be at least 0{most}, got {value}")


class ChangedSounds(Dataset[Sample]):
    """Samples whose sounds are changed, drawn afresh each time from torch's random state."""

    def __init__(self, samples: Dataset[Sample], changes: SoundChanges) -> None:
        self.samples, self.changes = samples, changes

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)  # type: ignore[arg-type]  # every dataset of ours is sized

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` with other sounds."""
        sample = self.samples[index]
        return replace(
            sample, audio=tuple(None if sound is None else changed(sound, self.changes) for sound in sample.audio)
        )


def changed(sound: Float[np.ndarray, " T"], changes: SoundChanges) -> Float[np.ndarray, " U"]:
    """A sound after all changes, drawn from torch's random state.

    Args:
        sound: Samples at `SOUND_RATE`.
        changes: How far each may go.
    """
    values = torch.from_numpy(np.ascontiguousarray(sound))
    if changes.shift:
        values = _shifted(values, round(changes.shift * SOUND_RATE))
    if changes.speed or changes.colour_db or changes.band_hz:
        values = _respeeded(values, changes)
    if changes.longest_s is not None and len(values) > (longest := round(changes.longest_s * SOUND_RATE)):
        start = int(_drawn(0.0, 1.0) * (len(values) - longest))
        values = values[start : start + longest]
    if changes.gap:
        length = int(_drawn(0.0, changes.gap) * len(values))
        start = int(_drawn(0.0, 1.0) * (len(values) - length))
        values = torch.cat([values[:start], values.new_zeros(length), values[start + length :]])
    if changes.noise_db is not None:
        power = float(values.square().mean()) + _SILENCE
        noise = math.sqrt(power * 10 ** (-_drawn(*changes.noise_db) / 10))
        values = values + noise * torch.randn(len(values))
    return values.numpy()


def _drawn(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _shifted(values: Float[torch.Tensor, " T"], most: int) -> Float[torch.Tensor, " U"]:
    """Both ends moved, at most a quarter of the sound inwards."""
    inwards = -min(most, len(values) // 4)
    start, end = (round(_drawn(float(inwards), float(most))) for _ in range(2))
    kept = values[max(-start, 0) : len(values) - max(-end, 0)]
    return torch.nn.functional.pad(kept, (max(start, 0), max(end, 0)))


def _respeeded(values: Float[torch.Tensor, " T"], changes: SoundChanges) -> Float[torch.Tensor, " U"]:
    """Another speed, colour, and a band less, by way of the whole sound's spectrum."""
    speed = (1 + changes.speed) ** _drawn(-1.0, 1.0)
    length = max(round(len(values) / speed), 1)
    spectrum = torch.fft.rfft(values)
    # A spectrum cut off or filled up with zeros is that of the same sound at another rate, without aliases.
    kept = min(len(spectrum), length // 2 + 1)
    spectrum = torch.nn.functional.pad(spectrum[:kept], (0, length // 2 + 1 - kept))
    place = torch.linspace(0, 1, len(spectrum))
    if changes.colour_db:
        waves = torch.cos(math.pi * torch.arange(1, _COLOURS + 1)[:, None] * place)
        decibels = changes.colour_db / _COLOURS * ((2 * torch.rand(_COLOURS) - 1) @ waves)
        spectrum = spectrum * 10 ** (decibels / 20)
    if changes.band_hz:
        width = _drawn(0.0, changes.band_hz) / (SOUND_RATE / 2)
        low = _drawn(0.0, max(1 - width, 0.0))
        spectrum = spectrum * ((place < low) | (place >= low + width))
    played: torch.Tensor = torch.fft.irfft(spectrum, n=length) * (length / len(values))
    return played
