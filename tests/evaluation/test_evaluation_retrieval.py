import pytest
import torch

from mm.evaluation.retrieval import chance, equal_texts, ranks, retrieval, shuffled


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_a_perfect_model_reads_one():
    # In float32 at awkward sizes: the positive's score must come from the same tile (elsewhere 0.6 was seen).
    items = unit(1003, 77)
    assert retrieval(items, items).recall_at_1 == 1.0
    assert (ranks(items, items, tile=97) == 1).all()


def test_ranks_equal_a_full_sort():
    queries, items = unit(60, 8), unit(60, 8, seed=1)
    scores = queries @ items.T
    expected = (scores > scores.diagonal()[:, None]).sum(dim=1) + 1
    assert torch.equal(ranks(queries, items, tile=7), expected)


def test_constant_embeddings_are_not_better_than_chance():
    constant = torch.ones(200, 4)
    assert retrieval(constant, constant).recall_at_10.value == 0.0
    assert retrieval(constant, constant).median_rank == pytest.approx(100, abs=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_no_numbers_are_refused(value):
    broken = unit(20, 4)
    broken[3, 1] = value
    for pair in ((broken, unit(20, 4)), (unit(20, 4), broken)):
        with pytest.raises(ValueError, match=r"must be finite, got 1 rows"):
            retrieval(*pair)


def test_equal_texts_are_all_right():
    texts = ["No finding.", "no  finding.", "A nodule."]
    positive = equal_texts(texts)
    assert positive.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    items = torch.eye(3)
    swapped = items[[1, 0, 2]]
    assert retrieval(swapped, items, positive).recall_at_1 == 1.0
    assert retrieval(swapped, items).recall_at_1 == pytest.approx(1 / 3)


def test_shuffled_pairs_score_chance():
    items = unit(500, 16)
    positive = torch.eye(500, dtype=torch.bool)
    scores = [shuffled(items, items, positive, seed=seed).recall_at_10.value for seed in range(8)]
    assert sum(scores) / len(scores) == pytest.approx(10 / 500, abs=0.012)
    assert chance(positive, 10) == pytest.approx(10 / 500)
