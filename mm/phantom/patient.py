"""One phantom patient: everything that the renderers, the record and the report are made from.

Positions are in the patient's LPS millimetres (x to the left, y to the back, z to the head) with the origin
at the thorax centre. `Anatomy` and the lesions are in the body frame, which `Scanner.roll_deg` turns about z
into LPS on a CT; `FindingTruth.center_mm` is in LPS already. The radiograph is taken upright and unrolled.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from mm.batch import FindingTruth
from mm.ontology import MEASUREMENTS, SOUND_SITES
from mm.phantom.anatomy import Anatomy, draw_anatomy
from mm.phantom.course import draw_course
from mm.phantom.findings import Lesions
from mm.phantom.table import TABLE, Range

Sex = Literal["F", "M"]
Kernel = Literal["soft", "standard", "sharp"]
Mimic = Literal["none", "speech", "hum", "rub"]
Complaint = Literal["cough", "dyspnoea", "chest pain", "trauma", "follow-up", "weight loss", "preoperative"]

KERNELS: tuple[Kernel, ...] = ("soft", "standard", "sharp")
MIMICS: tuple[Mimic, ...] = ("speech", "hum", "rub")
COMPLAINTS: tuple[Complaint, ...] = (
    "cough",
    "dyspnoea",
    "chest pain",
    "trauma",
    "follow-up",
    "weight loss",
    "preoperative",
)


@dataclass(frozen=True)
class Scanner:
    """How one CT was made.

    Attributes:
        shape: Voxels (z, y, x).
        spacing_mm: Spacing (z, y, x).
        center_mm: LPS (x, y, z) of the middle of the grid.
        oblique_deg: Rotation of the grid about z, written in the affine.
        roll_deg: Rotation of the patient about z on the table, written nowhere.
        noise_hu: Standard deviation of the noise.
        kernel: Texture of the noise.
        hu_offset: Miscalibration of the scanner.
        table_gap_mm: Distance of the table from the back; None without a table in the field.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    center_mm: tuple[float, float, float]
    oblique_deg: float
    roll_deg: float
    noise_hu: float
    kernel: Kernel
    hu_offset: float
    table_gap_mm: float | None

    @property
    def affine(self) -> Float[np.ndarray, "4 4"]:
        """Voxel index (z, y, x, 1) to LPS (x, y, z, 1)."""
        cos, sin = math.cos(math.radians(self.oblique_deg)), math.sin(math.radians(self.oblique_deg))
        dz, dy, dx = self.spacing_mm
        affine = np.array([[0, -sin * dy, cos * dx, 0], [0, cos * dy, sin * dx, 0], [dz, 0, 0, 0], [0, 0, 0, 1]], float)
        middle = (np.array(self.shape, float) - 1) / 2
        affine[:3, 3] = np.array(self.center_mm) - affine[:3, :3] @ middle
        return affine


@dataclass(frozen=True)
class Machine:
    """How the radiograph was made.

    Attributes:
        shape: Pixels (y, x).
        spacing_mm: Of a pixel, in the patient.
        center_mm: Patient (x, z) at the middle of the image.
        noise: Standard deviation relative to the grey range.
        scatter: Share of the scattered radiation.
        blur_px: Standard deviation of the detector's blur.
        gamma: Of the display curve.
    """

    shape: tuple[int, int]
    spacing_mm: float
    center_mm: tuple[float, float]
    noise: float
    scatter: float
    blur_px: float
    gamma: float


@dataclass(frozen=True)
class SiteSound:
    """What is heard at one chest site; levels in dB over the breath noise, None where there is none.

    Attributes:
        site: One of `mm.ontology.SOUND_SITES`.
        wheeze_db: Level of the wheeze (a tone of `wheeze_hz` longer than 100 ms).
        wheeze_hz: Its pitch.
        crackle_db: Peak level of the crackles.
        crackles: How many in a breath.
        mimic: What else is heard: speech, a steady hum, or rubbing of the stethoscope.
        mimic_db: Its level.
    """

    site: str
    wheeze_db: float | None
    wheeze_hz: float
    crackle_db: float | None
    crackles: int
    mimic: Mimic
    mimic_db: float


