"""The entries of a config.json, each checked when it is asked for: the file may come from anywhere."""

import sys
from typing import Any, Final

from mm.decoder.told import short

MOST: Final = {
    "num_hidden_layers": 2**10,
    "num_experts": 2**12,
    "n_routed_experts": 2**12,
    "n_shared_experts": 2**10,
    "vocab_size": 2**22,
    "max_position_embeddings": 2**26,
    "original_max_position_embeddings": 2**26,
    "kv_lora_rank": 2**16,
    "q_lora_rank": 2**16,
    "qk_nope_head_dim": 2**16,
    "qk_rope_head_dim": 2**16,
    "v_head_dim": 2**16,
}
WIDEST: Final = 2**20
"""Any other whole number's limit."""


class Entries:
    """The entries of a config.json, or of an object in it.

    Every method raises ValueError where an entry is none of what it says.
    """

    def __init__(self, entries: dict[str, Any]) -> None:
        self.entries = entries

    def integer(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A whole number under the first of these names that is there."""
        value = next((self.entries[name] for name in names if self.entries.get(name) is not None), default)
        most = MOST.get(names[0], WIDEST)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"config.json: {names[0]} must be a whole number {least}..{most}, got {short(value)}")
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        """A positive number."""
        value = default if self.entries.get(name) is None else self.entries[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise ValueError(f"config.json: {name} must be a positive number, got {short(value)}")
        return float(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self.entries.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {name} must be true or false, got {short(value)}")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """Whole numbers, one of them, or none."""
        value = self.entries.get(name)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if len(items) > MOST["num_hidden_layers"] or not all(type(item) is int and item >= 0 for item in items):
            raise ValueError(f"config.json: {name} must be whole numbers from 0, got {short(value)}")
        return tuple(items)

    def only(self, settings: dict[str, Any]) -> None:
        """Refuses settings that have another value than the one we compute; absent and null mean that value."""
        for name, only in settings.items():
            if self.entries.get(name, only) not in (only, None):
                raise ValueError(f"config.json: {name} must be {only!r}, got {short(self.entries[name])}")
