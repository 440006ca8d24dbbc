import itertools

import numpy as np
import pytest

from mm import ontology
from mm.batch import FindingTruth
from mm.evaluation.labels import labels
from mm.phantom.text import filled, finding_templates, report, summary_templates, unmeasured
from mm.report.text import fill


def size_of(code, grade):
    measure = ontology.finding(code).measure
    if measure is None:
        return None
    return {"none": None, "small": measure.low, "moderate": measure.moderate, "large": measure.large}[grade]


def situations():
    for kind in ontology.FINDINGS:
        changes = ontology.CHANGES if kind.followed else ("unknown",)
        grades = ontology.GRADES if kind.measure else ("none",)
        sides = (False, True) if kind.sided else (False,)
        yield from itertools.product([kind], changes, grades, sides)


def truth(kind, change, grade, sided, side="left"):
    present = change != "resolved"
    return FindingTruth(
        kind.code, present, side if sided else "none", None, None, size_of(kind.code, grade), change, kind.sources
    )


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_rule_labeler_reads_every_template(language):
    for kind, change, grade, sided in situations():
        item = truth(kind, change, grade, sided)
        for template in finding_templates(language, kind.code, change, grade, sided=sided):
            text = fill(template.text, finding=item, findings=(item,), days=None, language=language)
            read = {code: status for code, status in labels(text, language).items() if status != "absent"}
            expected = {} if change == "resolved" else {kind.code: "present"}
            if change == "resolved":
                assert read in ({}, {kind.code: "resolved"}), (template.id, text)
                names = (kind.en, *kind.synonyms_en) if language == "en" else (kind.zh, *kind.synonyms_zh)
                assert any(name in text.lower() for name in names)
            else:
                assert read == expected, (template.id, text)
            assert "<" not in text
            assert "{" not in text
            assert "  " not in text


@pytest.mark.parametrize("language", ["en", "zh"])
def test_templates_mention_size_and_side_where_known(language):
    for kind, change, grade, sided in situations():
        for template in finding_templates(language, kind.code, change, grade, sided=sided):
            assert ("<side>" in template.text) == sided, template
            assert ("<size>" in template.text) == (grade != "none" and change != "resolved"), template
            assert not any(letter.isdigit() for letter in template.text), template


@pytest.mark.parametrize("language", ["en", "zh"])
def test_five_paraphrases_and_a_fifth_held_out(language):
    ids = []
    for kind, change, grade, sided in situations():
        templates = finding_templates(language, kind.code, change, grade, sided=sided)
        assert len({template.text for template in templates}) >= 5, (kind.code, change, grade)
        held = sum(template.split == "test" for template in templates)
        assert held / len(templates) == pytest.approx(0.2)
        train = {template.text for template in templates if template.split == "train"}
        assert not train & {template.text for template in templates if template.split == "test"}
        ids += [(template.id, grade, sided) for template in templates]
    assert len(set(ids)) == len(ids)
    for kind in ("comparison", "normal", "impression"):
        assert [template.split for template in summary_templates(language, kind)].count("test") == 1


def test_grade_words_follow_the_grade():
    small = finding_templates("en", "effusion", "new", "small", sided=True)
    none = finding_templates("en", "effusion", "new", "none", sided=True)
    assert all("small" in template.text for template in small)
    assert not any(word in template.text for template in none for word in ("small", "moderate", "large"))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_report_order_and_indices(language):
    kinds = {kind.code: kind for kind in ontology.FINDINGS}
    findings = (
        truth(kinds["nodule"], "new", "small", True),
        truth(kinds["effusion"], "resolved", "none", True, "right"),
        truth(kinds["emphysema"], "unknown", "large", False),
    )
    sentences = report(findings, language=language, days=30.0, split="train", rng=np.random.default_rng(0))
    assert [item.kind for item in sentences] == ["comparison", *["finding"] * 3, "normal", "impression"]
    assert [item.finding for item in sentences] == [None, 0, 2, 1, None, None]
    text = filled(sentences, findings, days=30.0, language=language)
    read = labels(text, language)
    assert {code for code, status in read.items() if status == "present"} == {"nodule", "emphysema"}
    assert "30" in text
    again = report(findings, language=language, days=30.0, split="train", rng=np.random.default_rng(0))
    assert again == sentences


def test_train_never_draws_a_held_out_template():
    held = {template.text for template in summary_templates("en", "normal") if template.split == "test"}
    drawn = {"train": set(), "test": set()}
    for split in ("train", "test"):
        for seed in range(60):
            sentences = report((), language="en", days=None, split=split, rng=np.random.default_rng(seed))
            drawn[split].add(sentences[0].text)
    assert not drawn["train"] & held
    assert held <= drawn["test"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_an_unmeasured_finding_is_told_without_size_and_grade(language):
    findings = [
        truth(kind, change, grade, sided) for kind, change, grade, sided in situations() if change != "resolved"
    ]
    told = report(findings, language=language, days=40.0, split="train", rng=np.random.default_rng(0))
    options = {"language": language, "split": "train"}
    assert unmeasured(told, findings, share=0.0, rng=np.random.default_rng(1), **options) == told
    every = unmeasured(told, findings, share=1.0, rng=np.random.default_rng(1), **options)
    for before, sentence in zip(told, every, strict=True):
        if sentence.finding is None:
            assert sentence == before
            continue
        item = findings[sentence.finding]
        known = finding_templates(language, item.code, item.change, "none", sided=item.side != "none")
        assert sentence.text in {template.text for template in known if template.split == "train"}
        assert (sentence.kind, sentence.finding, sentence.measured) == (before.kind, before.finding, False)
    some = unmeasured(told, findings, share=0.1, rng=np.random.default_rng(1), **options)
    assert sum(not sentence.measured for sentence in some) / len(findings) == pytest.approx(0.1, abs=0.05)
