import subprocess
import sys

import numpy as np
import pytest
import torch

from mm.evaluation.ranking import rank_all, text_groups
from mm.evaluation.retrieval import ranks

NUMBER = 60


def embeddings(seed: int, *, levels: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and items; few levels make many ties."""
    generator = torch.Generator().manual_seed(seed)
    if levels is None:
        return torch.randn(NUMBER, 8, generator=generator), torch.randn(NUMBER, 8, generator=generator)
    drawn = torch.randint(0, levels, (2, NUMBER, 3), generator=generator).float()
    return drawn[0], drawn[1]


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
    ours = rank_all(*pair, groups, groups, depth=depth)
    for n in range(NUMBER):
        assert ours.average_precision[n] == pytest.approx(
            metrics.average_precision_score(relevant[n], scores[n]), abs=1e-9
        )
        theirs = metrics.ndcg_score(relevant[n : n + 1].astype(float), scores[n : n + 1], k=depth)
        assert ours.ndcg[n] == pytest.approx(theirs, abs=1e-9)


def test_ranks_are_those_of_counting(pair, groups):
    relevant = torch.from_numpy(groups[:, None] == groups[None, :])
    expected = ranks(*pair, relevant)
    scores = pair[0] @ pair[1].T
    for n in range(NUMBER):  # counted once more by hand
        best = scores[n][relevant[n]].max()
        others = scores[n][~relevant[n]]
        assert expected[n] == 1 + (others > best).sum() + ((others == best).sum() + 1) // 2
    assert rank_all(*pair, groups, groups).rank.tolist() == expected.tolist()


def test_fewer_queries_than_items():
    queries, items = embeddings(3)
    groups = np.arange(NUMBER)
    some = rank_all(queries[:7], items, groups[:7], groups)
    every = rank_all(queries, items, groups, groups)
    assert some.rank.tolist() == every.rank[:7].tolist()
    assert some.average_precision == pytest.approx(1 / some.rank)


def test_a_perfect_model_reads_one():
    # In float32 at awkward sizes: the match's score must come from the same tile.
    items = torch.nn.functional.normalize(torch.randn(1003, 77, generator=torch.Generator().manual_seed(0)), dim=-1)
    result = rank_all(items, items, np.arange(1003), np.arange(1003))
    assert (result.rank == 1).all()
    assert result.ndcg.min() == 1


def test_what_cannot_be_ranked_is_told():
    queries, items = embeddings(0)
    groups = np.arange(NUMBER)
    with pytest.raises(ValueError, match="got 60 without"):
        rank_all(queries, items, groups + NUMBER, groups)
    with pytest.raises(ValueError, match="items must be finite, got 1 rows"):
        rank_all(queries, items.index_fill(0, torch.tensor([2]), torch.nan), groups, groups)


def test_equal_texts_are_one_group():
    assert text_groups(["No finding.", "no  finding.", "A nodule."]).tolist() == [0, 0, 1]


MEASURE = """
import resource, sys
import numpy as np, torch
from mm.evaluation.ranking import rank_all
from mm.evaluation.retrieval import ranks
torch.set_num_threads(1)
number, width, queries = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
items = torch.randn(number, width)
groups = np.arange(number) // 5
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.randn(64, width) @ torch.randn(width, 64)
before = peak()
if sys.argv[1] == "ranks":
    ranks(items[:queries], items)
else:
    rank_all(items[:queries], items, groups[:queries], groups)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.parametrize("what", ["ranks", "rank_all"])
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
