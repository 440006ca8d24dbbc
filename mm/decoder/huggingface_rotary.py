"""Rotary positions in a config.json: `rope_parameters` as transformers 5 writes them, or the older `rope_scaling`."""

from typing import Any, Final

from mm.decoder.huggingface_entries import Entries
from mm.decoder.rotary_scaling import Kind, RotaryScaling
from mm.decoder.told import short

KINDS: Final[tuple[Kind, ...]] = ("linear", "llama3", "yarn")


def read_rotary(read: Entries, *, context: int) -> tuple[float, RotaryScaling | None]:
    """Base and scaling.

    Args:
        read: Of the whole config.json.
        context: Longest sequence, which transformers takes for the original one where that isn't given.

    Raises:
        ValueError: An unknown kind of scaling, wrong numbers, or two places that contradict each other.
    """
    rope = _rope(read)
    for where in (rope, read):
        where.only({"partial_rotary_factor": 1})
    base = (read if rope.entries.get("rope_theta") is None else rope).number("rope_theta")
    named = _kind(rope.entries)
    if named == "default":
        return base, None
    kind = next((known for known in KINDS if known == named), None)
    if kind is None:
        raise ValueError(f"config.json: rope_type must be one of default, {', '.join(KINDS)}, got {short(named)}")
    original = rope.integer("original_max_position_embeddings", default=context) if kind != "linear" else 0
    if original:
        read.only({"original_max_position_embeddings": original})
    llama3 = kind == "llama3"
    return base, RotaryScaling(
        kind,
        rope.number("factor"),
        original_context=original,
        slow=rope.number("low_freq_factor") if llama3 else rope.number("beta_slow", default=1.0),
        fast=rope.number("high_freq_factor") if llama3 else rope.number("beta_fast", default=32.0),
        attention_factor=None if rope.entries.get("attention_factor") is None else rope.number("attention_factor"),
        mscale=rope.number("mscale") if rope.entries.get("mscale") else 0.0,
        mscale_all_dim=rope.number("mscale_all_dim") if rope.entries.get("mscale_all_dim") else 0.0,
        truncate=rope.flag("truncate", default=True),
    )


def rotary_entries(base: float, scaling: RotaryScaling | None) -> dict[str, Any]:
    """What stands under `rope_parameters`."""
    if scaling is None:
        return {"rope_theta": base, "rope_type": "default"}
    entries: dict[str, Any] = {"rope_theta": base, "rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return entries
    entries["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        return entries | {"low_freq_factor": scaling.slow, "high_freq_factor": scaling.fast}
    entries |= {"beta_slow": scaling.slow, "beta_fast": scaling.fast, "truncate": scaling.truncate}
    if scaling.attention_factor is not None:
        entries["attention_factor"] = scaling.attention_factor
    if scaling.mscale:
        entries |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return entries


def _rope(read: Entries) -> Entries:
    """The one object that holds the settings; two that say the same may stand in the file."""
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        rope = read.entries.get(name) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"config.json: {name} must be an object, got {short(rope)}")
        if rope:
            found.append(rope)
    if len(found) == 2:
        one, other = ({k: v for k, v in r.items() if k not in ("type", "rope_theta")} for r in found)
        if one | {"rope_type": _kind(found[0])} != other | {"rope_type": _kind(found[1])}:
            raise ValueError(
                f"config.json: rope_scaling {short(found[1])} contradicts rope_parameters {short(found[0])}"
            )
    return Entries(found[0] if found else {})


def _kind(rope: dict[str, Any]) -> object:
    return rope.get("rope_type", rope.get("type", "default"))
