"""Log-mel spectrogram and a few convolutions: a front end for sounds that starts where waveforms arrive late.

w2v-BERT (Chung et al., ASRU 2021) feeds wav2vec's transformer the same way. On chest sounds a network that must
first discover frequency from samples hears loud crackles only; given the spectrum it hears wheezes too.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from mm.ontology import SOUND_RATE

WINDOW = 256
"""Samples (32 ms) of the Hann window: frequencies 60 Hz apart are told apart, a crackle is still sudden."""
TRANSFORM = 512
HOP = 80
BINS = 48
BAND_HZ = (80.0, 2500.0)
"""Lung sounds lie above the heart's and below 2.5 kHz (Sovijärvi et al., Eur Respir Rev 2000)."""
FLOOR = 1e-5
"""Below the noise of any recording of unit power; keeps digital silence finite."""
HIGHEST_FORMANT = 3200.0
"""Hz up to which a warp is a plain factor; what lies above is fitted in below half the rate."""
STRIDES = ((2, 1), (2, 2), (2, 1), (2, 1))
"""Of each convolution: bins, frames."""


class MelStem(nn.Module):
    """Sounds of unit power to features of 20 ms; what lies past a sound's length never reaches its features.

    Takes the place of torchaudio's feature extractor in its wav2vec 2.0 model.

    Args:
        channels: Output channels of each of the convolutions.
        band_hz: Lowest and highest frequency of the bins.
        warp: In training, share by which the frequencies of each sound are stretched or squeezed, as if a longer or
            shorter vocal tract had spoken: .2 draws factors from 1 / 1.2 to 1.2 (see `warped`).

    Raises:
        ValueError: There is no such band at this rate, or the share isn't one.
    """

    shortest = TRANSFORM
    stride = HOP * 2

    def __init__(
        self,
        channels: tuple[int, int, int, int] = (16, 32, 64, 96),
        *,
        band_hz: tuple[float, float] = BAND_HZ,
        warp: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= warp < 1:
            raise ValueError(f"warp must be at least 0 and below 1, got {warp}")
        if not 0 <= band_hz[0] < band_hz[1] <= SOUND_RATE / 2:
            raise ValueError(f"band_hz must rise within 0 to {SOUND_RATE // 2}, got {list(band_hz)}")
        # A constant: made for real even where a model's sizes are tried out without memory (torch's meta device).
        with torch.device("cpu"):
            self.mel = MelSpectrogram(
                SOUND_RATE,
                n_fft=TRANSFORM,
                win_length=WINDOW,
                hop_length=HOP,
                f_min=band_hz[0],
                f_max=band_hz[1],
                n_mels=BINS,
                center=False,
            )
        self.band_hz, self.warp = band_hz, warp
        before = (1, *channels[:-1])
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(b, c, 3, stride=s, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU())
            for b, c, s in zip(before, channels, STRIDES, strict=True)
        )
        self.width = channels[-1] * BINS // 2 ** len(channels)

    def forward(
        self, sounds: Float[Tensor, "R T"], lengths: Int[Tensor, " R"]
    ) -> tuple[Float[Tensor, "R F C"], Int[Tensor, " R"]]:
        """Features of each frame, and how many frames each sound has.

        Args:
            sounds: Samples, of unit power.
            lengths: Samples of each, all at least `shortest`.
        """
        with torch.autocast(sounds.device.type, enabled=False):
            if self.training and self.warp > 0:
                factors = (1 + self.warp) ** (2 * torch.rand(len(sounds), device=sounds.device) - 1)
                filters = warped_filters(factors, band_hz=self.band_hz)
                power = filters.transpose(1, 2) @ self.mel.spectrogram(sounds.float())
            else:
                power = self.mel(sounds.float())
            spectrum = (power + FLOOR).log()[:, None]
        frames = (lengths - TRANSFORM) // HOP + 1
        inside = _inside(spectrum, frames)
        mean = (spectrum * inside).sum((1, 2, 3), keepdim=True) / (frames * BINS)[:, None, None, None]
        # Halved: the log power of breath spreads by about 2.
        features = (spectrum - mean) / 2 * inside
        for layer, (_, step) in zip(self.layers, STRIDES, strict=True):
            features = layer(features)
            frames = (frames + step - 1) // step
            features = features * _inside(features, frames)
        return features.flatten(1, 2).transpose(1, 2), frames


def warped(hertz: Float[Tensor, " N"], factors: Float[Tensor, " R"]) -> Float[Tensor, "R N"]:
    """Frequencies on the axis of another vocal tract (Jaitly and Hinton, ICML workshop on speech, 2013).

    A factor up to `HIGHEST_FORMANT`, and from there straight on to half the rate, which stays where it is.

    Args:
        hertz: From 0 to half of `SOUND_RATE`.
        factors: Of each row, above 0; 1 leaves it as it is.
    """
    nyquist, factor = SOUND_RATE / 2, factors[:, None]
    reached = HIGHEST_FORMANT * factor.clamp(max=1)
    bend = reached / factor
    above = nyquist - (nyquist - reached) / (nyquist - bend) * (nyquist - hertz)
    return torch.where(hertz <= bend, hertz * factor, above)


def warped_filters(
    factors: Float[Tensor, " R"], *, band_hz: tuple[float, float] = BAND_HZ
) -> Float[Tensor, "R frequencies bins"]:
    """Triangles of a mel spectrogram with all their corners warped, for each factor.

    Args:
        factors: See `warped`; with 1 these are torchaudio's own.
        band_hz: Lowest and highest frequency before the warp.
    """
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in band_hz)
    mels = torch.linspace(low, high, BINS + 2, device=factors.device)
    corners = warped((700 * (10 ** (mels / 2595) - 1)).clamp(max=SOUND_RATE / 2), factors)[:, None]
    place = torch.linspace(0, SOUND_RATE / 2, TRANSFORM // 2 + 1, device=factors.device)[:, None]
    steps = corners.diff()
    up = (place - corners[..., :-2]) / steps[..., :-1]
    down = (corners[..., 2:] - place) / steps[..., 1:]
    return torch.minimum(up, down).clamp(min=0)


def _inside(features: Float[Tensor, "R C Y F"], frames: Int[Tensor, " R"]) -> Float[Tensor, "R 1 1 F"]:
    """1 where a sound has a frame, else 0."""
    there = torch.arange(features.shape[-1], device=features.device) < frames[:, None]
    return there[:, None, None].to(features.dtype)
