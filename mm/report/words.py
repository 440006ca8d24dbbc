"""The words around a report's sentences, in English and Chinese."""

from typing import Final

from mm import ontology
from mm.batch import Language
from mm.dicom.quality import Flag, QualityCode
from mm.report.schema import InputName, InputUsed, Report, ReportedFinding, Role

LABELS: Final[dict[str, tuple[str, str]]] = {
    "title": ("Chest report", "胸部检查报告"),
    "study": ("Study", "检查"),
    "impression": ("Impression", "印象"),
    "report": ("Report", "报告正文"),
    "findings": ("Findings", "所见"),
    "key_images": ("Key images", "关键图像"),
    "inputs": ("Inputs", "输入资料"),
    "model": ("Model", "模型"),
    "finding": ("Finding", "所见"),
    "side": ("Side", "侧别"),
    "size": ("Size", "大小"),
    "change": ("Change", "变化"),
    "probability": ("Probability", "概率"),
    "evidence": ("Evidence", "依据"),
    "sentence": ("Text", "语句"),
    "absent": ("Looked for, not present", "已检查，未见"),
    "unassessed": ("Not assessed", "未评估"),
    "quality": ("Quality", "图像质量"),
    "none": ("No finding reached its threshold.", "未见达到阈值的异常。"),
    "slice": ("slice", "层"),
    "radiograph": ("radiograph", "X线片"),
    "detail": ("detail", "局部"),
    "window": ("window", "窗"),
    "days_before": ("days before", "天前"),
    "slices": ("slices", "层"),
    "to_text": ("to the sentence", "转到语句"),
    "to_table": ("to the table", "转到表格"),
    "threshold": (
        "Probabilities are calibrated on the data the model was trained with. Sides are the patient's.",
        "概率已按模型的训练数据校准。侧别均指患者侧。",
    ),
    "demonstration": ("demonstration model", "演示模型"),
    "trained": ("trained model", "训练模型"),
    "tag": ("demonstration, out of domain", "演示，超出适用范围"),
    "outside": (
        "Demonstration model, trained on computer-made phantom patients only; this study is outside its domain. "  # noqa: ISC004
        "What follows shows how the program works and says nothing reliable about this patient.",
        "本模型为演示模型，仅用计算机生成的模拟患者训练；本检查不属于其适用范围。以下内容仅演示程序功能，不能可靠反映该患者的情况。",
    ),
    "inside": (
        "Demonstration model on a phantom patient: no real person is described.",
        "演示模型，模拟患者：不涉及真实个人。",
    ),
}

INPUT_NAMES: Final[dict[InputName, tuple[str, str]]] = {
    "volume": ("CT", "CT"),
    "priors": ("Prior CT", "既往CT"),
    "image": ("Chest X-ray", "胸部X线"),
    "audio": ("Chest sounds", "胸部听诊音"),
    "record": ("Clinical record", "临床资料"),
}
REASONS: Final[dict[str, tuple[str, str]]] = {
    "absent": ("not in this study", "本检查无此资料"),
    "no_earlier_study": ("no earlier study in the input", "输入资料中无更早的检查"),
    "not_in_pipeline": ("not read by this pipeline", "当前流程不读取"),
    "record_unreadable": ("the record can't be read", "临床资料无法读取"),
    "record_layout": ("the record has another layout", "临床资料格式不符"),
    "audio_unreadable": ("a sound can't be read", "有听诊音无法读取"),
    "audio_empty": ("a sound is empty", "有听诊音为空"),
    "audio_rate": ("a sound has a rate that isn't read", "有听诊音采样率不支持"),
    "audio_not_finite": ("a sound holds no numbers", "有听诊音数据无效"),
    "low_quality": ("left out by the quality guard", "未通过质量检查，未使用"),
    "broken_slice": ("a series with a broken file was left out", "有文件损坏的序列未使用"),
}
QUALITY: Final[dict[QualityCode, tuple[str, str]]] = {
    "rescaled_twice": ("rescale seems applied twice, soft tissue at {} HU", "疑似重复进行灰度重标定，软组织为{} HU"),
    "not_rescaled": ("rescale seems not applied, soft tissue at {} HU", "疑似未进行灰度重标定，软组织为{} HU"),
    "truncated_view": ("field of view cut off, the body touches {} of its border", "视野截断，身体触及{}的边缘"),
    "few_slices": ("only {} slices", "仅{}层"),
    "short_coverage": ("only {} mm covered", "仅覆盖{} mm"),
    "body_part": ("the header names another body part", "文件头标注为其他部位"),
    "burnt_in": ("text burnt into the pixels", "像素中含有文字标注"),
    "lossy": ("lossy compression", "有损压缩"),
    "private_transfer_syntax": ("private transfer syntax", "私有传输语法"),
    "contrast": ("contrast agent", "使用对比剂"),
}
SIDES: Final[dict[str, tuple[str, str]]] = {"left": ("left", "左侧"), "right": ("right", "右侧"), "none": ("–", "–")}
CHANGES: Final[dict[str, tuple[str, str]]] = {
    "unknown": ("–", "–"),
    "new": ("new", "新发"),
    "larger": ("larger", "增大"),
    "stable": ("stable", "稳定"),
    "smaller": ("smaller", "缩小"),
    "resolved": ("resolved", "已消失"),
}
ROLES: Final[dict[Role, InputName]] = {"volume": "volume", "prior": "priors", "image": "image"}
SITES: Final[dict[str, tuple[str, str]]] = {
    "left_upper": ("left upper", "左上"),
    "right_upper": ("right upper", "右上"),
    "left_lower": ("left lower", "左下"),
    "right_lower": ("right lower", "右下"),
}
WINDOWS: Final[dict[str, tuple[str, str]]] = {
    "lung": ("lung", "肺"),
    "soft tissue": ("soft tissue", "软组织"),
    "bone": ("bone", "骨"),
    "mediastinum": ("mediastinum", "纵隔"),
    "emphysema": ("emphysema", "肺气肿"),
}
MEASUREMENTS: Final[dict[str, tuple[str, str]]] = {
    "temperature": ("temperature", "体温"),
    "heart_rate": ("heart rate", "心率"),
    "respiratory_rate": ("respiratory rate", "呼吸频率"),
    "systolic_pressure": ("systolic pressure", "收缩压"),
    "oxygen_saturation": ("oxygen saturation", "血氧饱和度"),
    "crp": ("CRP", "C反应蛋白"),
    "white_cells": ("white cells", "白细胞"),
    "haemoglobin": ("haemoglobin", "血红蛋白"),
    "creatinine": ("creatinine", "肌酐"),
}
UNITS: Final[dict[str, str]] = {
    "Cel": "°C",
    "mm[Hg]": "mmHg",
    "10*9/L": "10⁹/L",
    "umol/L": "µmol/L",
    "mm3": "mm³",
}


