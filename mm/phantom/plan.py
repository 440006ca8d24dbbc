"""How a followed finding comes and goes over the visits."""

import math
from dataclasses import dataclass

import numpy as np

from mm.phantom.table import TABLE

FOLLOWED = ("nodule", "consolidation", "atelectasis", "effusion", "pneumothorax")


CHANGED = ("new", "larger", "stable", "smaller")


@dataclass(frozen=True)
class Plan:
    """A followed finding over the visits: factors on the current size (None: absent in that visit)."""

    change: str
    factors: tuple[float | None, ...]

    @property
    def present(self) -> bool:
        """Whether the current visit shows it."""
        return self.factors[0] is not None

    @property
    def ever(self) -> bool:
        """Whether any visit shows it."""
        return any(item is not None for item in self.factors)

    @property
    def largest(self) -> float:
        """The largest factor."""
        return max((item for item in self.factors if item is not None), default=0.0)

    def sizes(self, size: float, *, cap: float) -> tuple[float | None, ...]:
        """Sizes in each visit; a capped one still differs by the least factor that counts as a change."""
        return tuple(None if item is None else min(size * item, max(cap, size)) for item in self.factors)


def draw_plan(rng: np.random.Generator, code: str, visits: int) -> Plan:
    """Presence and change of one followed finding; each of the five changes is .2 of the change labels."""
    prevalence = dict(TABLE.prevalence)[code]
    present = bool(rng.random() < prevalence)
    pick, resolves = CHANGED[int(rng.integers(4))], bool(rng.random() < prevalence / (4 * (1 - prevalence)))
    factor = math.exp(rng.uniform(*np.log(TABLE.changed_factor)))
    drift = rng.uniform(*TABLE.stable_factor, size=visits)
    if visits == 1:
        return Plan("unknown", (1.0 if present else None,))
    if present and pick == "new":
        return Plan("new", (1.0, *[None] * (visits - 1)))
    first = {"larger": 1.0 / factor, "stable": float(drift[0]), "smaller": factor}[pick] if present else 1.0
    earlier = tuple(first * float(np.prod(drift[1:index])) for index in range(1, visits))
    if present:
        return Plan(pick, (1.0, *earlier))
    return Plan("resolved", (None, *earlier)) if resolves else Plan("unknown", (None,) * visits)
