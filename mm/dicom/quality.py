"""What makes a reader careful although the files can be read: stable codes and the numbers behind them.

Nothing here refuses anything: `mm.pipeline.load` warns or fails by the record, as its stages are told.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from jaxtyping import Float

from mm.dicom.instance import Instance
from mm.dicom.scan import Series
from mm.dicom.volume import Volume

QualityCode = Literal[
    "rescaled_twice",
    "not_rescaled",
    "truncated_view",
    "few_slices",
    "short_coverage",
    "body_part",
    "burnt_in",
    "lossy",
    "private_transfer_syntax",
    "contrast",
]
NOTES: Final[tuple[QualityCode, ...]] = ("contrast",)
"""Codes that are worth knowing, and no fault."""

CHEST: Final = ("CHEST", "THORAX", "LUNG")
REGIONS: Final = (
    *CHEST, "CHST", "THORAC", "HEART", "CARDI", "CORONARY", "AORTA", "MEDIAST", "BRONCH", "RIB", "STERNUM",
    "WHOLE", "BODY", "TRUNK", "TORSO", "BRUST", "胸", "肺", "全身",
)  # fmt: skip
"""Parts of BodyPartExamined (PS3.16 annex L, and what is written beside it) that hold a chest."""
UNNAMED: Final = ("", "UNKNOWN", "OTHER", "NONE", "UNDEFINED", "NA", "N/A")

LEAST_SLICES: Final = 20
LEAST_COVERAGE_MM: Final = 150.0
"""The lungs of an adult are 200 to 300 mm high."""
MOST_BORDER: Final = 0.15
BODY_HU: Final = -500.0
BIN_HU: Final = 16
APART_HU: Final = (970, 1130)
"""Between air and soft tissue there are 1000 to 1100 HU, wherever both lie; fat and lung are nearer."""
SOFT_ABOVE_HU: Final = (1000, 1120)
"""How far soft tissue lies above air; fat, of which there may be more, stays below."""
SOFT_HU: Final = (-300.0, 500.0)
"""Where the peak of soft tissue may lie; a wrong intercept moves it by about 1024."""
LEAST_SHARE: Final = 0.02
MAX_SAMPLES: Final = 1 << 20


@dataclass(frozen=True)
class Flag:
    """One thing to be careful about.

    Attributes:
        code: Stable.
        measured: The number behind it, or None where the header says it.
        limit: What it would have to stay within, or None.
        unit: Of both: "HU", "mm", "" for a share or a count.
    """

    code: QualityCode
    measured: float | None = None
    limit: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class Quality:
    """What was looked at in one series.

    Attributes:
        flags: In the order of `QualityCode`; empty where nothing is remarkable.
        air_hu: Peak of air in a CT, or None where no pair of peaks was found.
        soft_tissue_hu: Peak of soft tissue, or None.
        border_share: Share of the border (left, right, front, back) that the body touches in a CT, or None.
        coverage_mm: Of a volume from foot to head, or None.
    """

    flags: tuple[Flag, ...] = ()
    air_hu: float | None = None
    soft_tissue_hu: float | None = None
    border_share: float | None = None
    coverage_mm: float | None = None

    @property
    def faults(self) -> tuple[QualityCode, ...]:
        """Codes that a strict pipeline fails by."""
        return tuple(flag.code for flag in self.flags if flag.code not in NOTES)


def names_chest(body_part: str) -> bool:
    """False where BodyPartExamined names another region; where it names none anything may be seen."""
    part = body_part.upper()
    return part in UNNAMED or any(region in part for region in REGIONS)


def volume_quality(series: Series, volume: Volume) -> Quality:
    """The record of a volume.

    Args:
        series: What its headers say.
        volume: As read, not resampled.
    """
    flags = []
    peaks = hu_peaks(volume.voxels) if volume.units == "HU" else None
    if peaks is not None and peaks[1] < SOFT_HU[0]:
        flags.append(Flag("rescaled_twice", peaks[1], SOFT_HU[0], "HU"))
    elif peaks is not None and peaks[1] > SOFT_HU[1]:
        flags.append(Flag("not_rescaled", peaks[1], SOFT_HU[1], "HU"))
    upright = int(np.argmax(np.abs(volume.affine[2, :3]) / np.linalg.norm(volume.affine[:3, :3], axis=0)))
    border = _border_share(volume.voxels, upright) if volume.units == "HU" and not flags else None
    if border is not None and border > MOST_BORDER:
        flags.append(Flag("truncated_view", border, MOST_BORDER))
    if volume.shape[0] < LEAST_SLICES:
        flags.append(Flag("few_slices", float(volume.shape[0]), float(LEAST_SLICES)))
    coverage = round(volume.spacing_mm[upright] * volume.shape[upright], 1)
    if coverage < LEAST_COVERAGE_MM:
        flags.append(Flag("short_coverage", coverage, LEAST_COVERAGE_MM, "mm"))
    air, soft = peaks if peaks is not None else (None, None)
    return Quality((*flags, *_said(series.body_part, series.instances)), air, soft, border, coverage)


def image_quality(series: Series, index: int) -> Quality:
    """The record of a radiograph: what its header says."""
    return Quality(_said(series.instances[index].body_part, (series.instances[index],)))


def hu_peaks(voxels: Float[np.ndarray, "Z Y X"]) -> tuple[float, float] | None:
    """Where air and soft tissue pile up, in HU as they stand, or None where they can't be told.

    Of all pairs of values that lie 970 to 1130 HU apart, the one whose weaker end holds the most voxels; one whose
    soft tissue lies where it should goes before.
    """
    step = voxels.size // MAX_SAMPLES | 1  # odd, so that it doesn't fall on the same columns
    values = voxels.reshape(-1)[::step]
    values = values[np.isfinite(values) & (np.abs(values) < 8192)]
    if values.size == 0:
        return None
    counts, edges = np.histogram(values, bins=np.arange(-8192, 8192 + BIN_HU, BIN_HU))
    shares = np.convolve(counts / values.size, np.ones(5), mode="same")
    right = (edges[:-1] >= SOFT_HU[0]) & (edges[1:] <= SOFT_HU[1])
    # Where they should be first: padding and air lie as far apart as air and soft tissue.
    found = _pair(shares, right) or _pair(shares, np.ones_like(right))
    if found is None:
        return None
    air = _highest(counts, found[0] - 5, found[0] + 5)
    soft = _highest(counts, air + SOFT_ABOVE_HU[0] // BIN_HU, air + SOFT_ABOVE_HU[1] // BIN_HU)
    return _middle(counts, edges, air), _middle(counts, edges, soft)


def _highest(counts: np.ndarray, first: int, last: int) -> int:
    """The fullest bin between two."""
    first = max(0, first)
    return first + int(counts[first : last + 1].argmax())


def _pair(shares: np.ndarray, soft: np.ndarray) -> tuple[int, int] | None:
    """Bins of air and soft tissue, the latter among those that `soft` allows."""
    best, places = LEAST_SHARE, None
    for apart in range(APART_HU[0] // BIN_HU, APART_HU[1] // BIN_HU + 1):
        weaker = np.minimum(shares[:-apart], shares[apart:] * soft[apart:])
        low = int(weaker.argmax())
        if weaker[low] > best:
            best, places = float(weaker[low]), (low, low + apart)
    return places


def _middle(counts: np.ndarray, edges: np.ndarray, place: int) -> float:
    """The mean of the voxels around a bin."""
    part = slice(max(0, place - 2), place + 3)
    centers = edges[:-1][part] + BIN_HU / 2
    return float(round(float((counts[part] * centers).sum() / max(1, counts[part].sum()))))


def _border_share(voxels: Float[np.ndarray, "Z Y X"], upright: int) -> float:
    """How much of the four sides around the patient's long axis is body."""
    sides = [voxels.take(end, axis=axis) for axis in range(3) if axis != upright for end in (0, -1)]
    inside = sum(int((side > BODY_HU).sum()) for side in sides)
    return float(round(inside / sum(side.size for side in sides), 4))


def _said(body_part: str, instances: Iterable[Instance]) -> tuple[Flag, ...]:
    """What the headers say themselves."""
    items = tuple(instances)
    flags = []
    if not names_chest(body_part):
        flags.append(Flag("body_part"))
    if any(item.burnt_in for item in items):
        flags.append(Flag("burnt_in"))
    if any(item.lossy for item in items):
        flags.append(Flag("lossy"))
    if any(not item.transfer_syntax_uid.startswith("1.2.840.10008.") for item in items):
        flags.append(Flag("private_transfer_syntax"))
    if any(item.contrast for item in items):
        flags.append(Flag("contrast"))
    return tuple(flags)
