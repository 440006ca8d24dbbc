"""What can be found in a chest study, as data: codes, names, sides, measures, sources.

Everything else in the package reads this file and it imports nothing of ours. The order of `FINDINGS` is
the order of the finding axis `K` in every tensor; the order of `MEASUREMENTS` is the order of the record
axis `R`. Both are sealed into a checkpoint by `digest()`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Final, Literal

Source = Literal["volume", "image", "audio", "record"]
"""The modality a fact can be seen in. Priors are earlier volumes and carry no source of their own."""

Side = Literal["none", "left", "right"]
"""The patient's side. Bilateral disease is two instances, one a side."""

Change = Literal["unknown", "new", "larger", "stable", "smaller", "resolved"]
"""Against the last prior; a difference of 20 % or more in the finding's measure is a change."""

Grade = Literal["none", "small", "moderate", "large"]

SOURCES: Final[tuple[Source, ...]] = ("volume", "image", "audio", "record")
SIDES: Final[tuple[Side, ...]] = ("none", "left", "right")
CHANGES: Final[tuple[Change, ...]] = ("unknown", "new", "larger", "stable", "smaller", "resolved")
GRADES: Final[tuple[Grade, ...]] = ("none", "small", "moderate", "large")
MAX_INSTANCES: Final = 8


@dataclass(frozen=True)
class Measure:
    """How large a finding is.

    Attributes:
        name: What is measured.
        unit: UCUM-like unit printed behind the number; empty for a ratio.
        low: Smallest value that the head may report.
        high: Largest value that the head may report.
        moderate: From here on the finding is graded moderate.
        large: From here on the finding is graded large.
        decimals: Decimals printed.
    """

    name: str
    unit: str
    low: float
    high: float
    moderate: float
    large: float
    decimals: int = 0


@dataclass(frozen=True)
class Finding:
    """One kind of finding.

    Attributes:
        code: Stable identifier, used in every file we write.
        en: English name, lower case.
        zh: Chinese name.
        synonyms_en: Other English words a report may use (lower case; the labeler reads them).
        synonyms_zh: Other Chinese words a report may use.
        sources: The modalities that can show it; the head reads no other.
        focal: True where it has a place (a heat map on the volume or the image).
        sided: True where it is on the left or the right.
        separation_mm: Two peaks of the heat map nearer than this are one instance.
        followed: True where it is compared with the last prior.
        measure: How large it is; None where it has no size.
    """

    code: str
    en: str
    zh: str
    synonyms_en: tuple[str, ...]
    synonyms_zh: tuple[str, ...]
    sources: tuple[Source, ...]
    focal: bool
    sided: bool
    separation_mm: float
    followed: bool
    measure: Measure | None


FINDINGS: Final[tuple[Finding, ...]] = (
    Finding(
        "nodule",
        "nodule",
        "结节",
        ("nodules", "nodular opacity", "nodular opacities", "pulmonary nodule", "rounded opacity"),
        ("肺结节", "小结节", "结节影", "类圆形影"),
        ("volume", "image"),
        focal=True,
        sided=True,
        separation_mm=16.0,
        followed=True,
        measure=Measure("diameter", "mm", 3.0, 60.0, moderate=8.0, large=20.0),
    ),
    Finding(
        "consolidation",
        "consolidation",
        "实变",
        ("airspace opacity", "airspace consolidation", "consolidative opacity", "air-space disease"),
        ("肺实变", "实变影", "气腔实变"),
        ("volume", "image"),
        focal=True,
        sided=True,
        separation_mm=80.0,
        followed=True,
        measure=Measure("volume", "ml", 2.0, 400.0, moderate=30.0, large=90.0),
    ),
    Finding(
        "atelectasis",
        "atelectasis",
        "肺不张",
        ("volume loss", "collapse", "atelectatic opacity", "subsegmental collapse"),
        ("膨胀不全", "肺膨胀不全", "容积缩小"),
        ("volume", "image"),
        focal=True,
        sided=True,
        separation_mm=80.0,
        followed=True,
        measure=Measure("volume", "ml", 2.0, 400.0, moderate=30.0, large=90.0),
    ),
    Finding(
        "effusion",
        "pleural effusion",
        "胸腔积液",
        ("effusion", "pleural fluid", "fluid in the pleural space", "hydrothorax"),
        ("胸水", "胸膜腔积液", "积液"),
        ("volume", "image"),
        focal=True,
        sided=True,
        separation_mm=120.0,
        followed=True,
        measure=Measure("volume", "ml", 10.0, 3000.0, moderate=250.0, large=800.0),
    ),
    Finding(
        "pneumothorax",
        "pneumothorax",
        "气胸",
        ("pleural air", "air in the pleural space", "collapsed lung with pleural air"),
        ("胸膜腔积气", "胸腔积气"),
        ("volume", "image"),
        focal=True,
        sided=True,
        separation_mm=120.0,
        followed=True,
        measure=Measure("share of the hemithorax", "%", 1.0, 90.0, moderate=10.0, large=25.0),
    ),
    Finding(
        "cardiomegaly",
        "cardiomegaly",
        "心脏增大",
        ("enlarged heart", "enlarged cardiac silhouette", "cardiac enlargement"),
        ("心影增大", "心脏扩大", "心影扩大"),
        ("volume", "image"),
        focal=True,
        sided=False,
        separation_mm=400.0,
        followed=False,
        measure=Measure("cardiothoracic ratio", "", 0.30, 0.80, moderate=0.55, large=0.60, decimals=2),
    ),
    Finding(
        "emphysema",
        "emphysema",
        "肺气肿",
        ("emphysematous change", "emphysematous changes", "parenchymal destruction"),
        ("肺气肿改变", "气肿性改变"),
        ("volume",),
        focal=True,
        sided=False,
        separation_mm=400.0,
        followed=False,
        measure=Measure("LAA-950", "%", 0.0, 60.0, moderate=12.0, large=22.0),
    ),
    Finding(
        "rib_fracture",
        "rib fracture",
        "肋骨骨折",
        ("fractured rib", "broken rib", "cortical step of a rib", "fracture of a rib"),
        ("骨折", "肋骨断裂", "肋骨皮质不连续"),
        ("volume", "image"),
        focal=True,
        sided=True,
        separation_mm=40.0,
        followed=False,
        measure=Measure("step", "mm", 0.5, 15.0, moderate=2.5, large=4.0),
    ),
    Finding(
        "calcification",
        "arterial calcification",
        "动脉钙化",
        ("coronary calcification", "aortic calcification", "calcified plaque", "vascular calcification"),
        ("血管钙化", "冠状动脉钙化", "主动脉钙化", "钙化斑块"),
        ("volume",),
        focal=True,
        sided=False,
        separation_mm=24.0,
        followed=False,
        measure=Measure("volume", "mm3", 2.0, 2000.0, moderate=50.0, large=150.0),
    ),
    Finding(
        "airflow_obstruction",
        "airflow obstruction",
        "气流受限",
        ("obstructive airways", "bronchial obstruction", "obstructed airflow"),
        ("气道阻塞", "气流阻塞"),
        ("audio",),
        focal=False,
        sided=False,
        separation_mm=0.0,
        followed=False,
        measure=None,
    ),
    Finding(
        "infection",
        "infection",
        "感染",
        ("pneumonia", "infectious process", "infective process"),
        ("肺炎", "感染性病变"),
        ("volume", "image", "record"),
        focal=False,
        sided=False,
        separation_mm=0.0,
        followed=False,
        measure=None,
    ),
)

