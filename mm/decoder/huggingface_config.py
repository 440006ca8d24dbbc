"""config.json of the open language models to `LanguageConfig` and back; what we can't compute is refused by name."""

import json
from pathlib import Path
from typing import Any, Final, Literal

from mm.decoder.huggingface_deepseek import deepseek_config, deepseek_entries, deepseek_family
from mm.decoder.huggingface_entries import Entries
from mm.decoder.huggingface_rotary import read_rotary, rotary_entries
from mm.decoder.language_config import LanguageConfig
from mm.decoder.told import short

Family = Literal["llama", "qwen3", "olmoe", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"]
ARCHITECTURES: Final[dict[Family, str]] = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
LARGEST_CONFIG = 2**20
"""Bytes; no published config.json comes near."""
ONLY: Final[dict[str, Any]] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "clip_qkv": None,
    "attention_dropout": 0,
    "router_jitter_noise": 0,
}
"""Settings that change the result and of which we know one value; absent means that value."""


def read_config(file: Path) -> tuple[Family, LanguageConfig]:
    """Reads a config.json.

    Raises:
        ValueError: It isn't one, is of an unknown family, or asks for something that we don't compute.
        OSError: It can't be read.
    """
    return language_config(read_json(file, most=LARGEST_CONFIG))


def read_json(file: Path, *, most: int) -> dict[str, Any]:
    """An object of at most so many bytes.

    Raises:
        ValueError: It is larger, or no JSON object.
        OSError: It can't be read.
    """
    if file.stat().st_size > most:
        raise ValueError(f"{file.name}: at most {most} bytes are read, got {file.stat().st_size}")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name}: not JSON") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{file.name}: must be a JSON object, got {type(entries).__name__}")
    return entries


def language_config(entries: dict[str, Any]) -> tuple[Family, LanguageConfig]:
    """What the entries of a config.json mean; see `read_config`."""
    named = entries.get("model_type")
    family = next((known for known in ARCHITECTURES if known == named), None)
    if family is None:
        raise ValueError(f"config.json: model_type must be one of {', '.join(ARCHITECTURES)}, got {short(named)}")
    read = Entries(entries)
    if entries.get("quantization_config") is not None:
        quantised = entries["quantization_config"]
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(f"config.json: quantised weights (quantization_config, {short(method)}) are not read")
    read.only(ONLY)
    if family in ("deepseek_v2", "deepseek_v3"):
        return family, deepseek_config(read, family)
    width, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    depth, context = read.integer("num_hidden_layers"), read.integer("max_position_embeddings")
    with_head_dim = entries if family != "olmoe" else {}
    if with_head_dim.get("head_dim") is None and (family == "qwen3" or width % heads):
        raise ValueError(f"config.json: head_dim must be given for {family} of width {width} and {heads} heads")
    experts = family in ("olmoe", "mixtral", "qwen3_moe")
    dense_layers = _dense_layers(read, depth) if family == "qwen3_moe" else ()
    hidden = read.integer("intermediate_size") if not experts or dense_layers else 0
    expert_key = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    renormalised = family == "mixtral" or read.flag("norm_topk_prob")
    window = _window(read, family, depth)
    rotary_base, rotary_scaling = read_rotary(read, context=context)
    return family, LanguageConfig(
        vocab_size=read.integer("vocab_size"),
        width=width,
        depth=depth,
        heads=heads,
        key_heads=read.integer("num_key_value_heads", default=heads),
        head_width=Entries(with_head_dim).integer("head_dim", default=width // heads),
        hidden=hidden,
        context=context,
        rotary_base=rotary_base,
        rotary_scaling=rotary_scaling,
        norm_eps=read.number("rms_norm_eps"),
        norm="all" if family == "olmoe" else "head" if family in ("qwen3", "qwen3_moe") else "none",
        window=window if window is not None and window < context else None,
        tied=read.flag("tie_word_embeddings"),
        num_experts=read.integer("num_experts", "num_local_experts") if experts else 0,
        experts_per_token=read.integer("num_experts_per_tok") if experts else 2,
        expert_width=read.integer(expert_key) if experts else 0,
        gates="renormalised" if renormalised else "softmax",
        dense_layers=dense_layers,
        end_ids=read.integers("eos_token_id"),
    )


def config_entries(config: LanguageConfig, *, dtype: str) -> dict[str, Any]:
    """The config.json of a model, as transformers and `read_config` read it.

    Raises:
        ValueError: No published family computes such a model.
    """
    family = family_of(config)
    entries: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": dtype,
        "eos_token_id": list(config.end_ids) if len(config.end_ids) > 1 else next(iter(config.end_ids), None),
        "hidden_act": "silu",
        "hidden_size": config.width,
        "intermediate_size": config.hidden or config.expert_width,
        "max_position_embeddings": config.context,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.depth,
        "num_key_value_heads": config.key_heads,
        "pad_token_id": None,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rotary_entries(config.rotary_base, config.rotary_scaling),
        "rope_theta": config.rotary_base,
        "tie_word_embeddings": config.tied,
        "vocab_size": config.vocab_size,
    }
    if family in ("deepseek_v2", "deepseek_v3"):
        return entries | deepseek_entries(config, family)
    if family != "olmoe":
        entries["head_dim"] = config.head_width
    if family not in ("olmoe", "llama"):
        entries["sliding_window"] = config.window
    if family in ("qwen3", "qwen3_moe"):
        entries["use_sliding_window"] = config.window is not None
    if family == "qwen3":
        kind = "full_attention" if config.window is None else "sliding_attention"
        entries |= {"layer_types": [kind] * config.depth, "max_window_layers": 0 if config.window else config.depth}
    if config.num_experts:
        experts = "num_local_experts" if family == "mixtral" else "num_experts"
        entries |= {experts: config.num_experts, "num_experts_per_tok": config.experts_per_token}
    if family in ("olmoe", "qwen3_moe"):
        entries["norm_topk_prob"] = config.gates == "renormalised"
    if family == "qwen3_moe":
        layers = {"mlp_only_layers": list(config.dense_layers), "decoder_sparse_step": 1}
        entries |= {"moe_intermediate_size": config.expert_width, **layers}
    return entries


