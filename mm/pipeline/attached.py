"""What comes with a study beside its DICOM files: sounds and a record, as `--context` names them or by fixed names."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np
import soundfile
import torch
import torchaudio.functional
from jaxtyping import Float

from mm import ontology
from mm.pipeline.case import InputError, Source

SOUND_RATES: Final = (4000, 192000)
MAX_RATIO: Final = 1024
"""Largest denominator between two sound rates: the resampler's filters take memory with its square."""


def sound_files(source: Source) -> dict[str, Path]:
    """Sound file by site: `--context` first, then fixed names beside the series."""
    if source.row is not None and source.row.audio:
        return dict(source.row.audio)
    places = ((site, folder / f"sound_{site}.wav") for folder in source.folders for site in ontology.SOUND_SITES)
    found: dict[str, Path] = {}
    for site, path in places:
        if site not in found and path.is_file():
            found[site] = path
    return found


def record_file(source: Source) -> Path | None:
    """The file that holds a study's record, or None."""
    if source.row is not None and source.row.record is not None:
        return source.row.record if isinstance(source.row.record, Path) else None
    return next((folder / "record.json" for folder in source.folders if (folder / "record.json").is_file()), None)


def record_content(source: Source) -> dict[str, Any] | None:
    """A study's record as JSON, or None.

    Raises:
        InputError: The file can't be read, or holds no JSON object.
    """
    if source.row is not None and isinstance(source.row.record, dict):
        return source.row.record
    path = record_file(source)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: text, JSON, or digits without end
        raise InputError("record_unreadable") from error
    if not isinstance(content, dict):
        raise InputError("record_layout")
    return content


def read_sound(path: Path, *, rate: int, max_seconds: float) -> Float[np.ndarray, " T"]:
    """A sound file as mono float32 at `rate`.

    Raises:
        InputError: The file can't be read, is empty, has a rate outside 4000 to 192000 Hz or samples that are no
            numbers.
    """
    try:
        with soundfile.SoundFile(path) as file:
            given = file.samplerate
            if not SOUND_RATES[0] <= given <= SOUND_RATES[1]:
                raise InputError("audio_rate")
            stored = file.read(int(max_seconds * given), dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise InputError("audio_unreadable") from error
    if len(stored) == 0:
        raise InputError("audio_empty")
    if not np.isfinite(stored).all():
        raise InputError("audio_not_finite")
    mono: Float[np.ndarray, " T"] = stored.mean(axis=1, dtype=np.float32)
    if given != rate:
        # 44101 Hz has no divisor in common with 8000 Hz; a ratio of small numbers is off by 1 in 2000 at most.
        ratio = Fraction(rate, given).limit_denominator(MAX_RATIO)
        mono = torchaudio.functional.resample(torch.from_numpy(mono), ratio.denominator, ratio.numerator).numpy()
    return mono
