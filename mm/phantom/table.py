"""The frozen difficulty of the phantom patients.

Every choice that makes the task easier or harder is a number here: prevalences, ranges, contrasts, noise,
change factors. `table_digest()` is printed beside each phantom score, so that a score can't be bought by
easier patients. Pairs are (low, high); `log` in a name's comment means that the value is log-uniform.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Final

Range = tuple[float, float]


@dataclass(frozen=True)
class Table:
    """Ranges and prevalences; lengths in mm, volumes in ml (calcium: mm3), densities in HU."""

    # ------------------------------------------------------------------------------------------ prevalences
    prevalence: tuple[tuple[str, float], ...] = (
        ("nodule", 0.30),
        ("consolidation", 0.20),
        ("atelectasis", 0.15),
        ("effusion", 0.25),
        ("pneumothorax", 0.15),
        ("cardiomegaly", 0.25),
        ("emphysema", 0.20),
        ("rib_fracture", 0.15),
        ("calcification", 0.25),
        ("airflow_obstruction", 0.20),
    )
    infection_given_opacity: float = 0.50
    fever_without_opacity: float = 0.15
    """Share of patients without an opacity whose record looks infected: infection needs both."""

    # ------------------------------------------------------------------------------------------------ sizes
    nodule_mm: Range = (4.0, 30.0)  # log
    nodule_hu: Range = (-100.0, 60.0)
    nodule_axis_ratio: Range = (0.85, 1.2)
    nodule_count: tuple[float, ...] = (0.55, 0.25, 0.12, 0.08)
    nodule_clearance_mm: float = 18.0
    consolidation_ml: Range = (10.0, 150.0)  # log
    consolidation_hu: Range = (-30.0, 50.0)
    consolidation_bilateral: float = 0.25
    consolidation_roughness_mm: float = 7.0
    bronchogram_radius_mm: Range = (1.3, 2.4)
    atelectasis_ml: Range = (10.0, 150.0)  # log
    atelectasis_hu: Range = (0.0, 60.0)
    atelectasis_roughness_mm: float = 2.0
    atelectasis_flatness: Range = (0.35, 0.6)
    diaphragm_rise_mm: Range = (8.0, 24.0)
    """Rise of the diaphragm on the side of an atelectasis, at the smallest and at the largest volume."""
    effusion_ml: Range = (30.0, 1500.0)  # log
    effusion_hu: Range = (0.0, 20.0)
    effusion_bilateral: float = 0.40
    effusion_share: float = 0.60
    """A current effusion fills at most this share of its hemithorax; a prior at most `prior_share`."""
    prior_share: float = 0.86
    pneumothorax_percent: Range = (1.0, 40.0)  # log
    cardiothoracic_normal: Range = (0.40, 0.50)
    cardiothoracic_enlarged: Range = (0.50, 0.65)
    cardiothoracic_limit: float = 0.50
    emphysema_absent_percent: Range = (0.0, 6.0)
    emphysema_percent: Range = (6.0, 35.0)  # log
    emphysema_limit_percent: float = 6.0
    emphysema_scale_mm: Range = (14.0, 34.0)
    fracture_step_mm: Range = (1.0, 5.0)
    fracture_gap_mm: Range = (2.0, 5.0)
    fracture_swelling_mm: Range = (7.0, 11.0)
    fracture_count: tuple[float, ...] = (0.65, 0.25, 0.10)
    fracture_only_image: float = 0.50
    calcium_mm3: Range = (5.0, 300.0)  # log
    calcium_hu: Range = (300.0, 1000.0)
    calcium_count: tuple[float, ...] = (0.35, 0.35, 0.30)
    wheeze_db: Range = (0.0, 20.0)
    crackle_db: Range = (0.0, 20.0)
    wheeze_hz: Range = (150.0, 800.0)
    sound_kind: tuple[float, ...] = (0.5, 0.2, 0.3)
    """Shares of wheeze alone, crackles alone, both among the obstructed."""
    sound_sites: tuple[float, ...] = (0.3, 0.3, 0.2, 0.2)
    """How many of the four sites carry it."""
    sound_mimic: float = 0.35
    """Share of sites with speech, a hum or rubbing, obstructed or not."""
    mimic_db: Range = (0.0, 15.0)
    crackles: tuple[int, int] = (3, 12)
    """How many in a breath: from the first up to, and without, the second."""

    # ----------------------------------------------------------------------------------------------- change
    priors: tuple[float, ...] = (0.45, 0.35, 0.12, 0.08)
    prior_days: Range = (14.0, 540.0)  # log, between visits
    changed_factor: Range = (1.4, 2.5)  # log
    stable_factor: Range = (0.95, 1.05)
    prior_nodule_mm: float = 60.0
    prior_opacity_ml: float = 400.0

    # ------------------------------------------------------------------------------------------ the patient
    age: Range = (22.0, 92.0)
    half_width_mm: tuple[Range, Range] = ((118.0, 138.0), (128.0, 152.0))  # female, male
    depth_ratio: Range = (0.66, 0.78)
    lung_height_mm: Range = (205.0, 250.0)
    fat_mm: Range = (4.0, 34.0)
    lung_hu: Range = (-885.0, -815.0)
    gravity_hu: Range = (15.0, 60.0)
    texture_hu: Range = (6.0, 18.0)
    vessel_radius_mm: Range = (3.4, 4.6)  # at the hilum; 1 mm in the periphery
    vessel_ends: int = 64
    soft_hu: Range = (30.0, 60.0)
    breath_mm: Range = (-7.0, 7.0)
    """How differently deep two visits are breathed in: shift of both domes."""

    # ------------------------------------------------------------------------------------------ the machines
    slice_mm: Range = (4.5, 5.5)
    scan_mm: Range = (296.0, 326.0)
    field_mm: Range = (335.0, 400.0)
    matrix: tuple[int, ...] = (120, 128, 136)
    roll_deg: Range = (-5.0, 5.0)
    oblique: float = 0.15
    oblique_deg: Range = (-4.0, 4.0)
    off_center_mm: Range = (-14.0, 14.0)
    noise_hu: Range = (8.0, 40.0)  # log
    noise_tap: tuple[tuple[str, float], ...] = (("soft", 0.9), ("standard", 0.45), ("sharp", -0.25))
    """By kernel: weight of the neighbour in the filter that gives the noise its texture."""
    hu_offset: Range = (-8.0, 8.0)
    table: float = 0.85
    xray_spacing_mm: Range = (1.35, 1.5)
    xray_noise: Range = (0.004, 0.012)
    xray_scatter: Range = (0.10, 0.35)
    xray_blur_px: Range = (0.3, 0.7)

    # --------------------------------------------------------------------- what a radiograph is said to show
    xray_nodule_mm: float = 8.0
    xray_opacity_ml: float = 20.0
    xray_effusion_ml: float = 100.0
    xray_pneumothorax_percent: float = 4.0
    xray_seen_mm: tuple[tuple[str, float], ...] = (
        ("consolidation", 10.0),
        ("atelectasis", 8.0),
        ("effusion", 14.0),
        ("pneumothorax", 9.0),
    )
    """Path length from which a pixel belongs to a region's mask."""

    # ------------------------------------------------------------------------------------------- the record
    infected: tuple[tuple[str, float, float], ...] = (
        ("temperature", 38.4, 0.55),
        ("crp", 4.5, 0.60),
        ("white_cells", 2.63, 0.22),
    )
    """Mean and sd (of the logarithm for CRP and white cells) with infection; without: `quiet`."""
    quiet: tuple[tuple[str, float, float], ...] = (
        ("temperature", 36.9, 0.35),
        ("crp", 1.7, 0.90),
        ("white_cells", 2.0, 0.24),
    )
    missing: float = 0.20


TABLE: Final = Table()


def table_digest() -> str:
    """SHA-256 of the table; two scores with different digests are not comparable."""
    return hashlib.sha256(json.dumps(asdict(TABLE), sort_keys=True).encode()).hexdigest()
