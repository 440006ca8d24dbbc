"""How a value and a list of names from somebody's file stand in an error: cut short."""

from collections.abc import Iterable
from typing import Final

LONGEST: Final = 60
MOST: Final = 5
"""So many names are told."""


def short(value: object) -> str:
    """A value."""
    told = repr(value)
    return told if len(told) <= LONGEST else f"{told[: LONGEST - 3]}..."


def listed(names: Iterable[str]) -> str:
    """The first few names in their order, and how many more."""
    every = sorted(names)
    more = f" and {len(every) - MOST} more" if len(every) > MOST else ""
    return ", ".join(name[:100] for name in every[:MOST]) + more
