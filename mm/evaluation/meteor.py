"""METEOR with exact and stemmed matches (Banerjee and Lavie, 2005): recall weighs nine times as much as precision.

Words match where their stems (Porter 2) are the same; no synonyms, no paraphrases: say "METEOR (exact, stem)" and
never compare it with numbers that had them. Fewer, longer runs of matched words score higher.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Final

import numpy as np
from jaxtyping import Float

from mm.batch import Language
from mm.evaluation.bleu import check_pairs

ALPHA: Final = 0.9
BETA: Final = 3.0
GAMMA: Final = 0.5


@cache
def _stemmer() -> Callable[[str], str]:
    try:
        import snowballstemmer
    except ImportError as error:
        raise ImportError("METEOR needs a stemmer: pip install 'mm-report[evaluate]'") from error
    stem: Callable[[str], str] = snowballstemmer.stemmer("english").stemWord
    return cache(stem)


def runs(candidate: Sequence[str], reference: Sequence[str]) -> list[int]:
    """Lengths of the runs in which a text's tokens are matched, the longest first.

    Every token that can be matched is, once; taking the longest run that is left keeps the number of runs low (the
    fewest aren't searched for, which takes exponential time).
    """
    free, wanted = np.ones(len(candidate), bool), np.ones(len(reference), bool)
    same = np.array([[a == b for b in reference] for a in candidate], bool).reshape(len(candidate), len(reference))
    found: list[int] = []
    while True:
        open_pairs = same & free[:, None] & wanted
        length = np.zeros((len(candidate) + 1, len(reference) + 1), int)  # of the run that ends here
        for row in range(len(candidate)):
            length[row + 1, 1:] = np.where(open_pairs[row], length[row, :-1] + 1, 0)
        longest = int(length.max())
        if longest == 0:
            return found
        last, column = divmod(int(length.argmax()), length.shape[1])
        free[last - longest : last] = False
        wanted[column - longest : column] = False
        found.append(longest)


def meteor(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], language: Language = "en"
) -> Float[np.ndarray, " N"]:
    """METEOR of each text against the best of its references; the corpus score is the mean.

    Args:
        candidates: Tokens of the texts.
        references: Tokens of one or more a text.
        language: Chinese has no stems.

    Raises:
        ValueError: The numbers of texts differ, or a text has no reference.
        ImportError: The stemmer is missing.
    """
    check_pairs(candidates, references)
    stem = _stemmer() if language == "en" else str
    scores = np.zeros(len(candidates))
    for number, (candidate, known) in enumerate(zip(candidates, references, strict=True)):
        stems = [stem(word) for word in candidate]
        scores[number] = max(_score(stems, [stem(word) for word in reference]) for reference in known)
    return scores


def _score(candidate: Sequence[str], reference: Sequence[str]) -> float:
    found = runs(candidate, reference)
    matched = sum(found)
    if matched == 0:
        return 0.0
    precision, recall = matched / len(candidate), matched / len(reference)
    mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    return float(mean * (1 - GAMMA * (len(found) / matched) ** BETA))
