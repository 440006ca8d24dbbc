"""Reports without a decoder: a template for each finding the same head finds, and the report of the nearest patient."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mm import ontology
from mm.batch import BySource, DetectedFinding, FindingTruth, Language, Sentence
from mm.phantom import text


def one_template(findings: Sequence[DetectedFinding], *, language: Language, days: float | None) -> str:
    """The report of a head's findings in the first training template of every situation: one phrase for each."""
    known = _as_truth(findings)
    sentences = [] if days is None else [Sentence("comparison", text.summary_templates(language, "comparison")[0].text)]
    for there in (True, False):
        for index, item in enumerate(known):
            if item.present == there and (there or item.change == "resolved"):
                change = ontology.CHANGES[ontology.CHANGES.index(item.change)]  # narrows str to Change
                grade, sided = ontology.grade(item.code, item.size), item.side in ("left", "right")
                chosen = text.finding_templates(language, item.code, change, grade, sided=sided)[0]
                sentences.append(Sentence("finding", chosen.text, index))
    sentences += [Sentence("normal", text.summary_templates(language, "normal")[0].text)]
    sentences += [Sentence("impression", text.summary_templates(language, "impression")[0].text)]
    return text.filled(sentences, known, days=days, language=language)


def drawn_template(
    findings: Sequence[DetectedFinding], *, language: Language, days: float | None, rng: np.random.Generator
) -> str:
    """The same with each template drawn at random among those of training, as the training reports were made."""
    known = _as_truth(findings)
    made = text.report(known, language=language, days=days, split="train", rng=rng)
    return text.filled(made, known, days=days, language=language)


def _as_truth(findings: Sequence[DetectedFinding]) -> list[FindingTruth]:
    return [
        FindingTruth(item.code, item.present, item.side, None, None, item.size, item.change, ()) for item in findings
    ]


def side_by_side(embeddings: BySource[Tensor]) -> Float[Tensor, "B E"]:
    """The embeddings of all inputs of each study in one row, so that a product sums their cosines."""
    return torch.cat([vectors.float().cpu() for _, vectors in embeddings.items()], dim=1)


def nearest_texts(vectors: Float[Tensor, "N E"], training: Float[Tensor, "M E"], texts: Sequence[str]) -> list[str]:
    """The text of the training patient nearest to each study."""
    assert len(training) == len(texts)
    return [texts[row] for row in (vectors @ training.T).argmax(1).tolist()]
