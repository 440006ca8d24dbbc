"""The history head: grown or new is told where a finding is, by what the prior shows there."""

import pytest
import torch
from torch import Tensor

from mm import ontology
from mm.finding_maps import NUM_FINDINGS, NUM_SLOTS, Maps
from mm.history import NEARBY, REACH, HistoryHead, nearby

NODULE = ontology.INDEX["nodule"]
GRID = (6, 8, 8)
EMPTY = -6.0


def make_maps(logits: Tensor, *, study: list[int], visit: list[int]) -> Maps:
    """Maps that hold nothing but logits [N K z y x]."""
    N = len(logits)
    return Maps(
        study=torch.tensor(study),
        visit=torch.tensor(visit),
        features=torch.zeros(N, 4, *GRID),
        maps=logits,
        fill=torch.zeros(N, NUM_FINDINGS, *GRID),
        side=torch.zeros(N, *GRID),
        presence=torch.zeros(N, NUM_FINDINGS, NUM_SLOTS),
        sizes=torch.zeros(N, NUM_FINDINGS, NUM_SLOTS),
        centers=torch.zeros(N, NUM_FINDINGS, NUM_SLOTS, 3),
        summary=torch.zeros(N, NUM_FINDINGS, 3 * NUM_SLOTS),
        evidence=torch.zeros(N, NUM_FINDINGS, 16),
    )


def pair(now: dict[tuple[int, int, int], float], then: dict[tuple[int, int, int], float]) -> Maps:
    logits = torch.full((2, NUM_FINDINGS, *GRID), EMPTY)
    for visit, cells in enumerate((now, then)):
        for cell, logit in cells.items():
            logits[(visit, NODULE, *cell)] = logit
    return make_maps(logits, study=[0, 0], visit=[0, 1])


def greatest(maps: Maps) -> Tensor:
    """Greatest logits of the nodule: [place (now's, then's), visit (now, then), window (narrow, wide)]."""
    seen = nearby(maps, torch.tensor([[0, 1]]))
    assert seen.shape == (1, NUM_FINDINGS, 2 * 2 * 2 * NEARBY)
    return 4 * seen[0, NODULE].reshape(2, 2, 2, NEARBY).transpose(0, 1)[..., 0]


def test_both_visits_are_seen_where_either_shows_most() -> None:
    here, there, elsewhere = (1, 2, 2), (1, 3, 2), (4, 6, 6)
    grown = greatest(pair({here: 5.0}, {there: -1.0, elsewhere: 2.0}))
    assert grown[0].tolist() == [[5.0, 5.0], [-1.0, -1.0]]  # a faint spot beside it in the prior
    assert grown[1].tolist() == [[EMPTY, EMPTY], [2.0, 2.0]]  # where the prior shows most there is nothing now
    new = greatest(pair({here: 5.0}, {elsewhere: 2.0}))
    assert new[0].tolist() == [[5.0, 5.0], [EMPTY, EMPTY]]


@pytest.mark.parametrize(("apart", "seen"), [(1, [3.0, 3.0]), (REACH, [EMPTY, 3.0]), (REACH + 1, [EMPTY, EMPTY])])
def test_windows_reach_one_and_two_cells(apart: int, seen: list[float]) -> None:
    assert greatest(pair({(2, 2, 2): 5.0}, {(2, 2 + apart, 2): 3.0}))[0, 1].tolist() == seen


def test_a_place_at_the_border_is_seen() -> None:
    assert greatest(pair({(0, 0, 0): 5.0}, {(0, 1, 0): 3.0}))[0].tolist() == [[5.0, 5.0], [3.0, 3.0]]


def test_other_studies_and_missing_priors_change_nothing() -> None:
    torch.manual_seed(0)
    head = HistoryHead(16, 8).eval()
    logits = torch.randn(3, NUM_FINDINGS, *GRID)
    days = torch.tensor([[0.0, 90.0], [0.0, 0.0]])
    both = head(make_maps(logits, study=[0, 1, 0], visit=[0, 0, 1]), count=torch.tensor([2, 1]), days=days)
    alone = head(make_maps(logits[[2, 0]], study=[0, 0], visit=[1, 0]), count=torch.tensor([2]), days=days[:1])
    assert torch.allclose(both.change[0], alone.change[0], atol=1e-6)
    assert both.known.tolist() == [True, False]
    assert (both.change[1].argmax(-1) == ontology.CHANGES.index("unknown")).all()
    followed = torch.tensor([item.followed for item in ontology.FINDINGS])
    assert torch.equal(both.change[0].argmax(-1) != ontology.CHANGES.index("unknown"), followed)
