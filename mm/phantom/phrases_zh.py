"""What Chinese report sentences are made of; the counterpart of `phrases_en`, with the same rules.

No frame of a present finding holds 无, 未 or 不: a rule labeler would read a negation.
"""

from typing import Final

from mm.ontology import Change, Grade

FRAMES: Final[dict[Change, tuple[str, ...]]] = {
    "unknown": (
        "{place}见{grade}{noun}{size}。",
        "{place}可见{grade}{noun}{size}。",
        "{place}存在{grade}{noun}{size}。",
        "检查示{place}{grade}{noun}{size}。",
        "{place}显示{grade}{noun}{size}。",
    ),
    "new": (
        "{place}新出现{grade}{noun}{size}。",
        "{place}见新发{grade}{noun}{size}。",
        "与前次相比，{place}新增{grade}{noun}{size}。",
        "{place}{grade}{noun}为新发{size}。",
        "{place}新见{grade}{noun}{size}。",
    ),
    "larger": (
        "{place}{grade}{noun}较前{grow}{size}。",
        "{place}{grade}{noun}{grow}{size}。",
        "与前次相比，{place}{grade}{noun}{grow}{size}。",
        "{place}见{grade}{noun}，较前{grow}{size}。",
        "{place}{grade}{noun}较前进展{size}。",
    ),
    "stable": (
        "{place}{grade}{noun}较前相仿{size}。",
        "{place}{grade}{noun}稳定{size}。",
        "与前次相比，{place}{grade}{noun}相仿{size}。",
        "{place}见{grade}{noun}，同前{size}。",
        "{place}{grade}{noun}保持稳定{size}。",
    ),
    "smaller": (
        "{place}{grade}{noun}较前{shrink}{size}。",
        "{place}{grade}{noun}{shrink}{size}。",
        "与前次相比，{place}{grade}{noun}{shrink}{size}。",
        "{place}见{grade}{noun}，较前{shrink}{size}。",
        "{place}{grade}{noun}较前好转{size}。",
    ),
    "resolved": (
        "{place}{noun}已消失。",
        "{place}{noun}已吸收。",
        "前次所见{place}{noun}已消失。",
        "与前次相比，{place}{noun}已消退。",
        "{place}{noun}已完全消失。",
    ),
}
"""The last frame of each change is held out for the split "test"."""

COMPARISONS: Final = (
    "与<days>前检查对比。",
    "对比检查：<days>前。",
    "参考<days>前的检查。",
    "前次检查为<days>前。",
    "结合<days>前检查比较。",
)
NORMALS: Final = (
    "其余结构未见异常。",
    "余未见明显异常。",
    "其余所见正常。",
    "其他部位未见异常。",
    "余无特殊。",
)
IMPRESSIONS: Final = (
    "印象：<findings>。",
    "结论：<findings>。",
    "诊断意见：<findings>。",
    "综上：<findings>。",
    "总结：<findings>。",
)

NOUNS: Final[dict[str, tuple[str, ...]]] = {
    "nodule": ("结节", "结节影", "类圆形影"),
    "consolidation": ("实变", "实变影", "气腔实变"),
    "atelectasis": ("肺不张", "膨胀不全"),
    "effusion": ("胸腔积液", "胸水"),
    "pneumothorax": ("气胸", "胸腔积气"),
    "cardiomegaly": ("心脏增大", "心影增大"),
    "emphysema": ("肺气肿", "气肿性改变"),
    "rib_fracture": ("肋骨骨折", "肋骨断裂"),
    "calcification": ("动脉钙化", "血管钙化", "钙化斑块"),
    "airflow_obstruction": ("气流受限", "气道阻塞"),
    "infection": ("感染", "肺炎", "感染性病变"),
}

_SEVERITY: Final[dict[Grade, str]] = {"none": "", "small": "轻度", "moderate": "中度", "large": "重度"}
_AMOUNT: Final[dict[Grade, str]] = {"none": "", "small": "少量", "moderate": "中等量", "large": "大量"}
_RANGE: Final[dict[Grade, str]] = {"none": "", "small": "小范围", "moderate": "中等范围", "large": "大范围"}
GRADES: Final[dict[str, dict[Grade, str]]] = {
    "nodule": {"none": "", "small": "小", "moderate": "中等大小", "large": "较大"},
    "consolidation": _RANGE,
    "atelectasis": _RANGE,
    "effusion": _AMOUNT,
    "pneumothorax": _AMOUNT,
    "cardiomegaly": _SEVERITY,
    "emphysema": _SEVERITY,
    "rib_fracture": {"none": "", "small": "轻度错位", "moderate": "中度错位", "large": "明显错位"},
    "calcification": _SEVERITY,
    "airflow_obstruction": {"none": "", "small": "", "moderate": "", "large": ""},
    "infection": {"none": "", "small": "", "moderate": "", "large": ""},
}

SIZES: Final[dict[str, str]] = {
    "nodule": "，直径<size>",
    "consolidation": "，体积约<size>",
    "atelectasis": "，体积约<size>",
    "effusion": "，量约<size>",
    "pneumothorax": "，占该侧<size>",
    "cardiomegaly": "，心胸比<size>",
    "emphysema": "，累及肺的<size>",
    "rib_fracture": "，错位<size>",
    "calcification": "，体积<size>",
}

LUNG: Final = "<side>肺"
ELSEWHERE: Final = "<side>侧"
IN_LUNG: Final = frozenset({"nodule", "consolidation", "atelectasis"})
FLUID: Final = frozenset({"effusion", "pneumothorax"})
"""What grows in amount (增多) rather than in extent (增大)."""


def compose(frame: str, *, code: str, noun: str, grade: Grade, sided: bool, leading: bool) -> str:
    """One template; the arguments are those of `phrases_en.compose` (`leading` chooses 肺 or 侧 for the lung)."""
    place = "" if not sided else LUNG if code in IN_LUNG and leading else ELSEWHERE
    word = GRADES[code][grade]
    text = frame.replace("{grow}", "增多" if code in FLUID else "增大")
    text = text.replace("{shrink}", "减少" if code in FLUID else "缩小")
    text = text.replace("{size}", SIZES[code] if grade != "none" else "")
    text = text.replace("{place}", place).replace("{grade}", word).replace("{noun}", noun)
    # 左肺 + 肺不张 is said 左肺不张, which still holds the name.
    return text.replace("肺肺", "肺")
