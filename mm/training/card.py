"""What lies beside the weights in a checkpoint folder: what the model says of itself, and how its inputs are made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, get_args

from mm import ontology
from mm.dicom.resample import IMAGE_GRID, MODEL_GRID, Grid
from mm.report.schema import Kind

NOTICE: Final = "Research software. Not a medical device, not for clinical use."
LARGEST: Final[dict[str, int]] = {
    "grid": 1024,
    "image_size": 8192,
    "sound_rate": 192_000,
    "max_words": 65_536,
    "max_text": 65_536,
}
"""Beyond these a folder asks for memory that no input of ours needs."""


@dataclass(frozen=True)
class Preprocessing:
    """How inputs are prepared; inference uses these and nothing else.

    Attributes:
        grid: Shape [Z Y X] of the volumes.
        spacing_mm: (z, y, x) of the volumes.
        image_size: Pixels of the square image.
        sound_rate: Samples a second.
        max_words: Longest run of tokens of a record's words.
        max_text: Longest run of tokens of a whole report.
    """

    grid: tuple[int, int, int] = MODEL_GRID.shape
    spacing_mm: tuple[float, float, float] = MODEL_GRID.spacing_mm
    image_size: int = IMAGE_GRID
    sound_rate: int = ontology.SOUND_RATE
    max_words: int = 64
    max_text: int = 256

    @property
    def volume_grid(self) -> Grid:
        """The grid that volumes are resampled to."""
        return Grid(self.grid, self.spacing_mm)


@dataclass(frozen=True)
class Card:
    """What a model says of itself.

    Attributes:
        name: Of the model.
        description: What it is and what it was trained on, in one or two sentences.
        stages: One entry a stage of training: task, data, steps, seconds, last scores.
        notice: What it must not be used for.
        kind: "demonstration" for a model of procedural patients, which knows nothing of real ones.
    """

    name: str
    description: str = ""
    stages: tuple[dict[str, Any], ...] = ()
    notice: str = NOTICE
    kind: Kind = "trained"


@dataclass(frozen=True)
class Identity:
    """Which model it is: the card's name and the SHA-256 over all files of the folder."""

    name: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}@{self.sha256[:12]}"


def to_card(content: Mapping[str, Any]) -> Card:
    """The card of a `card.json`. One without `kind` was written before there was one, by a demonstration.

    Raises:
        ValueError: A key is unknown or missing, or a value has another type.
    """
    given = {"kind": "demonstration", **content}
    _check_keys(given, Card, required={"name"})
    for name in ("name", "description", "notice"):
        if not isinstance(given.get(name, ""), str):
            raise ValueError(f"{name} must be text")
    stages = given.get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError("stages must be a list of objects")
    if given["kind"] not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}; got {given['kind']!r}")
    return Card(**{**given, "stages": tuple(stages)})


def to_preprocessing(content: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing of a `preprocessing.json`.

    Raises:
        ValueError: A key is unknown or missing, or a value has another type or is out of bounds.
    """
    _check_keys(content, Preprocessing, required={item.name for item in fields(Preprocessing)})
    for name, largest in LARGEST.items():
        values = content[name] if name == "grid" else [content[name]]
        if not isinstance(values, list) or not all(type(item) is int and 0 < item <= largest for item in values):
            raise ValueError(f"{name} must be whole numbers from 1 to {largest:,}; got {_short(content[name])}")
    spacing = content["spacing_mm"]
    if not isinstance(spacing, list) or not all(
        type(item) in (int, float) and math.isfinite(item) and item > 0 for item in spacing
    ):
        raise ValueError(f"spacing_mm must be positive millimetres; got {_short(spacing)}")
    for name in ("grid", "spacing_mm"):
        if len(content[name]) != 3:
            raise ValueError(f"{name} must have three values (z, y, x); got {len(content[name])}")
    return Preprocessing(
        **{**content, "grid": tuple(content["grid"]), "spacing_mm": tuple(float(item) for item in spacing)}
    )


def _check_keys(content: Mapping[str, Any], kind: type, *, required: set[str]) -> None:
    accepted = [item.name for item in fields(kind)]
    unknown = sorted(name for name in content if name not in accepted)
    if unknown:
        raise ValueError(f"unknown key {_short(unknown[0])}; accepted: {', '.join(accepted)}")
    missing = sorted(required - set(content))
    if missing:
        raise ValueError(f"no {missing[0]!r}")


def _short(value: object) -> str:
    return repr(value)[:60]
