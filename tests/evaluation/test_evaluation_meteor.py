"""METEOR with exact and stemmed matches, beside nltk's."""

import numpy as np
import pytest
from nltk.stem.snowball import SnowballStemmer
from nltk.translate.meteor_score import single_meteor_score

from mm.evaluation.meteor import meteor, runs

TEXT = "no acute effusion is seen in the left lung effusions nodules nodule of enlarging enlarged heart size"
WORDS = TEXT.split()


class NoWords:
    """Where nltk would look for synonyms."""

    def synsets(self, word):
        return []


def test_scores_are_those_of_nltk():
    stemmer, draw = SnowballStemmer("english"), np.random.default_rng(0)
    alike = 0
    for _ in range(300):
        text, reference = (list(draw.choice(WORDS, draw.integers(1, 10))) for _ in range(2))
        own = meteor([text], [[reference]])[0]
        peer = single_meteor_score(reference, text, stemmer=stemmer, wordnet=NoWords())
        if all(len({stemmer.stem(word) for word in words}) == len(words) for words in (text, reference)):
            assert own == pytest.approx(peer, abs=1e-9)  # one alignment is possible
            alike += 1
        assert own >= peer - 1e-9  # nltk takes the first partner of a repeated word, we the one of the longest run
    assert alike > 50


def test_the_same_words_in_fewer_runs_score_higher():
    reference = ["small", "effusion", "on", "the", "left"]
    whole, broken = ["small", "effusion", "on", "the", "left"], ["on", "the", "left", "small", "effusion"]
    assert runs(whole, reference) == [5]
    assert runs(broken, reference) == [3, 2]
    first, second = meteor([whole, broken], [[reference], [reference]])
    assert first > second > 0


def test_the_best_reference_counts_and_nothing_in_common_is_nothing():
    best = meteor([["a", "b"]], [[["x", "y"], ["a", "b", "c"]]])
    assert best == meteor([["a", "b"]], [[["a", "b", "c"]]])
    assert meteor([["a"], []], [[["x"]], [["x"]]]).tolist() == [0, 0]


def test_chinese_has_no_stems():
    assert meteor([list("\u5de6\u80ba\u7ed3\u8282")], [[list("\u5de6\u80ba")]], "zh")[0] > 0


def test_a_text_without_reference_is_refused():
    with pytest.raises(ValueError, match="reference"):
        meteor([["a"]], [[]])
