"""config.json of DeepSeek-V2 and DeepSeek-V3 to `LanguageConfig` and back."""

from typing import Any, Literal

from mm.decoder.groups import GroupLimit
from mm.decoder.huggingface_entries import Entries
from mm.decoder.huggingface_rotary import read_rotary
from mm.decoder.language_config import LanguageConfig
from mm.decoder.latent import Latent
from mm.decoder.router import Gates

DeepSeek = Literal["deepseek_v2", "deepseek_v3"]


def deepseek_config(read: Entries, family: DeepSeek) -> LanguageConfig:
    """What the entries mean.

    Raises:
        ValueError: They ask for something that we don't compute, or that published implementations disagree about.
    """
    second = family == "deepseek_v2"
    read.only({"moe_layer_freq": 1, "scoring_func": "softmax" if second else "sigmoid"})
    # Version 2 with norm_topk_prob is renormalised by DeepSeek's code and not by transformers: no such model is known.
    read.only({"norm_topk_prob": False, "rope_interleave": True} if second else {"topk_method": "noaux_tc"})
    depth, heads = read.integer("num_hidden_layers"), read.integer("num_attention_heads")
    read.only({"num_key_value_heads": heads})
    context = read.integer("max_position_embeddings")
    rotary_base, rotary_scaling = read_rotary(read, context=context)
    dense_layers = tuple(range(min(read.integer("first_k_dense_replace", least=0), depth)))
    latent = _latent(read)
    expert_width = read.integer("moe_intermediate_size")
    sigmoid: Gates = "sigmoid_renormalised" if read.flag("norm_topk_prob", default=True) else "sigmoid"
    return LanguageConfig(
        vocab_size=read.integer("vocab_size"),
        width=read.integer("hidden_size"),
        depth=depth,
        heads=heads,
        key_heads=heads,
        head_width=latent.turned_width,
        hidden=read.integer("intermediate_size") if dense_layers else 0,
        context=context,
        rotary_base=rotary_base,
        rotary_scaling=rotary_scaling,
        norm_eps=read.number("rms_norm_eps"),
        tied=read.flag("tie_word_embeddings"),
        latent=latent,
        neighbours=read.flag("rope_interleave", default=True),
        num_experts=read.integer("n_routed_experts"),
        experts_per_token=read.integer("num_experts_per_tok"),
        expert_width=expert_width,
        shared_expert_width=expert_width * read.integer("n_shared_experts"),
        gates="softmax" if second else sigmoid,
        gate_scale=read.number("routed_scaling_factor"),
        groups=_groups(read, family),
        selection_bias=not second,
        dense_layers=dense_layers,
        end_ids=read.integers("eos_token_id"),
    )


def deepseek_entries(config: LanguageConfig, family: DeepSeek) -> dict[str, Any]:
    """What a config.json of these families holds beside what all families do."""
    assert config.latent is not None
    groups = config.groups
    entries: dict[str, Any] = {
        "first_k_dense_replace": len(config.dense_layers),
        "head_dim": config.latent.turned_width,
        "kv_lora_rank": config.latent.rank,
        "moe_intermediate_size": config.expert_width,
        "n_group": 1 if groups is None else groups.groups,
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.shared_expert_width // config.expert_width,
        "norm_topk_prob": config.gates == "sigmoid_renormalised",
        "num_experts_per_tok": config.experts_per_token,
        "q_lora_rank": config.latent.query_rank,
        "qk_nope_head_dim": config.latent.plain_width,
        "qk_rope_head_dim": config.latent.turned_width,
        "routed_scaling_factor": config.gate_scale,
        "topk_group": 1 if groups is None else groups.kept,
        "v_head_dim": config.latent.value_width,
    }
    if family == "deepseek_v2":
        method = "greedy" if groups is None else "group_limited_greedy"
        return entries | {"scoring_func": "softmax", "topk_method": method}
    interleaved = {"rope_interleave": config.neighbours, "num_nextn_predict_layers": 0}
    return entries | interleaved | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def deepseek_family(config: LanguageConfig) -> DeepSeek | None:
    """Which of the two computes what a configuration with latent attention does, if one does."""
    shared, score = config.shared_expert_width, None if config.groups is None else config.groups.score
    if (
        config.window is not None
        or not config.num_experts
        or not shared
        or shared % config.expert_width
        or config.dense_layers != tuple(range(len(config.dense_layers)))
    ):
        return None
    if config.gates == "softmax":
        # Transformers wants the width to be of whole heads here, though it has no use for them.
        whole = config.width % config.heads == 0
        fits = whole and not config.selection_bias and config.neighbours and score in (None, "max")
        return "deepseek_v2" if fits else None
    fits = config.gates != "renormalised" and config.selection_bias and score in (None, "top2")
    return "deepseek_v3" if fits else None


def _latent(read: Entries) -> Latent:
    if "q_lora_rank" not in read.entries:
        raise ValueError("config.json: q_lora_rank must be a whole number or null, got nothing")
    return Latent(
        rank=read.integer("kv_lora_rank"),
        plain_width=read.integer("qk_nope_head_dim"),
        turned_width=read.integer("qk_rope_head_dim"),
        value_width=read.integer("v_head_dim"),
        query_rank=None if read.entries["q_lora_rank"] is None else read.integer("q_lora_rank"),
    )


def _groups(read: Entries, family: DeepSeek) -> GroupLimit | None:
    """None where there is one group only, which limits nothing."""
    if family == "deepseek_v2":
        method = read.entries.get("topk_method") or "greedy"
        if method == "greedy":
            return None
        read.only({"topk_method": "group_limited_greedy"})
    groups, kept = read.integer("n_group"), read.integer("topk_group")
    return None if groups == kept == 1 else GroupLimit(groups, kept, "max" if family == "deepseek_v2" else "top2")
