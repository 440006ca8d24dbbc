import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import get_args

import numpy as np
import pytest

from mm import ontology
from mm.dicom.quality import Flag, Quality, QualityCode
from mm.report.html import to_html
from mm.report.json import from_json, to_json
from mm.report.markdown import to_markdown
from mm.report.schema import (
    InputUsed,
    KeyImage,
    ModelIdentity,
    Report,
    ReportedFinding,
    ReportedSentence,
    SeriesUsed,
    Size,
)
from mm.report.words import QUALITY


def finding(
    code: str, *, present: bool = True, side: str = "left", size: float | None = None, **options
) -> ReportedFinding:
    measure = ontology.finding(code).measure
    full = None if size is None or measure is None else Size(size, measure.unit)
    fields = {
        "center_mm": None,
        "slice_index": None,
        "sop_instance_uid": None,
        "image_pixel": None,
        "change": "unknown",
    }
    return ReportedFinding(
        code=code, present=present, probability=0.75, side=side, size=full,
        size_mm=size if full and full.unit == "mm" else None, grade=ontology.grade(code, size),
        **{**fields, "sources": ("volume",), **options},
    )  # fmt: skip


def key_image(index: int) -> KeyImage:
    pixels = np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8)
    return KeyImage(index, pixels, (20.0, 30.0), 4.0, 1.5, "lung", (-600, 1500), (8, 60), ("R", "L", "A", "P"))


@pytest.fixture
def report() -> Report:
    findings = (
        finding(
            "nodule", size=12.3, change="new", center_mm=(1.5, -2.0, 3.0), slice_index=7, sop_instance_uid="2.25.1"
        ),
        finding("nodule", size=8.0, center_mm=(1.5, -2.0, 9.0), slice_index=7, sop_instance_uid="2.25.1"),
        finding("effusion", present=False, change="resolved", side="right"),
        finding("emphysema", present=False, side="none"),
        finding("airflow_obstruction", present=False, side="none", sources=()),
    )
    sentences = tuple(
        ReportedSentence(language, kind, text, index, -0.5)
        for language, words in (("en", ("A nodule.", "Impression: nodule.")), ("zh", ("结节。", "印象：结节。")))
        for kind, text, index in (("finding", words[0], 0), ("finding", words[0], 1), ("impression", words[1], None))
    )
    return Report(
        study="0123456789abcdef",
        model=ModelIdentity("default", "demonstration", "ab" * 32, "cd" * 32, "outside"),
        series=(
            SeriesUsed("volume", "CT", 60, (2.5, 0.7, 0.7), "GE <b>&", "HU"),
            SeriesUsed("prior", "CT", 58, None, "GE", "HU", 90),
        ),
        inputs=(
            InputUsed("volume", True, None, 1),
            InputUsed("priors", True, None, 1),
            InputUsed("image", False, "absent"),
            InputUsed("audio", True, None, 1, ("left_upper",)),
            InputUsed("record", True, None, 1, ("temperature 38.2 Cel",)),
        ),
        findings=findings,
        sentences=sentences,
        evidence=(key_image(0), key_image(1)),
    )


class Links(HTMLParser):
    """Names, links, and whether every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.outside: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta", "input"}:
            self.open.append(tag)
        self._attributes(dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self._attributes(dict(attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def _attributes(self, attrs):
        if "id" in attrs:
            self.ids.append(attrs["id"])
        for name in ("href", "src"):
            if name in attrs:
                (self.targets if attrs[name].startswith("#") else self.outside).append(attrs[name])


def test_round_trip(report):
    text = to_json(report)
    assert from_json(text) == replace(report, evidence=())
    assert to_json(from_json(text)) == text


def test_quality_is_one_line_where_something_is_flagged(report):
    assert "Quality" not in to_html(report)
    assert "Quality" not in to_markdown(report)
    flags = (Flag("truncated_view", 0.345, 0.15), Flag("short_coverage", 120.0, 150.0, "mm"), Flag("contrast"))
    first = replace(report.series[0], quality=Quality(flags, -1001.0, 42.0, 0.345, 120.0))
    flagged = replace(report, series=(first, *report.series[1:]))
    assert from_json(to_json(flagged)) == replace(flagged, evidence=())
    line = "CT: field of view cut off, the body touches 34% of its border, only 120 mm covered, contrast agent"
    assert line in to_html(flagged)
    assert "CT：视野截断，身体触及34%的边缘、仅覆盖120 mm、使用对比剂" in to_html(flagged)
    assert f"Quality: {line}" in to_markdown(flagged)
    content = json.loads(to_json(report))
    for series in content["series"]:
        del series["quality"]
    assert from_json(json.dumps(content)) == replace(report, evidence=())


def test_every_quality_code_has_words():
    assert set(QUALITY) == set(get_args(QualityCode))


def test_other_schema_is_refused(report):
    with pytest.raises(ValueError, match="schema must be 'mm-report/1', got 'mm-report/0'"):
        from_json(to_json(report).replace("mm-report/1", "mm-report/0"))


def test_a_sentence_must_name_a_finding_that_is_there(report):
    with pytest.raises(ValueError, match="finding 9"):
        replace(report, sentences=(ReportedSentence("en", "finding", "x", 9, 0.0),))


def test_page_is_whole_and_alone(report):
    page = to_html(report)
    links = Links(page)
    assert links.open == []
    assert len(set(links.ids)) == len(links.ids)
    assert {target[1:] for target in links.targets} <= set(links.ids)
    assert all(target.startswith("data:image/png;base64,") for target in links.outside)
    assert len(links.outside) == 1  # the two findings share a picture
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert page == to_html(report)


def test_sentences_and_findings_lead_to_each_other(report):
    targets = Links(to_html(report)).targets
    for index in (0, 1):
        assert f"#f{index}" in targets
        assert f"#k{index}" in targets
    assert {"#s0", "#s1", "#s3", "#s4"} <= set(targets)


def test_what_the_page_says(report):
    page = to_html(report)
    for text in (
        "not a medical device", "不是医疗器械", "outside its domain", "GE &lt;b&gt;&amp;", "slice 8 of 60", "12 mm",
        "38.2 °C",
        "Looked for, not present", "Not assessed", "0123456789abcdef", "ab" * 32, "C −600 W 1500", "90 days before",
    ):  # fmt: skip
        assert text in page
    assert "GE <b>" not in page
    inside = to_html(replace(report, model=replace(report.model, domain="inside")))
    assert "outside its domain" not in inside


def test_one_language_needs_no_switch(report):
    english = replace(report, sentences=report.sentences[:3])
    page = to_html(english)
    assert "胸部" not in page
    assert 'for="lang-' not in page.split("</style>")[1]


def test_markdown(report):
    text = to_markdown(report)
    rows = re.findall(r"^\| \d+ \|.*$", text, re.MULTILINE)
    assert rows == [
        "| 1 | Nodule | left | 12 mm | new | 0.75 | 8 |",
        "| 2 | Nodule | left | 8 mm | – | 0.75 | 8 |",
        "| 3 | Pleural effusion | right | – | resolved | 0.75 | – |",
    ]
    assert "not a medical device" in text
    assert "GE \\<b\\>&" in text


def test_nothing_found(report):
    empty = replace(report, findings=(), sentences=(), evidence=(), series=())
    page = to_html(empty)
    assert Links(page).open == []
    assert "No finding reached its threshold." in page
    assert "No finding reached its threshold." in to_markdown(empty)
