import numpy as np
import pytest

from mm import ontology
from mm.phantom.patient import draw_patient
from mm.phantom.questions import WORDS, questions


@pytest.fixture(scope="module")
def asked():
    patients = [draw_patient(seed) for seed in range(150)]
    return [(patient, questions(patient.findings, rng=np.random.default_rng(patient.seed))) for patient in patients]


def test_four_to_eight_questions_and_none_twice(asked):
    for _, pairs in asked:
        assert 4 <= len(pairs) <= 8
        assert len({pair.en.question for pair in pairs}) == len(pairs)


def test_yes_and_no_are_balanced(asked):
    answers = [pair.en.answer for _, pairs in asked for pair in pairs if pair.en.closed]
    assert answers.count("yes") / len(answers) == pytest.approx(0.5, abs=0.08)


def test_answers_are_a_small_closed_vocabulary_in_both_languages(asked):
    for language in ("en", "zh"):
        allowed = {*WORDS[language].values(), "1", "2", "3", "4"}
        answers = {getattr(pair, language).answer for _, pairs in asked for pair in pairs}
        assert answers <= allowed
        assert len(answers) >= 9


def test_answers_follow_from_the_truth(asked):
    for patient, pairs in asked:
        present = patient.present
        for pair in pairs:
            english, answer = pair.en.question, pair.en.answer
            if answer in ("yes", "no") and "due to" not in english:
                code = next(kind.code for kind in ontology.FINDINGS if f" {kind.en}" in english)
                assert (answer == "yes") == (code in present)
            if "due to" in english:
                assert (answer == "yes") == ("infection" in present)
            if "nodules" in english:
                assert int(answer) == sum(item.code == "nodule" and item.present for item in patient.findings)
            assert pair.en.closed == pair.zh.closed
            assert pair.zh.question != pair.en.question