def family_of(config: LanguageConfig) -> Family:
    """The published family that computes what this configuration does.

    Raises:
        ValueError: There is none.
    """
    if config.latent is not None:
        latent = deepseek_family(config)
        if latent is None:
            raise ValueError("no published family has latent attention with these experts, gates and dense layers")
        return latent
    plain = {"none": "llama", "head": "qwen3"} if config.num_experts == 0 else {}
    sparse = {"none": "mixtral", "head": "qwen3_moe", "all": "olmoe"} if config.num_experts else {}
    family = (plain | sparse).get(config.norm)
    wrong = {
        "llama": config.window is not None,
        "mixtral": bool(config.dense_layers) or config.gates != "renormalised",
        "olmoe": bool(config.dense_layers)
        or config.window is not None
        or config.heads * config.head_width != config.width,
    }
    alone = config.shared_expert_width or config.groups is not None or config.selection_bias or config.gate_scale != 1
    if config.num_experts and (alone or config.gates not in ("softmax", "renormalised")):
        raise ValueError("no published family without latent attention has a shared expert, groups or these gates")
    for known in ARCHITECTURES:
        if known == family and not wrong.get(known, False):
            return known
    raise ValueError(f"no published family has norm {config.norm!r} with this window, these experts and gates")


def _window(read: Entries, family: Family, depth: int) -> int | None:
    """One window for all layers, or none; families with layers of both kinds are refused."""
    if family in ("llama", "olmoe") or read.entries.get("sliding_window") is None:
        return None
    if family in ("qwen3", "qwen3_moe") and not read.flag("use_sliding_window"):
        return None
    if family == "qwen3":
        first = read.integer("max_window_layers", default=0, least=0)
        kinds = read.entries.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (depth - first)
        if not isinstance(kinds, list) or len(set(map(str, kinds[:depth]))) != 1:
            raise ValueError("config.json: layer_types must be one kind for all layers, got several")
        if kinds[0] != "sliding_attention":
            return None
    return read.integer("sliding_window")


def _dense_layers(read: Entries, depth: int) -> tuple[int, ...]:
    step, dense = read.integer("decoder_sparse_step", default=1), set(read.integers("mlp_only_layers"))
    return tuple(layer for layer in range(depth) if layer in dense or (layer + 1) % step)
