"""What tells sounds apart without learning: the nearest training sound by its mean spectrum."""

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int
from torchaudio.transforms import MelSpectrogram

from mm.batch import Sample
from mm.ontology import SOUND_RATE

BINS: Final = 40
WINDOW: Final = 256
_FLOOR: Final = 1e-5


def mean_log_mels(samples: Iterable[Sample]) -> Float[np.ndarray, "N F"]:
    """The log-mel spectrum of each study's first sound at unit power, its mean over time; no order of frames is left.

    A sound shorter than a window is filled up with silence.
    """
    transform = MelSpectrogram(SOUND_RATE, n_fft=WINDOW, hop_length=WINDOW // 4, n_mels=BINS, center=False)
    rows = []
    for sample in samples:
        sound = torch.from_numpy(np.ascontiguousarray(next(item for item in sample.audio if item is not None)))
        sound = sound / (sound.square().mean().sqrt() + _FLOOR)
        sound = torch.nn.functional.pad(sound, (0, max(WINDOW - len(sound), 0)))
        rows.append((transform(sound) + _FLOOR).log().mean(-1).numpy())
    return np.stack(rows)


def nearest(
    known: Float[np.ndarray, "M F"], labels: Sequence[int], asked: Float[np.ndarray, "N F"]
) -> Int[np.ndarray, " N"]:
    """The label of the nearest known row, by Euclidean distance; of equals the first."""
    distance = np.square(known).sum(1) - 2 * asked @ known.T
    found: Int[np.ndarray, " N"] = np.asarray(labels, dtype=np.int64)[distance.argmin(1)]
    return found
