"""Which texts belong to which images, where an image may have several: strictly, and forgiving equal texts.

"Image" stands for whatever a text describes: a volume, a sound, a record.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.evaluation.bootstrap import Score, bootstrap
from mm.evaluation.both_ways import rank_pairs
from mm.evaluation.ranking import Ranking, rank_matches, text_groups
from mm.evaluation.retrieval import Retrieval, chance

Matches = list[Int[np.ndarray, " _"]]
ORDERS: Final = 100
_MOST_QUERIES: Final = 200_000
"""Of the control, over all its orders."""


@dataclass(frozen=True)
class Pairs:
    """Images and their texts.

    Attributes:
        owner: The image of each text; every image has one text or more.
        texts: For each image those that count as right, by number.
        images: For each text those that count as right, by number.
    """

    owner: Int[np.ndarray, " T"]
    texts: Matches
    images: Matches

    @classmethod
    def strict(cls, captions: Sequence[Sequence[str]]) -> "Pairs":
        """An image's own texts alone are right, and a text's own image alone.

        Args:
            captions: Of each image.

        Raises:
            ValueError: An image has no text.
        """
        bare = sum(not own for own in captions)
        if bare or not captions:
            raise ValueError(f"captions must be at least one an image, got {bare} of {len(captions)} images without")
        counts = np.array([len(own) for own in captions])
        owner = np.repeat(np.arange(len(captions)), counts)
        return cls(owner, np.split(np.arange(len(owner)), counts.cumsum()[:-1]), list(owner[:, None]))

    @classmethod
    def forgiving(cls, captions: Sequence[Sequence[str]]) -> "Pairs":
        """Right is also what has the same words: any text equal to one of the image's, any image with an equal text."""
        strict = cls.strict(captions)
        groups = text_groups([text for own in captions for text in own])
        order = np.argsort(groups, kind="stable")
        alike = np.split(order, np.bincount(groups).cumsum()[:-1])
        texts = [np.unique(np.concatenate([alike[groups[text]] for text in own])) for own in strict.texts]
        return cls(strict.owner, texts, [np.unique(strict.owner[alike[group]]) for group in groups])


def rank_both(images: Float[Tensor, "N D"], texts: Float[Tensor, "T D"], pairs: Pairs) -> tuple[Ranking, Ranking]:
    """Texts for every image and images for every text; from one product where each has one alone.

    Raises:
        ValueError: An embedding isn't finite.
    """
    if len(images) == len(texts) and all(own.tolist() == [n] for n, own in enumerate(pairs.texts)):
        return rank_pairs(images, texts)
    return rank_matches(images, texts, pairs.texts), rank_matches(texts, images, pairs.images)


def by_image(values: Float[np.ndarray, " N"], owner: Int[np.ndarray, " N"]) -> Score:
    """Mean over queries with an interval that resamples images: the texts of one image are not independent."""
    counts = np.bincount(owner)
    sums = np.bincount(owner, weights=values)
    return bootstrap(lambda drawn: float(sums[drawn].sum() / counts[drawn].sum()), len(counts))


def control(images: Float[Tensor, "N D"], texts: Float[Tensor, "T D"], pairs: Pairs, *, seed: int) -> Retrieval:
    """Texts dealt out to images at random, in a hundred orders (in fewer of more than 2,000 images).

    What lies above chance here has seen the answer. One order alone scatters by a third of chance and more; the
    interval is where 95 % of the orders lie.
    """
    generator = torch.Generator().manual_seed(seed)
    # Texts move, the pairing stays by index: an image is now told that strangers' texts are its own.
    orders = (
        torch.randperm(len(texts), generator=generator)
        for _ in range(min(ORDERS, max(_MOST_QUERIES // len(images), 2)))
    )
    drawn = np.stack([rank_matches(images, texts[order], pairs.texts).rank for order in orders])
    low, high = np.quantile((drawn <= 10).mean(1), [0.025, 0.975])
    pooled = Retrieval.of(drawn.ravel(), chance_at_10=chance([len(own) for own in pairs.texts], len(texts), 10))
    return replace(pooled, recall_at_10=Score(pooled.recall_at_10.value, float(low), float(high)))
