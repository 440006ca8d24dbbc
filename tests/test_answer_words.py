"""Forms of questions and the answers that they allow."""

import pytest

from mm.answer_words import Form, fitting, form, normalise, options

ANSWERS = ["yes", "no", "left", "right", "left kidney", "ct", "pleural effusion"]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Is there a fracture?", "yes or no"),
        ("Are the lungs clear", "yes or no"),
        ("Isn't this a CT?", "yes or no"),
        ("Is contrast used or not?", "yes or no"),
        ("Is the lesion left or right?", "options"),
        ("Which is denser, the mass or the liver?", "options"),
        ("Where is the lesion?", "open"),
        ("Island of tissue: what is it?", "open"),
    ],
)
def test_form(question: str, expected: Form) -> None:
    assert form(question) == expected


def test_options_stand_beside_the_or() -> None:
    assert options("Is the cyst in the left or the right kidney?")[:2] == ("left", "right")
    assert {"right kidney", "left kidney"} <= set(options("Is the cyst in the left or right kidney?"))
    assert set(options("Is this T1, T2, or FLAIR?")) >= {"flair", "t2"}
    assert options("Where is it?") == ()
    assert options("or") == options("this or") == ()


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Is there a fracture?", {"yes", "no"}),
        ("Is it on the left or the right?", {"left", "right"}),
        ("Is it in the left or right kidney?", {"left", "right", "left kidney"}),
        ("Do you see an effusion that is pleural, or is it within the lung?", {"pleural effusion"}),
        ("What is it?", {"left", "right", "left kidney", "ct", "pleural effusion"}),
    ],
)
def test_what_fits(question: str, expected: set[str]) -> None:
    assert {ANSWERS[place] for place in fitting(question, ANSWERS)} == expected


def test_where_nothing_fits_everything_may_be_said() -> None:
    assert fitting("Is there a fracture?", ["ct", "left"]) == [0, 1]
    assert fitting("Is it solid or cystic?", ["ct", "left"]) == [0, 1]


def test_normalising_twice_is_normalising_once() -> None:
    for answer in ("The right lung.", "Two", "X-ray", "", "an  apple"):
        assert normalise(normalise(answer)) == normalise(answer)
    assert normalise("The right lung.") == "right lung"