CODES: Final[tuple[str, ...]] = tuple(finding.code for finding in FINDINGS)
INDEX: Final[dict[str, int]] = {code: index for index, code in enumerate(CODES)}


@dataclass(frozen=True)
class Measurement:
    """One number of the clinical record, in a canonical unit.

    Attributes:
        name: Key in record.json.
        unit: Canonical unit.
        units: Factor and offset that turn a value in another unit into the canonical one
            (canonical = value * factor + offset).
        mean: Population mean used to standardise.
        sd: Population standard deviation used to standardise.
        log: True where the logarithm of the value is standardised (mean and sd are of the logarithm).
    """

    name: str
    unit: str
    units: tuple[tuple[str, float, float], ...]
    mean: float
    sd: float
    log: bool = False


MEASUREMENTS: Final[tuple[Measurement, ...]] = (
    Measurement("age", "a", (("y", 1.0, 0.0), ("years", 1.0, 0.0), ("mo", 1 / 12, 0.0)), 60.0, 15.0),
    Measurement(
        "temperature", "Cel", (("C", 1.0, 0.0), ("F", 5 / 9, -160 / 9), ("[degF]", 5 / 9, -160 / 9)), 37.0, 0.8
    ),
    Measurement("heart_rate", "/min", (("bpm", 1.0, 0.0),), 80.0, 15.0),
    Measurement("respiratory_rate", "/min", (("bpm", 1.0, 0.0),), 17.0, 4.0),
    Measurement("systolic_pressure", "mm[Hg]", (("mmHg", 1.0, 0.0), ("kPa", 7.50062, 0.0)), 130.0, 18.0),
    Measurement("oxygen_saturation", "%", (("1", 100.0, 0.0),), 96.0, 2.5),
    Measurement("crp", "mg/L", (("mg/dL", 10.0, 0.0),), 2.0, 1.3, log=True),
    Measurement(
        "white_cells", "10*9/L", (("10^9/L", 1.0, 0.0), ("10*3/uL", 1.0, 0.0), ("/uL", 1e-3, 0.0)), 2.1, 0.35, log=True
    ),
    Measurement("haemoglobin", "g/dL", (("g/L", 0.1, 0.0),), 13.5, 1.6),
    Measurement("creatinine", "umol/L", (("mg/dL", 88.42, 0.0),), 4.4, 0.35, log=True),
)
MEASUREMENT_INDEX: Final[dict[str, int]] = {item.name: index for index, item in enumerate(MEASUREMENTS)}

SOUND_SITES: Final[tuple[str, ...]] = ("left_upper", "right_upper", "left_lower", "right_lower")
SOUND_RATE: Final = 8000


def finding(code: str) -> Finding:
    """The finding of a code.

    Raises:
        ValueError: The code is unknown; the message lists the known ones.
    """
    if code not in INDEX:
        raise ValueError(f"unknown finding code {code!r}; known: {', '.join(CODES)}")
    return FINDINGS[INDEX[code]]


def grade(code: str, size: float | None) -> Grade:
    """Small, moderate or large by the finding's measure; "none" where there is no size."""
    measure = finding(code).measure
    if measure is None or size is None:
        return "none"
    return "large" if size >= measure.large else "moderate" if size >= measure.moderate else "small"


def format_size(code: str, size: float) -> str:
    """A size as a report prints it, for example `12 mm`, `0.55` or `140 ml`.

    Raises:
        ValueError: The finding has no measure.
    """
    measure = finding(code).measure
    if measure is None:
        raise ValueError(f"{code} has no measure")
    return f"{size:.{measure.decimals}f} {measure.unit}".strip()


def digest() -> str:
    """SHA-256 over all of the above; a checkpoint trained on another ontology is refused."""
    content = [[asdict(item) for item in FINDINGS], [asdict(item) for item in MEASUREMENTS], SOUND_SITES, SOUND_RATE]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
