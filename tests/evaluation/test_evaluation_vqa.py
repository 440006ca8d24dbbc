import pytest

from mm.batch import Question
from mm.evaluation.vqa import vqa_scores
from mm.evaluation.vqa_official import official, vqa_accuracy
from mm.evaluation.vqa_variants import VARIANTS, token_f1, token_recall, variant_scores


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # The cases of visualqa.org/evaluation.html.
        ("Yes", "yes"),
        ("Tennis.", "tennis"),
        ("2.5", "2.5"),
        ("two", "2"),
        ("a dog", "dog"),
        ("the cat and an owl", "cat and owl"),
        ("dont", "don't"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        # What its program does besides.
        ("left-sided", "left sided"),
        ("left - sided", "left sided"),  # both marks go, the two spaces fold
        ("red,green", "red green"),
        ("red, green,blue", "red greenblue"),  # one comma beside a space: all of them go
        ("1,000 x-rays", "1000 xrays"),  # a comma between digits: all marks go
        ("none", "0"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("im", "im"),  # its entry has a capital and is never met
        ("its", "its"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("somebody'd", "somebodyd"),
        ("yall'd've", "y'all'd've"),
        ("twas", "'twas"),
        ("ow's'at", "'ow's'at"),
        ("e.g. this", "eg this"),
        (".5", ".5"),
        ("line\nbreak\tand ", "line break and"),
        ("." * 33, "."),
        ("!?", ""),
        ("", ""),
    ],
)
def test_the_official_normaliser(answer, expected):
    assert official(answer) == expected


def test_official_accuracy_is_the_mean_over_subsets_of_nine():
    for agreeing, expected in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)):
        people = ["Two"] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
        assert vqa_accuracy("2", people) == pytest.approx(expected)
    assert vqa_accuracy("yes", ["yes"] * 10) == 1
    # All ten alike: compared as they are, which is the published behaviour.
    assert vqa_accuracy("the dog", ["dog"] * 10) == 0
    assert vqa_accuracy("the dog", ["dog"] * 9 + ["cat"]) == 1
    with pytest.raises(ValueError, match="got none"):
        vqa_accuracy("yes", [])


def test_token_scores_by_hand():
    assert token_f1("The right lower lobe.", "right lobe") == pytest.approx(0.8)
    assert token_f1("lobe lobe", "lobe") == pytest.approx(2 / 3)
    assert token_f1("left", "right") == token_f1("", "right") == 0
    assert token_f1("the", "a") == 1
    assert token_f1("右下叶", "右叶") == pytest.approx(0.8)
    assert token_recall("it is in the right lower lobe of the lung", "right lobe") == 1
    assert token_recall("right", "right lobe") == 0.5


def test_variants_bound_one_another():
    questions = [
        Question("Is it?", "Yes", True),
        Question("How many?", "two", False),
        Question("Where?", "the right lung.", False),
        Question("What?", "X-ray", False),
    ]
    answers = ["yes ", "2", "Right upper lung", "x ray"]
    scores = {name: row.overall.value for name, row in variant_scores(answers, questions, rounds=20).items()}
    assert scores == pytest.approx(
        {"exact_raw": 0.25, "exact": 0.5, "exact_vqav2": 0.75, "token_f1": (1 + 0.8) / 4, "token_recall": 2 / 4}
    )
    assert list(scores) == list(VARIANTS)
    assert variant_scores(answers, questions)["exact"] == vqa_scores(answers, questions)
    assert variant_scores(answers[:1], questions[:1])["exact"].open is None
    with pytest.raises(ValueError, match="1 given for 4"):
        variant_scores(answers[:1], questions)
