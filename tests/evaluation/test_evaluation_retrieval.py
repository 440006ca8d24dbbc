import pytest
import torch

from mm.evaluation import both_ways
from mm.evaluation.both_ways import rank_pairs
from mm.evaluation.retrieval import Retrieval, chance


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def retrieval(queries: torch.Tensor, items: torch.Tensor) -> Retrieval:
    return Retrieval.of(rank_pairs(queries, items)[0].rank, chance_at_10=chance([1] * len(queries), len(items), 10))


def test_a_perfect_model_reads_one(monkeypatch):
    # In float32 at awkward sizes: the positive's score must come from the same tile (elsewhere 0.6 was seen).
    items = unit(1003, 77)
    assert retrieval(items, items).recall_at_1 == 1.0
    monkeypatch.setattr(both_ways, "_TILE_BYTES", 4 * 97**2)
    assert retrieval(items, items).recall_at_1 == 1.0


def test_ranks_equal_a_full_sort(monkeypatch):
    monkeypatch.setattr(both_ways, "_TILE_BYTES", 4 * 7**2)
    queries, items = unit(60, 8), unit(60, 8, seed=1)
    scores = queries @ items.T
    expected = (scores > scores.diagonal()[:, None]).sum(dim=1) + 1
    assert rank_pairs(queries, items)[0].rank.tolist() == expected.tolist()


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


def test_chance_is_that_of_drawing_without_putting_back():
    assert chance([1] * 500, 500, 10) == pytest.approx(10 / 500)
    assert chance([2], 5, 2) == pytest.approx(1 - 3 / 10)  # of ten pairs three hold neither
    assert chance([1, 2], 5, 2) == pytest.approx((0.4 + 0.7) / 2)
    assert chance([1], 4, 10) == 1.0
