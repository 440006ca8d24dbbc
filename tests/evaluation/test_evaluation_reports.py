import numpy as np
import pytest

from mm import ontology
from mm.batch import DetectedFinding, FindingTruth, GeneratedReport, GeneratedSentence, Question
from mm.evaluation import baselines, reports, vqa
from mm.evaluation.balanced import balanced_accuracy, wilson
from mm.evaluation.bootstrap import bootstrap

SPACING = (5.0, 2.75, 2.75)


def truth(
    code: str, voxel: tuple[float, float, float] | None, size: float | None = 12.0
) -> tuple[FindingTruth, tuple[float, float, float] | None]:
    return FindingTruth(code, True, "left", (0.0, 0.0, 0.0), None, size, "unknown", ("volume",)), voxel


def detected(
    code: str, voxel: tuple[float, float, float] | None, *, size: float | None = 12.0, present: bool = True
) -> DetectedFinding:
    return DetectedFinding(code, present, 0.9, "left", voxel, None, size, "unknown")


def judged(
    found: list[DetectedFinding], texts: list[str], true: list[tuple[FindingTruth, tuple[float, float, float] | None]]
) -> reports.Judged:
    rows = tuple(GeneratedSentence("finding", text, index, -0.1) for index, text in enumerate(texts))
    return reports.Judged(
        GeneratedReport("en", tuple(found), rows),
        tuple(texts),
        30.0,
        tuple(f for f, _ in true),
        tuple(v for _, v in true),
    )


def test_text_and_head_are_read_apart():
    item = judged(
        [detected("nodule", (10.0, 60.0, 60.0))],
        ["No pulmonary nodule; a pneumothorax."],
        [truth("nodule", (10.0, 60.0, 60.0))],
    )
    assert reports.head_labels([item])[0].nonzero()[0].tolist() == [ontology.INDEX["nodule"]]
    assert reports.text_labels([item])[0].nonzero()[0].tolist() == [ontology.INDEX["pneumothorax"]]


def test_a_missed_nodule_is_a_wrong_slice():
    found = [detected("nodule", (11.4, 60.0, 60.0))]
    item = judged(
        found,
        ["A 12 mm nodule on the left."],
        [
            truth("nodule", (10.6, 60.0, 61.0)),
            truth("nodule", (40.0, 20.0, 20.0)),
            truth("nodule", (11.0, 60.0, 60.0), 5.0),
        ],
    )
    places = reports.nodule_places([item], SPACING)
    assert (places.total, places.found) == (2, 0)
    # The nearest pair is matched first: the 5 mm nodule takes the only detection.
    assert reports.nodule_recall([item], SPACING)["3-8 mm"] == (1.0, 1)
    assert places.key_slice_within_one == 0.0


def test_matching_is_one_to_one_and_in_millimetres():
    found = [detected("nodule", (10.0, 60.0, 60.0)), detected("nodule", (30.0, 60.0, 60.0))]
    item = judged(found, ["A.", "B."], [truth("nodule", (11.0, 60.0, 60.0)), truth("nodule", (30.0, 63.0, 64.0))])
    places = reports.nodule_places([item], SPACING)
    assert places.found == 2
    assert places.key_slice_within_one == 1.0
    assert places.median_error_mm == pytest.approx((5.0 + 13.75) / 2)


def test_copied_facts_count_numbers_and_sides():
    right = judged([detected("calcification", None, size=40.2)], ["Calcified plaque of 40 mm3, seen 30 days ago."], [])
    assert reports.copied_facts([right]) == (1.0, 2)
    wrong = judged([detected("nodule", None)], ["A 13 mm nodule in the right lung."], [])
    assert reports.copied_facts([wrong]) == (0.0, 2)


def test_macro_f1_and_free_baselines():
    labels = np.zeros((4, len(ontology.CODES)), dtype=bool)
    labels[0, 0] = labels[1, 0] = labels[2, 1] = True
    assert reports.macro_f1(labels, labels) == 1.0
    assert reports.macro_f1(baselines.constant(labels, positive=False), labels) == 0.0
    assert reports.macro_f1(baselines.constant(labels, positive=True), labels) == pytest.approx((2 / 3 + 0.4) / 2)


def test_logistic_learns_and_a_constant_label_is_no_trouble():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 5))
    labels = np.stack([features[:, 0] > 0, np.zeros(200, dtype=bool)], axis=1)
    predicted = baselines.logistic(features[:150], labels[:150], features[150:])
    assert (predicted[:, 0] == labels[150:, 0]).mean() > 0.9
    assert not predicted[:, 1].any()


def test_balanced_accuracy_has_an_interval_where_a_recall_is_zero():
    truth = np.array([0] * 170 + [1] * 15)
    chance = balanced_accuracy(np.zeros(185, dtype=int), truth)
    assert chance.value == 0.5
    assert chance.low < 0.5 < chance.high < 0.62
    missed = np.zeros(185, dtype=int)
    missed[:34] = 1
    worse = balanced_accuracy(missed, truth)
    assert worse.value == pytest.approx(0.4)
    perfect = balanced_accuracy(truth, truth)
    assert (perfect.value, perfect.high) == (1, 1)
    assert 0.85 < perfect.low < 1
    assert np.isnan(balanced_accuracy(truth, np.zeros(185, dtype=int)).value)


def test_the_interval_of_balanced_accuracy_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [100, 40, 20])
    recall = np.array([0.95, 0.7, 0.9])
    rounds = [np.where(rng.random(160) < recall[truth], truth, (truth + 1) % 3) for _ in range(1000)]
    scores = [balanced_accuracy(predicted, truth) for predicted in rounds]
    covered = np.mean([score.low <= 0.85 <= score.high for score in scores])
    assert 0.93 < covered < 0.98


def test_wilson_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for hits, number in ((0, 15), (3, 20), (170, 170)):
        theirs = stats.binomtest(hits, number).proportion_ci(method="wilson")
        assert wilson(hits, number) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_bootstrap():
    labels = np.array([0] * 90 + [1] * 10)
    score = bootstrap(lambda drawn: float(labels[drawn].mean()), 100)
    assert score.value == 0.1
    assert score.low < 0.1 < score.high
    assert score.low <= 0.12 <= score.high


def test_overlap_scores_agree_with_their_definitions():
    pytest.importorskip("sacrebleu")
    texts = ["A large left pleural effusion is seen today ."]
    assert reports.bleu4(texts, texts, "en") == pytest.approx(1.0)
    assert reports.rouge_l(["the cat sat"], ["the cat ran"], "en") == pytest.approx(2 / 3)
    assert reports.rouge_l(["右肺结节"], ["右肺实变"], "zh") == pytest.approx(0.5)


def test_vqa_folds_what_does_not_matter():
    questions = [
        Question("Is it?", "Yes", True),
        Question("Which?", "the Right lung.", False),
        Question("How many?", "two", False),
    ]
    scores = vqa.vqa_scores(["yes.", "right lung", "3"], questions)
    assert scores.overall.value == pytest.approx(2 / 3)
    assert scores.closed is not None
    assert scores.closed.value == 1.0
    assert vqa.most_frequent(questions, questions)[0] == "yes"
    assert len(vqa.question_only(questions, questions)) == 3
