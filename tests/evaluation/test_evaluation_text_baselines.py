import numpy as np
import pytest

from mm.batch import Question
from mm.evaluation.bleu import bleu_counts, bleu_of
from mm.evaluation.text_baselines import likest_text, most_frequent_text, random_texts
from mm.evaluation.tokens import words
from mm.evaluation.vqa import image_only
from mm.evaluation.vqa_listed import AnswerList

WORDS = ("the", "heart", "is", "normal", "large", "lungs", "are", "clear", "no", "effusion")


def test_the_likest_text_is_the_one_that_scores_highest_for_all():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(6, 14))) for _ in range(30)]
    texts += ["the heart is normal the lungs are clear no effusion"] * 3
    tokens = [words(text, "en") for text in texts]
    scores = [bleu_of(bleu_counts([own] * len(texts), [[other] for other in tokens]))[3] for own in tokens]
    assert likest_text(texts, "en") == texts[int(np.argmax(scores))]


def test_the_most_frequent_text_folds_case_and_space():
    assert most_frequent_text(["a b", "c", "A  B", "d"]) == "a b"


def test_random_texts_are_training_texts_and_the_same_each_time():
    assert random_texts(["a", "b", "c"], 50) == random_texts(["a", "b", "c"], 50)
    assert set(random_texts(["a", "b", "c"], 50)) == {"a", "b", "c"}


def question(answer: str, *, closed: bool = False) -> Question:
    return Question("what?", answer, closed)


def test_image_only_asks_the_like_images_and_not_the_question():
    train = [question("Left"), question("left"), question("right"), question("yes", closed=True), question("right")]
    test = [question(""), question(""), question("", closed=True), question("", closed=True)]
    near = [[0, 1, 2], [2, 3], [0, 1, 3], [0]]
    assert image_only(train, test, near) == ["left", "right", "yes", "yes"]
    other = [Question("how?", item.answer, item.closed) for item in test]
    assert image_only(train, other, near) == image_only(train, test, near)


def test_the_list_has_every_answer_once_in_all_its_spellings():
    learnt = [question(answer) for answer in ("Yes", "yes.", "no", "yes", "the lung", "")]
    made = AnswerList.of(learnt)
    assert made.answers == ("yes", "no", "lung")
    assert [made.answers[place] for place in made.means] == [
        {"Yes": "yes", "yes.": "yes", "yes": "yes", "no": "no", "the lung": "lung"}[text] for text in made.spellings
    ]
    assert AnswerList.of(learnt, limit=1).spellings == ("Yes", "yes", "yes.")
    with pytest.raises(ValueError, match="has none"):
        AnswerList.of([question(" ")])
