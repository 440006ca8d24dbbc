import numpy as np
import pytest
import torch

from mm.evaluation.pairs import Pairs, by_image, control, rank_both
from mm.evaluation.ranking import rank_matches
from mm.evaluation.retrieval import chance

CAPTIONS = [("A dog.", "Two dogs."), ("a  DOG.",), ("A cat.", "A tree.", "two dogs.")]


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_strict_pairs_are_an_images_own():
    pairs = Pairs.strict(CAPTIONS)
    assert pairs.owner.tolist() == [0, 0, 1, 2, 2, 2]
    assert [own.tolist() for own in pairs.texts] == [[0, 1], [2], [3, 4, 5]]
    assert [own.tolist() for own in pairs.images] == [[0], [0], [1], [2], [2], [2]]


def test_equal_texts_are_right_and_what_merely_hangs_together_is_not():
    pairs = Pairs.forgiving(CAPTIONS)
    # Image 0 shares a caption with 1 and another with 2; 1 and 2 share none.
    assert [own.tolist() for own in pairs.texts] == [[0, 1, 2, 5], [0, 2], [1, 3, 4, 5]]
    assert [own.tolist() for own in pairs.images] == [[0, 1], [0, 2], [0, 1], [2], [2], [0, 2]]


def test_an_image_without_a_text_is_told():
    with pytest.raises(ValueError, match="got 1 of 2 images without"):
        Pairs.strict([("a",), ()])


def test_image_to_text_counts_the_best_of_its_captions():
    # Karpathy and Fei-Fei's protocol, counted once more with full sorts.
    images, texts = unit(40, 6), unit(200, 6, seed=1)
    pairs = Pairs.strict([tuple(f"{n} {k}" for k in range(5)) for n in range(40)])
    order = (images @ texts.T).argsort(dim=1, descending=True)
    best = [min((order[n] == text).nonzero().item() for text in range(5 * n, 5 * n + 5)) + 1 for n in range(40)]
    ours = rank_matches(images, texts, pairs.texts).rank
    # The other captions of the image don't stand in the way of the best one.
    assert ours.tolist() == best
    back = (texts @ images.T).argsort(dim=1, descending=True)
    alone = [(back[t] == t // 5).nonzero().item() + 1 for t in range(200)]
    assert rank_matches(texts, images, pairs.images).rank.tolist() == alone


@pytest.mark.parametrize("several", [False, True])
def test_both_ways_at_once_are_each_way_alone(several):
    captions = [tuple(f"{n} {k}" for k in range(3 if several else 1)) for n in range(40)]
    pairs = Pairs.strict(captions)
    images, texts = unit(40, 6), unit(len(pairs.owner), 6, seed=1)
    there, back = rank_both(images, texts, pairs)
    assert there.rank.tolist() == rank_matches(images, texts, pairs.texts).rank.tolist()
    assert back.rank.tolist() == rank_matches(texts, images, pairs.images).rank.tolist()


def test_the_interval_knows_that_captions_of_one_image_go_together():
    # 50 images of 20 captions that agree: as wide as for 50 queries, and not as for 1000.
    rng = np.random.default_rng(0)
    hits = (rng.random(50) < 0.5).astype(float)
    clustered = by_image(np.repeat(hits, 20), np.repeat(np.arange(50), 20))
    single = by_image(hits, np.arange(50))
    assert clustered.value == pytest.approx(single.value)
    assert clustered.high - clustered.low == pytest.approx(single.high - single.low)
    mixed = by_image(np.array([1.0, 0.0, 0.0, 0.0]), np.array([0, 1, 1, 1]))
    assert mixed.value == 0.25  # over queries, not over images


@pytest.mark.parametrize("several", [False, True])
def test_shuffled_pairs_score_chance(several):
    count = 150
    captions = [tuple(f"{n // 3} {k}" for k in range(3 if several else 1)) for n in range(count)]
    images = unit(count, 16)
    texts = images.repeat_interleave(3 if several else 1, dim=0)
    pairs = Pairs.forgiving(captions)
    found = control(images, texts, pairs, seed=0)
    expected = chance([len(own) for own in pairs.texts], len(texts), 10)
    assert found.chance_at_10 == pytest.approx(expected)
    assert found.recall_at_10.value == pytest.approx(expected, abs=0.02)
    assert found.recall_at_10.low <= expected <= found.recall_at_10.high
    assert rank_matches(images, texts, pairs.texts).rank.max() == 1  # the pairs themselves are perfect
