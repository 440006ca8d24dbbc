import pytest

from mm.evaluation.audits import drop_finding, negate, scale_size, swap_side
from mm.evaluation.mirror import mirror_consistency, mirror_table
from mm.phantom.dataset import PhantomDataset


@pytest.fixture(scope="module")
def reports() -> list[str]:
    patients = PhantomDataset(studies=10, seed=6, split="train", priors=0, inputs=("image", "record"))
    return [sample.text for sample in (patients[index] for index in range(10)) if sample.language == "en"]


def test_the_swapped_report_is_consistent_and_its_own_is_not(reports) -> None:
    swapped = [swap_side(text) for text in reports]
    found = mirror_consistency(reports, swapped, "en")
    assert {score.value for score in (found.statements, found.sides, found.calls, found.texts)} == {1.0}
    assert found.studies == len(reports)
    same = mirror_consistency(reports, reports, "en")
    assert same.calls.value == 1.0
    assert same.sides.value == 0.0
    assert same.statements.value < 1.0
    # Sizes are masked: a millimetre more or less is no other report.
    assert mirror_consistency(reports, [scale_size(text) for text in swapped], "en").texts.value == 1.0


def test_every_loss_is_seen(reports) -> None:
    swapped = [swap_side(text) for text in reports]
    for alter in (negate, drop_finding):
        found = mirror_consistency(reports, [alter(text, "en") for text in swapped], "en")
        assert found.calls.value < 1.0
        assert found.statements.value < 1.0
        assert found.texts.value < 1.0


def test_by_hand() -> None:
    found = mirror_consistency(
        ["A left nodule. A right effusion. Emphysema.", "A nodule on the left. A left effusion."],
        ["A right nodule. Emphysema.", "A nodule on the left. A right effusion."],
        "en",
    )
    # Statements: nodule right and emphysema, of three and two; then effusion right, of two and two.
    assert found.statements.value == pytest.approx(2 * 3 / 9)
    assert found.sides.value == pytest.approx(2 / 3)
    assert found.calls.value == pytest.approx(21 / 22)
    assert found.texts.value == 0.0
    assert found.findings["effusion"] == 0.5
    assert sum(found.findings.values()) == pytest.approx(10.5)
    chinese = mirror_consistency(["左肺结节。"], ["右肺结节。"], "zh")
    assert chinese.statements.value == chinese.texts.value == 1.0
    assert "Dice" in mirror_table(found)
    with pytest.raises(ValueError, match="mirrored must be of the 1 reports"):
        mirror_consistency(["A."], [], "en")