@dataclass(frozen=True)
class RecordFacts:
    """What the clinical record of the current visit knows.

    Attributes:
        infection: True only where there is an opacity as well.
        inflamed: The values look infected; without an opacity the infection is elsewhere.
        values: Every measurement of `mm.ontology.MEASUREMENTS` by name, in its canonical unit.
        complaint: Reason of the examination; independent of the findings.
        smoker: Likewise.
    """

    infection: bool
    inflamed: bool
    values: dict[str, float]
    complaint: Complaint
    smoker: bool


@dataclass(frozen=True)
class Visit:
    """One CT and what it shows; `days` before the current visit (0 for the current one)."""

    days: float
    anatomy: Anatomy
    lesions: Lesions
    findings: tuple[FindingTruth, ...]
    scanner: Scanner


@dataclass(frozen=True)
class Patient:
    """A patient; `visits` holds the current one first, then the priors, the most recent first.

    Attributes:
        seed: Everything follows from it.
        sex: F or M.
        age: In years.
        habitus: 0 (lean) to 1 (obese).
        visits: 1 to 4.
        sounds: One a site, in the order of `mm.ontology.SOUND_SITES`.
        record: Of the current visit.
        machine: Of the current visit's radiograph.
    """

    seed: int
    sex: Sex
    age: int
    habitus: float
    visits: tuple[Visit, ...]
    sounds: tuple[SiteSound, ...]
    record: RecordFacts
    machine: Machine

    @property
    def findings(self) -> tuple[FindingTruth, ...]:
        """Truth of the current visit, resolved findings (`present` False) included."""
        return self.visits[0].findings

    @property
    def present(self) -> frozenset[str]:
        """Codes of the findings that the current visit shows."""
        return frozenset(item.code for item in self.findings if item.present)


def draw_patient(seed: int) -> Patient:
    """Draws a patient; the same seed gives the same patient."""
    rng = np.random.default_rng([seed, 20])
    sex: Sex = "M" if rng.random() < 0.5 else "F"
    age = round(_uniform(rng, TABLE.age))
    habitus = float(rng.beta(2.0, 2.5))
    anatomy = draw_anatomy(rng, male=sex == "M", habitus=habitus)
    days = _draw_days(rng)
    # Scanners are drawn before lesions: nothing of a scan may depend on what it shows.
    scanners = tuple(_draw_scanner(rng, anatomy) for _ in days)
    machine = _draw_machine(rng, anatomy)
    course = draw_course(rng, anatomy, visits=len(days), rolls=tuple(item.roll_deg for item in scanners))
    sounds, obstructed = _draw_sounds(rng)
    opacity = bool({"consolidation", "atelectasis"} & {item.code for item in course[0].findings if item.present})
    record = _draw_record(rng, age=age, opacity=opacity)
    extra = []
    if obstructed:
        extra.append(FindingTruth("airflow_obstruction", True, "none", None, None, None, "unknown", ("audio",)))
    if record.infection:
        extra.append(FindingTruth("infection", True, "none", None, None, None, "unknown", ("record",)))
    visits = tuple(
        Visit(day, step.anatomy, step.lesions, step.findings + (tuple(extra) if index == 0 else ()), scanner)
        for index, (day, step, scanner) in enumerate(zip(days, course, scanners, strict=True))
    )
    return Patient(seed, sex, age, habitus, visits, sounds, record, machine)


def _uniform(rng: np.random.Generator, limits: Range) -> float:
    return float(rng.uniform(*limits))


def _draw_days(rng: np.random.Generator) -> tuple[float, ...]:
    priors = int(rng.choice(len(TABLE.priors), p=TABLE.priors))
    low, high = TABLE.prior_days
    gaps = np.round(np.exp(rng.uniform(math.log(low), math.log(high), priors)))
    return (0.0, *(float(day) for day in np.cumsum(gaps)))


