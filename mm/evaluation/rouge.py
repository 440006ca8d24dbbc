"""ROUGE-L (Lin, 2004): the longest common subsequence of a text and its reference, two published definitions.

`rouge_l_coco` is pycocoevalcap's: recall weighs more (beta 1.2), and with several references the best precision is
combined with the best recall, even of another reference. `rouge_l_f1` is rouge-score's: the plain F1.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from jaxtyping import Float

from mm.evaluation.bleu import check_pairs

BETA: Final = 1.2


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a bit a token of `a` (Hyyro, 2004)."""
    places: dict[str, int] = {}
    for place, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << place
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        hits = row & places.get(token, 0)
        row = (row + hits | row - hits) & full
    return len(a) - row.bit_count()


def rouge_l_coco(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> Float[np.ndarray, " N"]:
    """ROUGE-L of each text as pycocoevalcap has it; the corpus score is the mean.

    Raises:
        ValueError: The numbers of texts differ, or a text has no reference.
    """
    check_pairs(candidates, references)
    scores = np.zeros(len(candidates))
    for number, (candidate, known) in enumerate(zip(candidates, references, strict=True)):
        common = [longest_common(candidate, reference) for reference in known]
        if not max(common):
            continue
        precision = max(common) / len(candidate)
        recall = max(hits / max(len(reference), 1) for hits, reference in zip(common, known, strict=True))
        scores[number] = (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
    return scores


def rouge_l_f1(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " N"]:
    """ROUGE-L F1 of each text against its one reference, as rouge-score has it on `mm.evaluation.tokens.words`.

    Raises:
        ValueError: The numbers of texts differ.
    """
    check_pairs(candidates, [[reference] for reference in references])
    pairs = zip(candidates, references, strict=True)
    return np.array([2 * longest_common(a, b) / max(len(a) + len(b), 1) for a, b in pairs], dtype=np.float64)
