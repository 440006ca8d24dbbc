"""What each parameter of ours is called on disk, and how its tensors lie there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mm.decoder.huggingface_config import Family
from mm.decoder.language_config import LanguageConfig


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and the tensors on disk that it is made of.

    "same": one tensor as it is. "apart": likewise, but of a dtype of its own: transformers keeps a router's bias in
    float32 whatever the weights are in. "gate_up": of every expert gate [f D], then up [f D], to [E D 2f]. "down":
    of every expert [D f], to [E f D].
    """

    ours: str
    theirs: tuple[str, ...]
    kind: Literal["same", "apart", "gate_up", "down"] = "same"

    def shape(self, parameter: Tensor) -> list[int]:
        """Of each tensor on disk."""
        if self.kind in ("same", "apart"):
            return list(parameter.shape)
        _, rows, columns = parameter.shape
        return [columns // 2, rows] if self.kind == "gate_up" else [columns, rows]

    def join(self, tensors: Iterator[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Ours from theirs, one tensor in memory beside it at a time."""
        if self.kind in ("same", "apart"):
            return next(tensors).clone()  # what safetensors gives lies in the file, which another may cut short
        whole = torch.empty(like.shape, dtype=dtype)
        parts = whole.chunk(2, dim=-1) if self.kind == "gate_up" else (whole,)
        for expert in range(len(whole)):
            for part in parts:
                part[expert] = next(tensors).T
        return whole

    def split(self, parameter: Tensor) -> dict[str, Tensor]:
        """Theirs from ours."""
        if self.kind in ("same", "apart"):
            return {self.theirs[0]: parameter.contiguous()}
        parts = parameter.chunk(2, dim=-1) if self.kind == "gate_up" else (parameter,)
        tensors = (part[expert].T.contiguous() for expert in range(len(parameter)) for part in parts)
        return dict(zip(self.theirs, tensors, strict=True))


def entries_of(config: LanguageConfig, family: Family) -> Iterator[Entry]:
    """Every parameter, and the routers' selection biases."""
    yield Entry("embedding.weight", ("model.embed_tokens.weight",))
    for index in range(config.depth):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        names = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
        names |= {f"attention.{one}": f"self_attn.{other}" for one, other in _attention(config).items()}
        if not config.has_experts(index):
            names |= {f"feed_forward.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
        for one, other in names.items():
            yield Entry(f"{ours}.{one}.weight", (f"{theirs}.{other}.weight",))
        if config.has_experts(index):
            sparse = "block_sparse_moe" if family == "mixtral" else "mlp"
            yield from _experts(config, family, f"{ours}.feed_forward", f"{theirs}.{sparse}")
    yield Entry("norm.weight", ("model.norm.weight",))
    if not config.tied:
        yield Entry("output.weight", ("lm_head.weight",))


def _attention(config: LanguageConfig) -> dict[str, str]:
    if config.latent is not None:
        names = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv": "kv_b_proj", "out": "o_proj"}
        if config.latent.query_rank is None:
            return names | {"q": "q_proj"}
        return names | {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q": "q_b_proj"}
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
    return names if config.norm == "none" else names | {"q_norm": "q_norm", "k_norm": "k_norm"}


def _experts(config: LanguageConfig, family: Family, ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(f"{ours}.router.logits.weight", (f"{theirs}.gate.weight",))
    if config.selection_bias:
        yield Entry(f"{ours}.router.selection_bias", (f"{theirs}.gate.e_score_correction_bias",), "apart")
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    experts = [f"{theirs}.experts.{expert}" for expert in range(config.num_experts)]
    pairs = tuple(f"{expert}.{part}.weight" for expert in experts for part in (gate, up))
    yield Entry(f"{ours}.experts.gate_up", pairs, "gate_up")
    yield Entry(f"{ours}.experts.down", tuple(f"{expert}.{down}.weight" for expert in experts), "down")
    for part in ("gate", "up", "down") if config.shared_expert_width else ():
        yield Entry(f"{ours}.shared.{part}.weight", (f"{theirs}.shared_experts.{part}_proj.weight",))