def pick(pair: tuple[str, str], language: Language) -> str:
    """One of (English, Chinese)."""
    return pair[0] if language == "en" else pair[1]


def label(name: str, language: Language) -> str:
    """A label of the page."""
    return pick(LABELS[name], language)


def name(code: str, language: Language) -> str:
    """A finding's name; in English it starts with a capital."""
    kind = ontology.finding(code)
    return kind.en[:1].upper() + kind.en[1:] if language == "en" else kind.zh


def size(finding: ReportedFinding) -> str:
    """Size and unit as printed, or a dash."""
    if finding.size is None:
        return "–"
    number, _, unit = ontology.format_size(finding.code, finding.size.value).partition(" ")
    return f"{number} {UNITS.get(unit, unit)}".strip()


def measurement(told: str, language: Language) -> str:
    """An entry "name value unit" of the record, readable."""
    key, value, unit = (*told.split(" "), "")[:3]
    return f"{pick(MEASUREMENTS.get(key, (key, key)), language)} {value} {UNITS.get(unit, unit)}".strip()


def input_detail(row: InputUsed, report: Report, language: Language) -> str:
    """What was there of one kind of input, or why it wasn't."""
    if not row.used:
        return _reason(row.reason or "absent", language)
    if row.name == "record":
        return " · ".join(measurement(told, language) for told in row.detail) or "–"
    if row.name == "audio":
        sites = ("、" if language == "zh" else ", ").join(
            pick(SITES.get(site, (site, site)), language) for site in row.detail
        )
        return sites if row.reason is None else f"{sites} · {_reason(row.reason, language)}"
    role = {"volume": "volume", "priors": "prior", "image": "image"}[row.name]
    told = [series_facts(report, index, language) for index, item in enumerate(report.series) if item.role == role]
    left_out = [] if row.reason is None else [_reason(row.reason, language)]
    return " · ".join([*told, *left_out])


def _reason(reason: str, language: Language) -> str:
    return pick(REASONS.get(reason, (reason, reason)), language)


def quality_told(report: Report, language: Language) -> str:
    """What the quality guard flags, series by series, or "" where it flags nothing."""
    told = []
    for item in report.series:
        if item.quality.flags:
            words = ("、" if language == "zh" else ", ").join(_flag(flag, language) for flag in item.quality.flags)
            told.append(f"{pick(INPUT_NAMES[ROLES[item.role]], language)}{'：' if language == 'zh' else ': '}{words}")
    return ("；" if language == "zh" else "; ").join(told)


def _flag(flag: Flag, language: Language) -> str:
    number = "" if flag.measured is None else f"{flag.measured:.0f}"
    if flag.code == "truncated_view" and flag.measured is not None:
        number = f"{flag.measured:.0%}"
    return pick(QUALITY[flag.code], language).format(number)


def series_facts(report: Report, index: int, language: Language) -> str:
    """Acquisition facts of one series."""
    item = report.series[index]
    gap = "" if language == "zh" else " "
    if item.role == "prior":
        slices = f"{item.num_slices}{gap}{label('slices', language)}"
        return f"{item.days_before}{gap}{label('days_before', language)} ({slices})"
    facts = [item.modality]
    if item.role == "volume":
        facts.append(f"{item.num_slices}{gap}{label('slices', language)}")
    if item.spacing_mm:
        facts.append(" × ".join(f"{step:.2f}" for step in item.spacing_mm) + " mm")
    if item.units == "HU":
        facts.append("HU")
    if item.manufacturer:
        facts.append(item.manufacturer)
    return ", ".join(facts)
