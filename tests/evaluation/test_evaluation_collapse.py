import math

import numpy as np
import pytest

from mm.evaluation.bleu import bleu_counts, bleu_of
from mm.evaluation.collapse import collapse, copy_rate, distinct_ratio, self_bleu
from mm.evaluation.paired import paired_p
from mm.evaluation.tokens import words

TEXTS = [
    "A 12 mm nodule on the left. No pleural effusion.",
    "A 7.5 mm nodule on the left. No pleural effusion.",
    "A 12 mm nodule on the right. Small effusion is seen today, nodule nodule.",
    "Normal study of the chest with nothing to report at all.",
    "No pleural effusion.",
]


def test_numbers_do_not_make_a_template_distinct():
    assert distinct_ratio(TEXTS) == pytest.approx(4 / 5)
    assert distinct_ratio([f"{n} mm, {n}.5 ml." for n in range(10)]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="got none"):
        distinct_ratio([])


def test_self_bleu_is_bleu_against_all_others():
    tokens = [words(text, "en") for text in TEXTS]
    others = [tokens[:n] + tokens[n + 1 :] for n in range(len(tokens))]
    assert self_bleu(TEXTS, "en") == pytest.approx(bleu_of(bleu_counts(tokens, others))[3], abs=1e-9)
    theirs = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    score, _ = theirs.compute_score(
        {n: [" ".join(item) for item in known] for n, known in enumerate(others)},
        {n: [" ".join(item)] for n, item in enumerate(tokens)},
        verbose=0,
    )
    assert self_bleu(TEXTS, "en") == pytest.approx(score[3], abs=1e-9)
    assert self_bleu([TEXTS[2]] * 4, "en") == pytest.approx(1)
    assert self_bleu(TEXTS[:1], "en") == 0
    assert self_bleu(["右肺结节影。"] * 2, "zh") == pytest.approx(1)


def test_copies_are_counted_by_the_sentence():
    assert copy_rate(TEXTS[:2], ["A 3 mm nodule on the left.  Normal."], "en") == pytest.approx(2 / 4)
    assert copy_rate(["右肺5mm结节。未见积液。"], ["右肺12mm结节。"], "zh") == pytest.approx(1 / 2)
    assert math.isnan(copy_rate(TEXTS, [], "en"))
    together = collapse(TEXTS, "en", training=TEXTS)
    assert together.copied == 1


@pytest.mark.parametrize("number", [5, 9])
def test_the_exact_p_is_scipys(number):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(number)
    ours, theirs = rng.normal(0.5, 1, number), rng.normal(0, 1, number)
    expected = stats.permutation_test(
        (ours, theirs), lambda a, b, axis: a.mean(axis) - b.mean(axis), permutation_type="samples", n_resamples=np.inf
    )
    assert paired_p(ours, theirs) == pytest.approx(expected.pvalue, abs=1e-9)


def test_the_drawn_p_is_near_the_exact_one_and_the_same_every_time():
    rng = np.random.default_rng(0)
    ours, theirs = (rng.random(40) < 0.7).astype(float), (rng.random(40) < 0.5).astype(float)
    # Differences are -1, 0 and 1: the exact p is the binomial's.
    wins, losses = int((ours > theirs).sum()), int((ours < theirs).sum())
    decided = wins + losses
    exact = sum(math.comb(decided, k) for k in range(decided + 1) if abs(2 * k - decided) >= abs(wins - losses))
    drawn = paired_p(ours, theirs)
    assert drawn == pytest.approx(exact / 2**decided, abs=0.015)
    assert drawn == paired_p(ours, theirs)
    assert paired_p(ours, ours) == 1
    assert paired_p(np.ones(60), np.zeros(60), rounds=99) == pytest.approx(1 / 100)


def test_p_of_a_corpus_score():
    tokens = [words(text, "en") for text in TEXTS]
    same = bleu_counts(tokens, [[item] for item in tokens])
    other = bleu_counts(tokens[::-1], [[item] for item in tokens])
    p = paired_p(same, other, statistic=lambda rows: float(bleu_of(rows)[3]))
    # The middle text is its own reference in both runs: swapping all but it, or none, is as extreme.
    assert p == pytest.approx(4 / 32)


def test_p_wants_scores_of_the_same_items():
    assert paired_p(np.ones(8), np.ones(8)) == 1
    assert paired_p(np.ones(8), np.zeros(8)) == pytest.approx(2 / 2**8)
    with pytest.raises(ValueError, match="shape"):
        paired_p(np.ones(3), np.ones(4))
