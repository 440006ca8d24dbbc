import pytest

from mm.batch import DetectedFinding, FindingTruth
from mm.report.text import fill, impression


def detected(code="nodule", *, side="left", size=12.3, present=True):
    return DetectedFinding(code, present, 0.9, side, (1.0, 2.0, 3.0), None, size, "new")


def test_numbers_and_sides_are_copied():
    item = detected()
    text = fill("a <side> nodule of <size> is seen.", finding=item, findings=(item,), days=None, language="en")
    assert text == "A left nodule of 12 mm is seen."
    chinese = fill("<side>肺见结节，直径<size>。", finding=item, findings=(item,), days=None, language="zh")
    assert chinese == "左肺见结节，直径12 mm。"


def test_a_truth_and_a_detection_read_the_same():
    found = detected()
    truth = FindingTruth("nodule", True, "left", (0.0, 0.0, 0.0), None, 12.3, "new", ("volume",))
    for sentence in ("<side> nodule of <size>.", "impression: <findings>."):
        texts = {fill(sentence, finding=x, findings=(x,), days=None, language="en") for x in (found, truth)}
        assert len(texts) == 1


@pytest.mark.parametrize(("days", "text"), [(1.0, "1 day"), (44.6, "45 days"), (None, "an unknown time")])
def test_days(days, text):
    filled = fill("compared with <days> ago.", finding=None, findings=(), days=days, language="en")
    assert filled == f"Compared with {text} ago."


def test_what_is_not_known_is_not_made_up():
    item = detected(side="none", size=None)
    filled = fill("a <side> nodule of <size> on the <side>.", finding=item, findings=(), days=None, language="en")
    assert filled == "A nodule of unmeasured size."
    none = fill("a nodule in the <side> lung, <size>.", finding=None, findings=(), days=None, language="en")
    assert none == "A nodule, unmeasured size."
    assert (
        fill("<side>侧气胸，占该侧<size>。", finding=item, findings=(), days=None, language="zh")
        == "气胸，占该侧大小未测。"
    )


def test_impression_names_each_present_finding_once_in_ontology_order():
    items = [detected("effusion"), detected("nodule"), detected("nodule"), detected("emphysema", present=False)]
    assert impression(items, "en") == "nodule and pleural effusion"
    assert impression([*items, detected("infection", size=None)], "en") == "nodule, pleural effusion and infection"
    assert impression(items, "zh") == "结节、胸腔积液"
    assert impression([], "en") == "no abnormality"
    assert impression([], "zh") == "未见异常"
