"""Scores of single items, kept in results.json, so that a later run can be compared with an earlier one.

A p from two intervals that overlap says little; from the same items scored twice, paired randomisation says a lot.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mm.evaluation.paired import paired_p


@dataclass(frozen=True)
class Items:
    """What was scored, one by one.

    Attributes:
        ids: Of the items, in their order.
        scores: Of each item, by measure; higher is better.
    """

    ids: tuple[str, ...] = ()
    scores: Mapping[str, Float[np.ndarray, " N"]] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """As results.json keeps it."""
        return {"ids": list(self.ids), "scores": {name: values.tolist() for name, values in self.scores.items()}}


@dataclass(frozen=True)
class Against:
    """An earlier run: who it was, and its items."""

    who: str
    items: Items


def read_items(path: Path) -> Against:
    """What an earlier results.json holds.

    Raises:
        ValueError: It is no results.json, or one without scores of single items.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        items = content["items"]
        ids = tuple(map(str, items["ids"]))
        scores = {str(name): np.array(values, dtype=np.float64) for name, values in items["scores"].items()}
        who = str(content["facts"].get("checkpoint", "the other run"))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"against: {path.name!r} is no results.json with scores of single items") from error
    if not scores or any(values.shape != (len(ids),) for values in scores.values()):
        raise ValueError(f"against: {path.name!r} must have one score of each of its {len(ids)} items")
    return Against(who, Items(ids, scores))


def compare(ours: Items, theirs: Items) -> dict[str, dict[str, float]]:
    """Means of both and p of the difference, for each measure that both have.

    Raises:
        ValueError: They are of other items, or have no measure in common.
    """
    if ours.ids != theirs.ids:
        raise ValueError(f"against: the other run is of other items ({len(theirs.ids)} of them, here {len(ours.ids)}); "
                         "score both on the same split")  # fmt: skip
    shared = [name for name in ours.scores if name in theirs.scores]
    if not shared:
        raise ValueError(f"against: the other run must have one of {', '.join(ours.scores)}; "
                         f"got {', '.join(theirs.scores)}")  # fmt: skip
    return {
        name: {
            "ours": float(ours.scores[name].mean()),
            "theirs": float(theirs.scores[name].mean()),
            "p": paired_p(ours.scores[name], theirs.scores[name]),
        }
        for name in shared
    }
