"""DeepSeek folders: published sizes, what real files hold beside the model, and bad ones.

What the models compute is compared with transformers in test_decoder_huggingface.py.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm.decoder.balance import balance
from mm.decoder.counts import parameter_counts
from mm.decoder.experts import MixtureOfExperts
from mm.decoder.groups import GroupLimit
from mm.decoder.huggingface import read_language_model, write_language_model
from mm.decoder.huggingface_config import config_entries, family_of, language_config
from mm.decoder.language import LanguageModel
from mm.decoder.language_config import LanguageConfig
from mm.decoder.latent import Latent

YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
COMMON = {
    "attention_bias": False,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
}
SECOND = COMMON | {
    "model_type": "deepseek_v2",
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "scoring_func": "softmax",
    "vocab_size": 102400,
}
PUBLISHED: dict[str, tuple[dict[str, Any], float, float]] = {
    "v2 lite": (
        SECOND
        | {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "n_routed_experts": 64}
        | {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0}
        | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
        15.7e9,
        2.4e9,
    ),
    "v2": (
        SECOND
        | {"hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60}
        | {"num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 160}
        | {"n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}
        | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
        236e9,
        21e9,
    ),
    "v3": (
        COMMON
        | {"model_type": "deepseek_v3", "eos_token_id": 1, "first_k_dense_replace": 3, "hidden_size": 7168}
        | {"intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256}
        | {"n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8}
        | {"num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1}
        | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "routed_scaling_factor": 2.5}
        | {"scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc", "vocab_size": 129280},
        671e9,
        36.6e9,
    ),
}


@pytest.mark.parametrize(("entries", "total", "active"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_configurations_have_the_published_number_of_parameters(
    entries: dict[str, Any], total: float, active: float
) -> None:
    family, config = language_config(entries)
    assert family == family_of(config) == entries["model_type"]
    with torch.device("meta"):
        counts = parameter_counts(LanguageModel(config))
    assert counts.total == pytest.approx(total, rel=0.005)
    embedding = config.vocab_size * config.width  # which DeepSeek doesn't count among what a token meets
    assert counts.active - embedding == pytest.approx(active, rel=0.025)
    written = config_entries(config, dtype="bfloat16")
    assert language_config(written) == (family, config)
    for name in entries.keys() & written.keys() - {"num_nextn_predict_layers"}:
        assert written[name] == entries[name], name


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": None,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def make(version: int, folder: Path, **settings: Any) -> Any:
    """A random model of theirs, saved."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"DeepseekV{version}Config")(**SIZES | settings)
    model = getattr(transformers, f"DeepseekV{version}ForCausalLM")(config).eval()
    for name, bias in model.named_buffers():
        if "correction_bias" in name:
            bias.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def store(folder: Path, **changes: torch.Tensor | None) -> None:
    """Changes the tensors of a folder; None takes one out."""
    weights: dict[str, Any] = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in weights.items() if v is not None}, folder / "new.safetensors", {"format": "pt"})
    (folder / "new.safetensors").replace(folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(3, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_keeps_its_own_dtype_on_both_ways(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Real files hold bfloat16 weights and a float32 bias; transformers may also have rounded it."""
    weights = load_file(folder / "model.safetensors")
    changed = {name: tensor.bfloat16() for name, tensor in weights.items() if name != BIAS}
    store(folder, **changed, **{BIAS: weights[BIAS].to(dtype)})
    model = read_language_model(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    write_language_model(model, tmp_path / "again")
    expected, got = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "again"))
    assert got.keys() == expected.keys()
    assert got[BIAS].dtype == dtype
    for name, tensor in expected.items():
        assert torch.equal(tensor.view(torch.uint8), got[name].view(torch.uint8)), name


def test_a_bias_moved_in_training_is_written(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = read_language_model(folder)
    mixture = model.layers[1].feed_forward
    assert isinstance(mixture, MixtureOfExperts)
    ids = torch.arange(40)[None]
    balance(mixture.router, model(ids).routings[0].load, rate=0.25)
    write_language_model(model, tmp_path / "again")
    before, after = (load_file(at / "model.safetensors")[BIAS] for at in (folder, tmp_path / "again"))
    assert float((after - before).abs().max()) == pytest.approx(0.25)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_layers_that_predict_further_tokens_are_left_out_with_a_word(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = read_language_model(folder)
    assert not caplog.records
    further = {
        f"model.layers.2.{name}": torch.ones(3) for name in ("eh_proj.weight", "enorm.weight", "mlp.gate.weight")
    }
    store(folder, **further)
    with caplog.at_level(logging.WARNING, logger="mm"):
        model = read_language_model(folder)
    assert [record.getMessage() for record in caplog.records] == [
        "left out: tensors of layer 2, which predicts further tokens"
    ]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("version", "tensors", "named"),
    [
        (3, {"model.layers.2.mlp.gate.weight": torch.ones(3)}, "unsupported: model.layers.2.mlp.gate.weight"),
        (2, {"model.layers.2.eh_proj.weight": torch.ones(3)}, "unsupported: model.layers.2.eh_proj.weight"),
        (3, {BIAS: None}, f"missing: {BIAS}"),
        (2, {BIAS: torch.ones(8)}, f"unsupported: {BIAS}"),
        (3, {BIAS: torch.ones(7)}, rf"{BIAS} must have the shape \[8\]"),
        (3, {BIAS: torch.ones(8, dtype=torch.int64)}, f"{BIAS} must be of a dtype of F32, BF16, F16, got I64"),
        (3, {"model.layers.0.self_attn.q_a_proj.weight": None}, "missing: .*q_a_proj"),
        (3, {"model.layers.1.mlp.shared_experts.up_proj.weight": torch.ones(24, 31)}, r"up_proj.* shape \[24, 32\]"),
        (3, {"model.layers.1.mlp.experts.7.down_proj.weight": None}, "missing: .*experts.7.down_proj"),
        (
            3,
            {
                "model.layers.0.mlp.up_proj.weight": torch.ones(48, 32).to(torch.float8_e4m3fn),
                "model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1),
            },
            "unsupported: model.layers.0.mlp.up_proj.weight_scale_inv",
        ),
        (3, {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32).to(torch.float8_e4m3fn)}, "got F32, F8_E4M3"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, version: int, tensors: dict[str, torch.Tensor | None], named: str
) -> None:
    make(version, tmp_path)
    store(tmp_path, **tensors)
    with pytest.raises(ValueError, match=named):
        read_language_model(tmp_path)


@pytest.mark.parametrize(
    ("version", "settings", "named"),
    [
        (3, {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, r"quantised .*quantization_config, 'fp8'"),
        (3, {"attention_bias": True}, "attention_bias must be False"),
        (2, {"mlp_bias": True}, "mlp_bias must be False"),
        (3, {"scoring_func": "softmax"}, "scoring_func must be 'sigmoid', got 'softmax'"),
        (2, {"scoring_func": "sigmoid"}, "scoring_func must be 'softmax', got 'sigmoid'"),
        (3, {"topk_method": "greedy"}, "topk_method must be 'noaux_tc', got 'greedy'"),
        (2, {"topk_method": "noaux_tc"}, "topk_method must be 'group_limited_greedy', got 'noaux_tc'"),
        (2, {"norm_topk_prob": True}, "norm_topk_prob must be False"),
        (2, {"rope_interleave": False}, "rope_interleave must be True"),
        (3, {"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false"),
        (3, {"moe_layer_freq": 2}, "moe_layer_freq must be 1, got 2"),
        (3, {"num_key_value_heads": 2}, "num_key_value_heads must be 4, got 2"),
        (3, {"n_group": 3}, "groups must divide num_experts 8, got 3"),
        (3, {"n_group": 8, "topk_group": 4}, "score 'top2' needs groups of at least 2"),
        (3, {"topk_group": 5}, r"kept must be 1..4 \(groups\), got 5"),
        (3, {"topk_group": 1, "num_experts_per_tok": 3}, "experts_per_token must be at most 2"),
        (3, {"num_experts_per_tok": 1}, "gives the router no gradient"),
        (3, {"n_group": None}, "n_group must be a whole number"),
        (3, {"n_shared_experts": 0}, "n_shared_experts must be a whole number"),
        (3, {"n_shared_experts": 2**12}, "n_shared_experts must be a whole number"),
        (3, {"n_routed_experts": 4000}, "asks for more than"),
        (3, {"kv_lora_rank": 2**20}, "kv_lora_rank must be a whole number"),
        (3, {"q_lora_rank": "gone"}, "q_lora_rank must be a whole number or null, got nothing"),
        (3, {"q_lora_rank": None}, "missing: .*q_proj.weight.*; unsupported: .*q_a_layernorm"),
        (3, {"qk_rope_head_dim": 5}, "turned_width must be even"),
        (3, {"first_k_dense_replace": 2}, "missing: model.layers.1.mlp.down_proj.weight"),
        (3, {"first_k_dense_replace": "gone"}, "first_k_dense_replace must be a whole number"),
        (3, {"routed_scaling_factor": 0.0}, "routed_scaling_factor must be a positive number"),
        (3, {"moe_intermediate_size": 20}, "expert_width must be a multiple of 8, got 20"),
        (3, {"rope_scaling": YARN | {"type": "dynamic"}}, "rope_type must be one of|contradicts"),
        (3, {"rope_parameters": YARN, "rope_theta": 1.0}, "rotary_base must be above 1"),
        (3, {"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "qk_nope_head_dim": 2**16}, "by config.json"),
    ],
)
def test_a_setting_we_cannot_compute_is_named(
    tmp_path: Path, version: int, settings: dict[str, Any], named: str
) -> None:
    make(version, tmp_path)
    file = tmp_path / "config.json"
    entries = json.loads(file.read_text(encoding="utf-8")) | settings
    file.write_text(json.dumps({k: v for k, v in entries.items() if v != "gone"}), encoding="utf-8")
    with pytest.raises(ValueError, match=named):
        read_language_model(tmp_path)


SMALL = LanguageConfig(
    vocab_size=64,
    width=32,
    depth=3,
    heads=4,
    key_heads=4,
    head_width=4,
    hidden=48,
    context=64,
    latent=Latent(16, 8, 4, 8),
    num_experts=8,
    expert_width=24,
    shared_expert_width=48,
    gates="softmax",
    groups=GroupLimit(4, 2),
    dense_layers=(0,),
)


def test_the_family_follows_from_the_configuration() -> None:
    assert family_of(SMALL) == "deepseek_v2"
    third = replace(SMALL, gates="sigmoid_renormalised", groups=GroupLimit(4, 2, "top2"), selection_bias=True)
    assert family_of(third) == "deepseek_v3"


@pytest.mark.parametrize(
    "change",
    [
        {"window": 8},
        {"shared_expert_width": 0},
        {"shared_expert_width": 40},
        {"dense_layers": (1,)},
        {"gates": "renormalised"},
        {"gates": "sigmoid"},
        {"selection_bias": True},
        {"neighbours": False},
        {"groups": GroupLimit(4, 2, "top2")},
        {"num_experts": 0, "shared_expert_width": 0, "groups": None},
        {"latent": None},
        {"latent": None, "groups": None, "gates": "renormalised", "norm": "head"},
        {"latent": None, "groups": None, "shared_expert_width": 0, "gates": "sigmoid", "norm": "head"},
        {"latent": None, "groups": None, "shared_expert_width": 0, "gate_scale": 2.0, "norm": "head"},
    ],
)
def test_what_no_family_computes_is_not_written(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no published family"):
        family_of(replace(SMALL, **change))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_experts": 0, "groups": None}, "shared_expert_width, groups and selection_bias need experts"),
        ({"num_experts": 0, "shared_expert_width": 0}, "need experts, got num_experts 0"),
        ({"shared_expert_width": -8}, "shared_expert_width must be at least 0"),
    ],
)
def test_contradictory_sizes_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(SMALL, **change)


def test_fresh_weights_leave_the_residual_at_its_size() -> None:
    torch.manual_seed(0)
    model = LanguageModel(replace(SMALL, depth=8))
    model.init_weights()
    ids = torch.randint(64, (2, 32))
    with torch.no_grad():
        start, end = model.embedding(ids), model.hidden(ids)[0]
    assert bool(end.isfinite().all())
    assert float(end.std()) < 20 * float(start.std())
