"""The scores that papers on VQA-RAD (Lau et al., Scientific Data 5, 2018) call accuracy, each by a name of its own.

They differ by several points on the same answers: never compare numbers of different variants.

| name | an answer scores |
|---|---|
| exact_raw | 1 where it equals the truth but for case and outer white space |
| exact | 1 where both are equal by `mm.evaluation.vqa.normalise`; what `mm evaluate` has printed all along |
| exact_vqav2 | 1 where both are equal by VQAv2's published normaliser |
| token_f1 | F1 of the words of both (SQuAD's: no case, marks, articles) |
| token_recall | share of the truth's words that the answer has: "open" of LLaVA-Med; long answers gain |
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from mm.answer_words import normalise
from mm.batch import Question
from mm.evaluation.bootstrap import Score, bootstrap
from mm.evaluation.vqa import VqaScores
from mm.evaluation.vqa_official import official

_ARTICLES: Final = re.compile(r"\b(?:a|an|the)\b")
_NO_MARKS: Final = str.maketrans("", "", string.punctuation)
_IDEOGRAPH: Final = re.compile(r"([\u3400-\u9fff])")


def token_f1(answer: str, truth: str) -> float:
    """F1 of two bags of words, as SQuAD has it (Rajpurkar et al., 2016); Chinese characters are words.

    Two answers without a word are equal.
    """
    given, known = _bag(answer), _bag(truth)
    if not given or not known:
        return float(given == known)
    return 2 * (given & known).total() / (given.total() + known.total())


def token_recall(answer: str, truth: str) -> float:
    """The share of the truth's words, as often as it has them, that the answer has too."""
    given, known = _bag(answer), _bag(truth)
    return (given & known).total() / known.total() if known else float(not given)


def _bag(text: str) -> Counter[str]:
    plain = _ARTICLES.sub(" ", text.lower().translate(_NO_MARKS))
    return Counter(_IDEOGRAPH.sub(r" \1 ", plain).split())


VARIANTS: Final[dict[str, Callable[[str, str], float]]] = {
    "exact_raw": lambda answer, truth: float(answer.strip().lower() == truth.strip().lower()),
    "exact": lambda answer, truth: float(normalise(answer) == normalise(truth)),
    "exact_vqav2": lambda answer, truth: float(official(answer) == official(truth)),
    "token_f1": token_f1,
    "token_recall": token_recall,
}


def variant_scores(
    answers: Sequence[str], questions: Sequence[Question], *, rounds: int = 1000
) -> dict[str, VqaScores]:
    """Every variant over all questions, the closed and the open ones, with bootstrap intervals.

    Raises:
        ValueError: The numbers of answers and questions differ, or there are none.
    """
    if len(answers) != len(questions) or not questions:
        raise ValueError(f"answers: {len(answers)} given for {len(questions)} questions")
    closed = np.array([question.closed for question in questions])
    result = {}
    for name, score in VARIANTS.items():
        values = np.array([score(a, q.answer) for a, q in zip(answers, questions, strict=True)])
        overall, of_closed, of_open = (_mean(part, rounds) for part in (values, values[closed], values[~closed]))
        assert overall is not None
        result[name] = VqaScores(overall, of_closed, of_open)
    return result


def _mean(values: np.ndarray, rounds: int) -> Score | None:
    if not len(values):
        return None
    return bootstrap(lambda drawn: float(values[drawn].mean()), len(values), rounds=rounds)
