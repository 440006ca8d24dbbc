import pytest
import torch

from mm import ontology
from mm.data.readers import open_split, open_words, texts
from mm.data.spec import PhantomSpec, PhantomSplit, Split
from mm.data.wording import PhantomWords

SPEC = PhantomSpec("phantom", PhantomSplit(12, 1), PhantomSplit(12, 2), PhantomSplit(12, 3))


def test_training_words_vary_but_the_facts_do_not() -> None:
    words = open_words(SPEC, "train")
    assert isinstance(words, PhantomWords)
    torch.manual_seed(0)
    first, second = ([words[i] for i in range(12)] for _ in range(2))
    assert [item.truth for item in first] == [item.truth for item in second]
    assert [item.text for item in first] != [item.text for item in second]
    assert {item.language for item in first + second} == {"en", "zh"}
    assert not any(item.volumes or item.audio or item.image is not None for item in first)


def test_other_words_are_fixed() -> None:
    words = open_words(SPEC, "val")
    assert [words[i].text for i in range(12)] == [words[i].text for i in range(12)]


@pytest.mark.parametrize("split", ["val", "test"])
def test_other_words_are_the_data_sets_own(split: Split) -> None:
    inputs = ("image", "audio", "record")  # volumes take long
    words, rendered = (make(SPEC, split, inputs=inputs) for make in (open_words, open_split))
    for index in range(12):
        spoken, whole = words[index], rendered[index]
        assert (spoken.language, spoken.report, spoken.text) == (whole.language, whole.report, whole.text)
        assert spoken.questions == whole.questions


def test_words_speak_of_the_same_patients_as_the_data_set() -> None:
    words = open_words(SPEC, "test")
    assert isinstance(words, PhantomWords)
    rendered = words.rendered[3].truth
    spoken = words[3].truth
    assert rendered is not None
    assert spoken is not None
    assert rendered.findings == spoken.findings


def test_without_sounds_nothing_is_said_of_them() -> None:
    words = open_words(SPEC, "val", inputs=("volume", "image", "record"))
    said = [words[i].truth for i in range(12)]
    codes = {item.code for truth in said if truth is not None for item in truth.findings}
    assert "airflow_obstruction" not in codes
    assert codes <= set(ontology.CODES)


def test_a_vocabulary_sees_reports_questions_and_records() -> None:
    seen = list(texts(SPEC, studies=4))
    assert any("<size>" in text for text in seen)
    assert any("?" in text or "？" in text for text in seen)
    assert len(seen) > 40


def test_some_training_sentences_leave_the_size_away_but_the_text_does_not() -> None:
    words, other = open_words(SPEC, "train"), open_words(SPEC, "val")
    torch.manual_seed(0)
    samples = [words[i] for i in range(12) for _ in range(10)]
    told = [(sample, sentence) for sample in samples for sentence in sample.report if sentence.finding is not None]
    without = [(sample, sentence) for sample, sentence in told if not sentence.measured]
    assert 0.05 < len(without) / len(told) < 0.2
    assert not any("<size>" in sentence.text for _, sentence in without)
    sized = [item for sample in samples if sample.truth is not None for item in sample.truth.findings if item.present]
    assert all(item.size is not None for item in sized if ontology.finding(item.code).measure is not None)
    assert all(sentence.measured for i in range(12) for sentence in other[i].report)
