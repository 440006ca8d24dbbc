"""Visual question answering: exact match of closed and open questions, beside what needs no image."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mm.answer_words import normalise
from mm.batch import Question
from mm.evaluation.bootstrap import Score, bootstrap


@dataclass(frozen=True)
class VqaScores:
    """Share of exact answers, of all questions and of the closed and the open ones apart (None without any)."""

    overall: Score
    closed: Score | None
    open: Score | None


def vqa_scores(answers: Sequence[str], questions: Sequence[Question], *, rounds: int = 1000) -> VqaScores:
    """Scores answers against questions of the same order.

    Raises:
        ValueError: Their numbers differ, or there are none.
    """
    if len(answers) != len(questions) or not questions:
        raise ValueError(f"answers: {len(answers)} given for {len(questions)} questions")
    right = np.array([normalise(a) == normalise(q.answer) for a, q in zip(answers, questions, strict=True)])
    closed = np.array([question.closed for question in questions])

    def score(kept: np.ndarray) -> Score | None:
        if not kept.any():
            return None
        chosen = right[kept]
        return bootstrap(lambda drawn: float(chosen[drawn].mean()), len(chosen), rounds=rounds)

    overall = score(np.ones(len(right), dtype=bool))
    assert overall is not None
    return VqaScores(overall, score(closed), score(~closed))


def most_frequent(train: Sequence[Question], test: Sequence[Question]) -> list[str]:
    """The most frequent training answer of closed and of open questions."""
    usual = {
        kind: Counter(normalise(q.answer) for q in train if q.closed == kind).most_common(1) for kind in (True, False)
    }
    return [usual[question.closed][0][0] if usual[question.closed] else "" for question in test]


def image_only(
    train: Sequence[Question],
    test: Sequence[Question],
    near: Sequence[Sequence[int]],
) -> list[str]:
    """The most frequent answer to the training questions on like images, whatever was asked: what looking alone gives.

    Args:
        train: Training questions.
        test: Of the questions nothing is read but whether they are closed ones, as `most_frequent` does.
        near: For each of `test` the training questions on images like its own; those of the other kind don't count,
            and where none is left all training questions do.
    """
    known = [(question.closed, normalise(question.answer)) for question in train]
    usual = most_frequent(train, test)
    overall = Counter(known)
    answers = []
    for question, rows, fallback in zip(test, near, usual, strict=True):
        counts = Counter(known[row] for row in rows if known[row][0] == question.closed)
        best = max(counts, key=lambda answer: (counts[answer], overall[answer], answer), default=None)
        answers.append(fallback if best is None else best[1])
    return answers


def question_only(train: Sequence[Question], test: Sequence[Question]) -> list[str]:
    """A logistic regression on the question's words: what can be had without looking.

    Raises:
        ImportError: scikit-learn is not installed (extra `evaluate`).
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise ImportError("baselines need scikit-learn: pip install 'mm-report[evaluate]'") from error
    labels = [normalise(question.answer) for question in train]
    if len(set(labels)) < 2:
        return [labels[0] if labels else ""] * len(test)
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=300))
    model.fit([question.question for question in train], labels)
    return [str(answer) for answer in model.predict([question.question for question in test])]
