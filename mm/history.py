"""What became of each finding since the last prior: an LSTM over the visits, and beside it a look at both pictures.

Two visits of one patient are compared where either shows a finding most: a nodule that has grown was there before,
fainter than anything one would call, and one that is new was not. Sums over the whole picture can't tell these two
apart, for vessels fill them.
"""

from dataclasses import dataclass
from itertools import product
from typing import Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mm import ontology
from mm.batch import Movable
from mm.encoders.temporal import TemporalLSTM
from mm.finding_maps import NUM_FINDINGS, NUM_SLOTS, Maps

IMPOSSIBLE: Final = -1e4
"""A logit of probability 0 that stays finite in every precision."""
FOLLOWED: Final = tuple(item.followed for item in ontology.FINDINGS)
REACH: Final = 2
"""Cells around a place that are compared. A patient who lies turned by 10 degrees moves by as much at 7 cm."""
NEARBY: Final = 5
"""Numbers that are read from a map around a place, by window."""


@dataclass(frozen=True)
class History(Movable):
    """What the visits say of the course of each finding. It comes from volumes alone.

    Attributes:
        values: State of the LSTM at the current visit.
        change: Logits in the order of `ontology.CHANGES`.
        before: Logit that the last prior shows the finding; impossible without priors.
        known: Which studies have a prior.
    """

    values: Float[Tensor, "B K H"]
    change: Float[Tensor, "B K C"]
    before: Float[Tensor, "B K"]
    known: Bool[Tensor, " B"]


class HistoryHead(nn.Module):
    """The course over the visits' evidence, and the comparison with the last prior.

    Args:
        width: Of evidence.
        hidden: Of the LSTM.
    """

    followed: Tensor

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lstm = TemporalLSTM(width, hidden)
        self.name = nn.Embedding(NUM_FINDINGS, 16)
        classes = len(ontology.CHANGES) - 1
        # Two places, seen in two visits, through two windows; then sums by slot and their differences, two logits.
        compared = 2 * 2 * 2 * NEARBY + 2 * 3 * NUM_SLOTS + 2
        self.compare = nn.Sequential(nn.Linear(compared + 16, 64), nn.GELU(), nn.Linear(64, classes))
        self.course = nn.Linear(hidden, classes)
        self.register_buffer("followed", torch.tensor(FOLLOWED), persistent=False)

    def forward(self, maps: Maps, *, count: Int[Tensor, " B"], days: Float[Tensor, "B V"]) -> History:
        """The course of each finding.

        Args:
            maps: Of all visits.
            count: Visits a study has.
            days: How long before the current visit each was.
        """
        size, visits = days.shape
        at = (maps.study, maps.visit)
        with torch.autocast(days.device.type, enabled=False):
            values = self.lstm(scatter(maps.evidence, at, (size, visits)), count=count, days=days).float()
            logits = scatter(maps.presence[..., 0], at, (size, visits))
            summary = scatter(maps.summary, at, (size, visits))
            known = count > 1
            last = min(1, visits - 1)
            change, before = no_history(size, days.device)
            if bool(known.any()):
                row = scatter(torch.arange(len(maps.study), device=days.device), at, (size, visits))
                pictures = row[known][:, [0, last]]
                now, then = summary[known, 0], summary[known, last]
                both = torch.stack([logits[known, 0], logits[known, last]], dim=-1)
                name = self.name.weight.expand(len(pictures), -1, -1)
                said = self.compare(torch.cat([nearby(maps, pictures), now, now - then, both, name], dim=-1))
                said = said + self.course(values[known])
                said = torch.cat([torch.full_like(said[..., :1], IMPOSSIBLE), said], dim=-1)
                said = torch.where(self.followed[:, None], said, change[known])
                change = change.index_put((known,), said)
                before = before.index_put((known,), logits[known, last])
        return History(values, change, before, known)


def nearby(maps: Maps, pictures: Int[Tensor, "M 2"]) -> Float[Tensor, "M K U"]:
    """What both visits show around the place where either shows each finding most.

    Args:
        maps: Of all visits.
        pictures: Index of the current and of the earlier picture of each pair.

    Returns:
        For both places, in both visits, within one cell and within `REACH` cells: the greatest logit, how many cells
        are sure and filled, how many are likely and filled (logarithms, and all of them of order 1).
    """
    shape = maps.maps.shape[2:]
    logits, fill = maps.maps[pictures].flatten(3), maps.fill[pictures].flatten(3)  # [M visit K cells]
    places = torch.stack(torch.unravel_index(logits.argmax(-1), shape), dim=-1)  # [M visit K d]
    steps = torch.tensor(list(product(range(-REACH, REACH + 1), repeat=len(shape))), device=logits.device)
    last = torch.tensor(shape, device=logits.device) - 1
    cells = torch.minimum((places[..., None, :] + steps).clamp(min=0), last)  # beyond the border the border goes on
    index = torch.zeros_like(cells[..., 0])
    for axis, length in enumerate(shape):
        index = index * length + cells[..., axis]
    index = index.transpose(1, 2).flatten(2)[:, None].expand(-1, 2, -1, -1)  # [M visit K place*steps]
    grid = (*index.shape[:3], 2, len(steps))
    seen = [values.gather(3, index).reshape(grid) for values in (logits, fill.sigmoid())]
    parts = []
    for inside in (steps.abs().amax(-1) <= 1, steps.abs().amax(-1) <= REACH):
        here, filled = (values[..., inside] for values in seen)
        sure, likely = (3 * here).sigmoid(), here.sigmoid()
        parts += [
            here.amax(-1),
            (sure.sum(-1) + 0.5).log(),
            ((sure * filled).sum(-1) + 0.1).log(),
            (likely.sum(-1) + 0.1).log(),
            ((likely * filled).sum(-1) + 0.1).log(),
        ]
    return torch.stack(parts, dim=-1).movedim(2, 1).flatten(2) / 4


def no_history(size: int, device: torch.device) -> tuple[Float[Tensor, "B K C"], Float[Tensor, "B K"]]:
    """Change and presence in the prior of studies without one: unknown, and impossible."""
    change = torch.full((size, NUM_FINDINGS, len(ontology.CHANGES)), IMPOSSIBLE, device=device)
    change[..., ontology.CHANGES.index("unknown")] = 0
    return change, torch.full((size, NUM_FINDINGS), IMPOSSIBLE, device=device)


def scatter(values: Tensor, at: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
    """Rows to their places in a batch; zeros elsewhere."""
    return values.new_zeros(*shape, *values.shape[1:]).index_put(at, values)