def _draw_scanner(rng: np.random.Generator, anatomy: Anatomy) -> Scanner:
    slice_mm = _uniform(rng, TABLE.slice_mm)
    matrix = int(rng.choice(TABLE.matrix))
    spacing = _uniform(rng, TABLE.field_mm) / matrix
    low, high = TABLE.noise_hu
    noise = math.exp(rng.uniform(math.log(low), math.log(high)))
    offset = rng.uniform(*TABLE.off_center_mm, 2)
    oblique = _uniform(rng, TABLE.oblique_deg) if rng.random() < TABLE.oblique else 0.0
    return Scanner(
        shape=(round(_uniform(rng, TABLE.scan_mm) / slice_mm), matrix, matrix),
        spacing_mm=(slice_mm, spacing, spacing),
        center_mm=(float(offset[0]), float(offset[1]) + 8.0, anatomy.middle_mm + _uniform(rng, (-8.0, 8.0))),
        oblique_deg=oblique,
        roll_deg=_uniform(rng, TABLE.roll_deg),
        noise_hu=noise,
        kernel=KERNELS[int(rng.integers(3))],
        hu_offset=_uniform(rng, TABLE.hu_offset),
        table_gap_mm=_uniform(rng, (2.0, 14.0)) if rng.random() < TABLE.table else None,
    )


def _draw_machine(rng: np.random.Generator, anatomy: Anatomy) -> Machine:
    spacing = _uniform(rng, TABLE.xray_spacing_mm)
    return Machine(
        shape=(int(rng.integers(248, 272)), int(rng.integers(248, 272))),
        spacing_mm=spacing,
        center_mm=(_uniform(rng, (-8.0, 8.0)), anatomy.middle_mm + _uniform(rng, (-10.0, 10.0))),
        noise=_uniform(rng, TABLE.xray_noise),
        scatter=_uniform(rng, TABLE.xray_scatter),
        blur_px=_uniform(rng, TABLE.xray_blur_px),
        gamma=_uniform(rng, (0.8, 1.25)),
    )


def _draw_sounds(rng: np.random.Generator) -> tuple[tuple[SiteSound, ...], bool]:
    obstructed = bool(rng.random() < dict(TABLE.prevalence)["airflow_obstruction"])
    kind = int(rng.choice(3, p=TABLE.sound_kind))
    count = 1 + int(rng.choice(4, p=TABLE.sound_sites))
    affected = set(rng.permutation(len(SOUND_SITES))[:count].tolist()) if obstructed else set()
    pitch = math.exp(rng.uniform(*np.log(TABLE.wheeze_hz)))
    sounds = []
    for index, site in enumerate(SOUND_SITES):
        wheeze, crackle = _uniform(rng, TABLE.wheeze_db), _uniform(rng, TABLE.crackle_db)
        mimic: Mimic = MIMICS[int(rng.integers(3))] if rng.random() < TABLE.sound_mimic else "none"
        sounds.append(
            SiteSound(
                site=site,
                wheeze_db=wheeze if index in affected and kind != 1 else None,
                wheeze_hz=float(pitch * rng.uniform(0.95, 1.05)),
                crackle_db=crackle if index in affected and kind != 0 else None,
                crackles=int(rng.integers(*TABLE.crackles)),
                mimic=mimic,
                mimic_db=_uniform(rng, TABLE.mimic_db),
            )
        )
    return tuple(sounds), obstructed


def _draw_record(rng: np.random.Generator, *, age: int, opacity: bool) -> RecordFacts:
    share = TABLE.infection_given_opacity if opacity else TABLE.fever_without_opacity
    inflamed = bool(rng.random() < share)
    values = {}
    special = {name: (mean, sd) for name, mean, sd in (TABLE.infected if inflamed else TABLE.quiet)}
    for item in MEASUREMENTS:
        mean, sd = special.get(item.name, (item.mean, item.sd))
        value = float(rng.normal(mean, sd))
        values[item.name] = math.exp(value) if item.log else value
    values["age"] = float(age)
    values["oxygen_saturation"] = min(values["oxygen_saturation"], 100.0)
    values["temperature"] = max(values["temperature"], 35.2)
    complaint = COMPLAINTS[int(rng.integers(len(COMPLAINTS)))]
    return RecordFacts(inflamed and opacity, inflamed, values, complaint, bool(rng.random() < 0.35))
