import numpy as np
import pytest

from mm import ontology
from mm.evaluation.audits import MEASURES, audit, drop_finding, negate, scale_size, sides_said, swap_side
from mm.evaluation.labels import labels
from mm.phantom.dataset import PhantomDataset


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "A 12 mm nodule in the left lung.", "No 12 mm nodule in the left lung."),
        ("en", "Heart normal. There is a small left effusion.", "Heart normal. There is no small left effusion."),
        ("en", "A ratio of 0.57. Mild emphysema.", "A ratio of 0.57. No mild emphysema."),
        ("en", "Plaque of 66 mm3. Moderate effusion.", "Plaque of 66 mm3. No moderate effusion."),
        ("en", "No pneumothorax. Possible nodule.", "No pneumothorax. Possible nodule."),
        ("zh", "左肺可见12mm结节。未见气胸。", "左肺未见结节。未见气胸。"),
        ("zh", "左肺可见结节。", "左肺未见结节。"),
    ],
)  # fmt: skip
def test_negate(language, text, expected):
    if "12mm" not in text:
        assert negate(text, language) == expected
    assert "present" not in labels(negate(text, language), language).values()


def test_swap_side_is_its_own_inverse():
    text = "Left lung; a nodule on the right, upright, RIGHT. 左肺，右肺。"
    assert swap_side("Left lung, right hilum, leftover. 左肺") == "Right lung, left hilum, leftover. 右肺"
    assert swap_side(swap_side(text)) == text.replace("RIGHT", "Right")


def test_only_sizes_are_scaled():
    text = "A 12 mm nodule and 1.5-cm mass, 250 ml, 40 mm3, 8%, seen 30 days ago. 结节12mm，T4."
    assert scale_size(text, 2.0) == (
        "A 24 mm nodule and 3.0-cm mass, 500 ml, 80 mm3, 16%, seen 30 days ago. 结节24mm，T4."
    )


def test_drop_finding_drops_all_that_asserts_it():
    text = "A nodule of 1.5 mm. No effusion.\nImpression: nodule and consolidation. Heart normal."
    assert drop_finding(text, "en") == "No effusion.\nHeart normal."
    assert drop_finding("No nodule.", "en") == "No nodule."
    assert drop_finding("右肺结节。未见积液。", "zh") == "未见积液。"


@pytest.fixture(scope="module")
def reports():
    patients = PhantomDataset(studies=12, seed=5, split="test", priors=0)
    return [patients[index].text for index in range(12)]


def test_altered_reports_of_patients(reports):
    for text in reports:
        assert "present" not in labels(negate(text, "en"), "en").values()
        asserted = [code for code in ontology.CODES if labels(text, "en")[code] == "present"]
        left = [code for code in ontology.CODES if labels(drop_finding(text, "en"), "en")[code] == "present"]
        assert set(left) < set(asserted) or not asserted
        assert labels(swap_side(text), "en") == labels(text, "en") == labels(scale_size(text), "en")


def test_which_measures_notice(reports):
    table = audit(reports, reports, "en", rounds=50)
    assert set(table) == {"negate", "swap side", "scale size", "drop finding"}
    noticed = {(name, title): item.noticed for name, row in table.items() for title, item in row.items()}
    full = {"CIDEr-D": 10.0}  # METEOR takes a little off for the one run of words that a whole text is
    for title, item in table["negate"].items():
        assert item.before == pytest.approx(full.get(title, 1.0), abs=1e-3 if title == "METEOR" else 1e-9)
    # Findings denied or left out are seen by the labeler alone for certain; sides and sizes only by reading facts.
    assert noticed["negate", "finding F1"]
    assert noticed["drop finding", "finding F1"]
    assert not noticed["swap side", "finding F1"]
    assert not noticed["scale size", "finding F1"]
    assert noticed["swap side", "side F1"]
    assert noticed["scale size", "number F1"]
    assert not noticed["swap side", "number F1"]
    assert not noticed["scale size", "side F1"]
    assert not noticed["negate", "number F1"]
    assert table["negate"]["finding F1"].after == 0
    assert table["negate"]["ROUGE-L"].after > 0.8


def test_measures_by_hand():
    def score(name, text, reference, language="en"):
        measure = MEASURES[name]
        return measure.total(measure.rows([text], [reference], language))

    for name in ("finding F1", "side F1", "number F1"):
        assert np.isnan(score(name, "Normal.", "Normal."))
    assert score("finding F1", "Nodule.", "Nodule and consolidation.") == pytest.approx(2 / 3)
    assert score("number F1", "12 mm, 3.5 ml", "12 mm") == pytest.approx(2 / 3)
    assert score("side F1", "Left nodule. Right effusion.", "Right nodule. Left effusion.") == 0
    assert sides_said("Left nodule. No right effusion.", "en") == {("nodule", "left"): 1}
    assert sides_said("左肺结节。", "zh") == {("nodule", "左"): 1}
