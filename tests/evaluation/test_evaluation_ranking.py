import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from mm.evaluation import both_ways
from mm.evaluation.both_ways import rank_pairs
from mm.evaluation.ranking import Ranking, rank_matches, text_groups

NUMBER = 60


def embeddings(seed: int, *, levels: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and items; few levels make many ties."""
    generator = torch.Generator().manual_seed(seed)
    if levels is None:
        return torch.randn(NUMBER, 8, generator=generator), torch.randn(NUMBER, 8, generator=generator)
    drawn = torch.randint(0, levels, (2, NUMBER, 3), generator=generator).float()
    return drawn[0], drawn[1]


def rank_groups(queries, items, query_groups, item_groups, *, depth=None) -> Ranking:
    """Items match the queries of their group."""
    matches = [np.flatnonzero(item_groups == group) for group in query_groups]
    return rank_matches(queries, items, matches, depth=depth)


@pytest.fixture(params=["distinct", "tied", "all alike"])
def pair(request):
    return {
        "distinct": embeddings(0),
        "tied": embeddings(1, levels=2),
        "all alike": (torch.ones(NUMBER, 3), torch.ones(NUMBER, 3)),
    }[request.param]


@pytest.fixture(params=["strict", "duplicates"])
def groups(request):
    return np.arange(NUMBER) if request.param == "strict" else np.random.default_rng(0).integers(0, 9, NUMBER)


@pytest.mark.parametrize("depth", [None, 10])
def test_precision_and_ndcg_are_scikit_learns(pair, groups, depth):
    metrics = pytest.importorskip("sklearn.metrics")
    scores = (pair[0] @ pair[1].T).numpy()
    relevant = groups[:, None] == groups[None, :]
    ours = rank_groups(*pair, groups, groups, depth=depth)
    for n in range(NUMBER):
        assert ours.average_precision[n] == pytest.approx(
            metrics.average_precision_score(relevant[n], scores[n]), abs=1e-9
        )
        theirs = metrics.ndcg_score(relevant[n : n + 1].astype(float), scores[n : n + 1], k=depth)
        assert ours.ndcg[n] == pytest.approx(theirs, abs=1e-9)


def test_ranks_are_those_of_counting(pair, groups):
    relevant = torch.from_numpy(groups[:, None] == groups[None, :])
    found = rank_groups(*pair, groups, groups).rank
    scores = pair[0] @ pair[1].T
    for n in range(NUMBER):
        best = scores[n][relevant[n]].max()
        others = scores[n][~relevant[n]]
        assert found[n] == 1 + (others > best).sum() + ((others == best).sum() + 1) // 2


def test_fewer_queries_than_items():
    queries, items = embeddings(3)
    groups = np.arange(NUMBER)
    some = rank_groups(queries[:7], items, groups[:7], groups)
    every = rank_groups(queries, items, groups, groups)
    assert some.rank.tolist() == every.rank[:7].tolist()
    assert some.average_precision == pytest.approx(1 / some.rank)


def test_a_perfect_model_reads_one():
    # In float32 at awkward sizes: the match's score must come from the same tile.
    items = torch.nn.functional.normalize(torch.randn(1003, 77, generator=torch.Generator().manual_seed(0)), dim=-1)
    result = rank_groups(items, items, np.arange(1003), np.arange(1003))
    assert (result.rank == 1).all()
    assert result.ndcg.min() == 1


@pytest.fixture(params=[None, 7, 20], ids=["one tile", "tiles that don't fit", "tiles that fit"])
def tiled(request, monkeypatch):
    """Tiles of so many rows and columns."""
    if request.param is not None:
        monkeypatch.setattr(both_ways, "_TILE_BYTES", 4 * request.param**2)


@pytest.mark.usefixtures("tiled")
def test_both_ways_from_one_product_are_what_two_products_say(pair):
    groups = np.arange(NUMBER)
    found = rank_pairs(*pair)
    for ours, expected in zip(
        found, (rank_groups(*pair, groups, groups), rank_groups(*pair[::-1], groups, groups)), strict=True
    ):
        assert ours.rank.tolist() == expected.rank.tolist()
        assert ours.average_precision == pytest.approx(expected.average_precision, abs=1e-12)
        assert ours.ndcg == pytest.approx(expected.ndcg, abs=1e-12)


@pytest.mark.parametrize("route", ["oneDNN", "stock"])
@pytest.mark.parametrize(("number", "width"), [(1003, 77), (1531, 129), (2900, 33)])
def test_both_ways_a_perfect_model_reads_one_and_a_constant_one_chance(number, width, route, monkeypatch):
    # Several tiles at awkward sizes: what is multiplied elsewhere must not round otherwise.
    if route == "stock":
        monkeypatch.setattr(both_ways, "onednn_matmul", nullcontext)
    items = torch.nn.functional.normalize(
        torch.randn(number, width, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    for ranking in rank_pairs(items, items):
        assert (ranking.rank == 1).all()
    for ranking in rank_pairs(items[:1].expand(number, -1), items[:1].expand(number, -1)):
        assert (ranking.rank == 1 + number // 2).all()


def test_both_ways_tells_what_is_not_finite():
    first, second = embeddings(0)
    with pytest.raises(ValueError, match="second must be finite, got 1 rows"):
        rank_pairs(first, second.index_fill(0, torch.tensor([2]), torch.nan))


def test_what_cannot_be_ranked_is_told():
    queries, items = embeddings(0)
    groups = np.arange(NUMBER)
    with pytest.raises(ValueError, match="got 60 without"):
        rank_groups(queries, items, groups + NUMBER, groups)
    with pytest.raises(ValueError, match="items must be finite, got 1 rows"):
        rank_groups(queries, items.index_fill(0, torch.tensor([2]), torch.nan), groups, groups)


def test_equal_texts_are_one_group():
    assert text_groups(["No finding.", "no  finding.", "A nodule."]).tolist() == [0, 0, 1]


MEASURE = """
import re, sys
import numpy as np, torch
from mm.evaluation.both_ways import rank_pairs
from mm.evaluation.ranking import rank_matches
torch.set_num_threads(1)
number, width, queries = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
items = torch.randn(number, width)
matches = [np.arange(5 * (n // 5), 5 * (n // 5) + 5) for n in range(queries)]
def peak():  # of this process alone: ru_maxrss begins at the peak of the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
rank_pairs(items[:64], items[:64])  # what libraries take once isn't of a size
open("/proc/self/clear_refs", "w").write("5")  # the peak is now what is in use
before = peak()
if sys.argv[1] == "rank_pairs":
    rank_pairs(items, items.flip(1))
else:
    rank_matches(items[:queries], items, matches)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("what", ["rank_matches", "rank_pairs"])
def test_25000_items_need_less_than_64_mb(what):
    # A tile is what it needs, however many queries follow; 250 are three tiles.
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, what, "25000", "64", "250"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert float(done.stdout) < 64
