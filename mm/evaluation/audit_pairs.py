"""Do embeddings notice a report made wrong? Of its own report and the altered one, which is an input nearer to?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mm.batch import Language
from mm.evaluation.audits import ALTERATIONS
from mm.evaluation.balanced import wilson
from mm.evaluation.bootstrap import Score
from mm.evaluation.evaluate import table


@dataclass(frozen=True)
class Preference:
    """Of the inputs whose text an alteration changes: how many, and the share nearer to the true text (chance .5)."""

    changed: int
    right: Score


def preferences(
    images: Float[Tensor, "N E"],
    texts: Sequence[str],
    languages: Sequence[Language],
    embed: Callable[[list[str]], Float[Tensor, "M E"]],
) -> dict[str, Preference]:
    """For each alteration that changes a text; an equal similarity counts half.

    Args:
        images: Unit vectors of the inputs.
        texts: The text of each.
        languages: Of each text.
        embed: Unit vectors of texts.
    """
    result = {}
    for name, alter in ALTERATIONS.items():
        altered = [alter(text, language) for text, language in zip(texts, languages, strict=True)]
        kept = [row for row, text in enumerate(texts) if altered[row] != text and altered[row].strip()]
        if not kept:
            continue
        true, false = embed([texts[row] for row in kept]), embed([altered[row] for row in kept])
        difference = (images[kept] * (true - false)).sum(1)
        hits = float((difference > 0).sum() + 0.5 * (difference == 0).sum())
        low, high = wilson(round(hits), len(kept))
        result[name] = Preference(len(kept), Score(hits / len(kept), low, high))
    return result


def preference_table(found: dict[str, Preference]) -> str:
    """As Markdown."""
    rows = [(name, str(item.changed), str(item.right)) for name, item in found.items()]
    return table(("alteration", "texts", "nearer to the true text [95 %]"), rows)
