"""The metadata of a GGUF file to `LanguageConfig`; what we can't compute is refused by name."""

import math
from typing import Any, Final, Literal

import numpy as np

from mm.decoder.gguf_file import GgufHeader
from mm.decoder.language_config import LanguageConfig
from mm.decoder.told import listed, short

Architecture = Literal["llama", "qwen3", "qwen3moe", "olmoe"]
ARCHITECTURES: Final[tuple[Architecture, ...]] = ("llama", "qwen3", "qwen3moe", "olmoe")
WIDEST: Final = 2**20
MOST: Final = {"block_count": 2**10, "expert_count": 2**12, "context_length": 2**26}
ONLY: Final[dict[str, tuple[object, ...]]] = {
    "rope.scaling.type": ("none",),
    "attention.causal": (True,),
    "expert_shared_count": (0,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0.0,),
    "logit_scale": (1.0,),
}
"""Settings that change the result and of which we know one value; absent means that value."""
SILENT: Final = frozenset({"vocab_size", "rope.scaling.original_context_length", "tensor_data_layout"})
"""Settings that say nothing more."""


class _Settings:
    """The metadata of an architecture, each entry checked when it is asked for."""

    def __init__(self, metadata: dict[str, Any], architecture: str) -> None:
        self.prefix = f"{architecture}."
        self.entries = {
            key.removeprefix(self.prefix): value for key, value in metadata.items() if key.startswith(self.prefix)
        }
        self.asked = set(ONLY) | SILENT
        for name, only in ONLY.items():
            if self.entries.get(name, only[0]) not in only:
                raise ValueError(f"{self.prefix}{name} must be {only[0]!r}, got {short(self.entries[name])}")

    def integer(self, name: str, *, default: int | None = None, least: int = 1) -> int:
        self.asked.add(name)
        value, most = self.entries.get(name, default), MOST.get(name, WIDEST)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{self.prefix}{name} must be one whole number {least}..{most}, got {short(value)}")
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        self.asked.add(name)
        value = self.entries.get(name, default)
        if type(value) is not float or not 0 < value < math.inf:
            raise ValueError(f"{self.prefix}{name} must be a positive number, got {short(value)}")
        return float(str(np.float32(value)))  # 1e-5 was written as the nearest float32

    def done(self) -> None:
        unknown = sorted(self.entries.keys() - self.asked)
        if unknown:
            raise ValueError(f"unsupported settings: {listed(self.prefix + name for name in unknown)}")


def gguf_config(header: GgufHeader) -> tuple[Architecture, LanguageConfig]:
    """What the metadata of a file mean.

    Raises:
        ValueError: An unknown architecture, or a setting that we don't compute.
    """
    metadata, tensors = header.metadata, header.tensors
    named = metadata.get("general.architecture")
    architecture = next((known for known in ARCHITECTURES if known == named), None)
    if architecture is None:
        raise ValueError(f"general.architecture must be one of {', '.join(ARCHITECTURES)}, got {short(named)}")
    if metadata.get("split.count", 1) not in (0, 1):
        raise ValueError("models in several files are not read; join them with llama-gguf-split --merge")
    if "token_embd.weight" not in tensors:
        raise ValueError("tensors don't match the metadata; missing: token_embd.weight")
    read = _Settings(metadata, architecture)
    width, heads = read.integer("embedding_length"), read.integer("attention.head_count")
    head_width = read.integer("attention.key_length", default=width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if read.integer(name, default=head_width) != head_width:
            raise ValueError(f"{architecture}.{name} must be {head_width}, the width of a head")
    experts = read.integer("expert_count", default=0, least=0)
    if (architecture in ("qwen3moe", "olmoe")) > (experts > 0) or (architecture == "qwen3" and experts):
        raise ValueError(f"{architecture}.expert_count does not fit the architecture, got {experts}")
    used = read.integer("expert_used_count", default=0, least=min(experts, 1))
    hidden = read.integer("feed_forward_length", default=0, least=0)
    expert_width = read.integer("expert_feed_forward_length", default=hidden, least=0)
    depth, context = read.integer("block_count"), read.integer("context_length")
    if depth > len(tensors):
        raise ValueError(f"{architecture}.block_count is {depth}, the file holds {len(tensors)} tensors")
    ends = [metadata[key] for key in ("tokenizer.ggml.eos_token_id",) if key in metadata]
    config = LanguageConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        width=width,
        depth=depth,
        heads=heads,
        key_heads=read.integer("attention.head_count_kv", default=heads),
        head_width=head_width,
        hidden=0 if experts else hidden,
        context=context,
        rotary_base=read.number("rope.freq_base", default=10000.0),
        norm_eps=read.number("attention.layer_norm_rms_epsilon"),
        norm="none" if architecture == "llama" else "all" if architecture == "olmoe" else "head",
        tied="output.weight" not in tensors,
        num_experts=experts,
        experts_per_token=used or 2,
        expert_width=expert_width if experts else 0,
        gates="softmax" if architecture == "olmoe" else "renormalised",
        end_ids=tuple(ends),
    )
    read.done()
    if any(type(index) is not int or not 0 <= index < config.vocab_size for index in config.end_ids):
        raise ValueError(f"tokenizer.ggml.eos_token_id must be 0..{config.vocab_size - 1}")
    return architecture, config
