"""Open language models against transformers: logits, gradients, 200 greedy tokens, files byte for byte, bad folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mm.batch import Padded
from mm.decoder.huggingface import read_language_model, write_language_model
from mm.decoder.huggingface_config import config_entries
from mm.decoder.language import LanguageModel
from mm.decoder.language_config import LanguageConfig

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 12,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
GROUPS = {"n_group": 4, "topk_group": 2}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 32}
"""Such that a head of 8 or 12 has pairs that are kept, that are on the ramp, and that are slowed down wholly."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_theta": 5e5}),
    "llama tied, wide heads, one key head": (
        "Llama",
        {"tie_word_embeddings": True, "head_dim": 16, "num_key_value_heads": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3 with a window": (
        "Qwen3",
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    ),
    "olmoe": ("Olmoe", EXPERTS),
    "olmoe renormalised": ("Olmoe", EXPERTS | {"norm_topk_prob": True, "num_key_value_heads": 4}),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "mixtral with a window": ("Mixtral", {"num_local_experts": 4, "sliding_window": 9, "head_dim": 16}),
    "qwen3 moe": ("Qwen3Moe", EXPERTS | {"moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3 moe with dense layers": (
        "Qwen3Moe",
        EXPERTS | {"moe_intermediate_size": 24, "head_dim": 8, "mlp_only_layers": [1], "num_hidden_layers": 3},
    ),
    "llama stretched as llama 3.1": (
        "Llama",
        {"rope_parameters": YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "olmoe stretched linearly": (
        "Olmoe",
        EXPERTS | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    ),
    "qwen3 stretched by yarn": ("Qwen3", {"head_dim": 12, "rope_parameters": YARN | {"beta_fast": 4.0}}),
    "mixtral stretched by yarn": (
        "Mixtral",
        {"num_local_experts": 6, "head_dim": 8, "rope_parameters": YARN | {"attention_factor": 0.9, "truncate": False}},
    ),
    "deepseek v2 lite": ("DeepseekV2", DEEPSEEK),
    "deepseek v2": (
        "DeepseekV2",
        DEEPSEEK
        | GROUPS
        | {"q_lora_rank": 20, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0}
        | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 1.2}},
    ),
    "deepseek v3": ("DeepseekV3", DEEPSEEK | GROUPS | {"q_lora_rank": 20}),
    "deepseek v3 stretched by yarn": (
        "DeepseekV3",
        DEEPSEEK
        | GROUPS
        | {"q_lora_rank": 20, "rope_parameters": YARN | {"beta_fast": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek v3 in halves, one group, never dense, tied": (
        "DeepseekV3",
        DEEPSEEK
        | {"rope_interleave": False, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
        | {"norm_topk_prob": False, "tie_word_embeddings": True},
    ),
}
Pair = tuple[nn.Module, LanguageModel, Path]


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A random model of theirs, ours read from its files, and the folder."""
    theirs = random_model(*request.param)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, read_language_model(folder), folder


def random_model(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # far from zero, so that a wrong norm, rotation or gate shows
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5 if "norm" in name else torch.randn_like(parameter) * 0.2)
        for name, bias in model.named_buffers():
            if "correction_bias" in name:
                bias.normal_(std=0.2)
    return model


def test_logits_are_those_of_transformers(pair: Pair) -> None:
    theirs, ours, _ = pair
    ids = torch.randint(96, (3, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_transformers(pair: Pair, tmp_path: Path) -> None:
    theirs, ours, _ = pair
    ids = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(2))
    direction = torch.randn(2, 17, 96, generator=torch.Generator().manual_seed(3))
    for model in (theirs, ours):
        model.zero_grad()
        (model(ids).logits * direction).mean().backward()
    # Both gradients are written as the models themselves would be, so that the files name what belongs together.
    for name, model in (("theirs", theirs), ("ours", ours)):
        values = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.copy_(parameter.grad)
            write = model.save_pretrained if model is theirs else lambda folder: write_language_model(ours, folder)
            write(tmp_path / name)
            for key, parameter in model.named_parameters():
                parameter.copy_(values[key])
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert expected.keys() == got.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0
    for key, gradient in expected.items():
        torch.testing.assert_close(
            got[key], gradient, atol=1e-4 * largest, rtol=1e-4, msg=lambda m, at=key: f"{at}: {m}"
        )


def greedy(model: LanguageModel, prompt: Padded, steps: int) -> Tensor:
    with torch.no_grad():
        logits, state = model.read(prompt, capacity=prompt.values.shape[1] + steps)
        written = [logits.argmax(-1)]
        for _ in range(steps - 1):
            logits, state = model.step(written[-1], state)
            written.append(logits.argmax(-1))
    return torch.stack(written, dim=1)


@pytest.mark.slow
def test_200_greedy_tokens_are_those_of_transformers(pair: Pair) -> None:
    theirs, ours, _ = pair
    ids = torch.randint(96, (2, 6), generator=torch.Generator().manual_seed(4))
    options = transformers.GenerationConfig(max_new_tokens=200, min_new_tokens=200, do_sample=False, pad_token_id=0)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)[:, 6:]
    assert torch.equal(greedy(ours, Padded(ids, torch.tensor([6, 6])), 200), expected)


def test_cached_rows_of_unequal_length_equal_whole_rows_read_anew(pair: Pair) -> None:
    _, ours, _ = pair
    ids = torch.randint(96, (3, 9), generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([9, 1, 4])
    with torch.no_grad():
        _, state = ours.read(Padded(ids, lengths), capacity=14)
        rows = [ids[row, :length].tolist() for row, length in enumerate(lengths.tolist())]
        for token in (3, 90, 41):
            logits, state = ours.step(torch.full((3,), token), state)
            for row in rows:
                row.append(token)
            for row, got in zip(rows, logits, strict=True):
                torch.testing.assert_close(got, ours(torch.tensor([row])).logits[0, -1], atol=1e-5, rtol=1e-5)


def test_padding_never_changes_a_result_and_is_never_routed(pair: Pair) -> None:
    _, ours, _ = pair
    ids = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(6))
    lengths = torch.tensor([9, 4])
    with torch.no_grad():
        full, alone = ours(ids, lengths=lengths), ours(ids[1:, :4])
        changed = ours(ids.masked_fill(torch.arange(9) >= lengths[:, None], 7), lengths=lengths)
    torch.testing.assert_close(full.logits[1, :4], alone.logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(changed.logits[1, :4], full.logits[1, :4])
    for routing in full.routings:
        assert len(routing.experts) == 13


def test_packed_rows_train_as_padded_ones(pair: Pair) -> None:
    _, ours, _ = pair
    ids = torch.randint(96, (3, 9), generator=torch.Generator().manual_seed(6))
    rows = Padded(ids, torch.tensor([9, 1, 4]))
    grads = []
    for packed in (False, True):
        hidden = ours.packed(rows)[0] if packed else ours.hidden(ids, lengths=rows.lengths)[0][rows.mask]
        logits = ours.logits(hidden)
        ours.zero_grad()
        logits.square().mean().backward()
        grads.append([logits.detach(), *(parameter.grad.clone() for parameter in ours.parameters())])
    ours.zero_grad()
    for padded, alone in zip(*grads, strict=True):
        torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="at least 1 token"):
        ours.packed(Padded(ids, torch.tensor([9, 0, 4])))


def test_the_round_trip_is_byte_for_byte_and_transformers_reads_it(pair: Pair, tmp_path: Path) -> None:
    theirs, ours, folder = pair
    write_language_model(ours, tmp_path)
    expected, got = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor.view(torch.uint8), got[name].view(torch.uint8)), name
    assert read_language_model(tmp_path).config == ours.config
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(theirs)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert not list(tmp_path.glob(".*"))


def test_shards_and_half_precision_read_the_same(tmp_path: Path) -> None:
    theirs = random_model(*CASES["mixtral"]).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = read_language_model(tmp_path / "whole"), read_language_model(tmp_path / "shards")
    assert whole.config == shards.config
    for (name, one), other in zip(whole.named_parameters(), shards.parameters(), strict=True):
        assert one.dtype == other.dtype == torch.bfloat16
        assert torch.equal(one, other), name
    write_language_model(whole, tmp_path / "again")
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


# ------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model(*CASES["olmoe"]).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    entries = json.loads(file.read_text(encoding="utf-8")) | settings
    file.write_text(json.dumps({key: value for key, value in entries.items() if value != "gone"}), encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of llama, .* got 'gpt2'"),
        ({"hidden_size": -1}, "hidden_size must be a whole number"),
        ({"hidden_size": 2**40}, "hidden_size must be a whole number"),
        (
            {"hidden_size": 2**20, "num_attention_heads": 2**19, "num_key_value_heads": 2**19, "vocab_size": 2**22},
            "by config.json",
        ),
        ({"intermediate_size": 2**20}, "by config.json"),
        ({"intermediate_size": 60}, "expert_width must be a multiple of 8, got 60"),
        ({"num_key_value_heads": 3}, "key_heads must divide heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 1000}, "asks for more than"),
        ({"num_experts": 4000}, "asks for more than"),
        ({"vocab_size": "96"}, "vocab_size"),
        ({"vocab_size": 97}, r"model.embed_tokens.weight must have the shape \[97, 32\] by config.json"),
        ({"num_attention_heads": 3}, "head_dim|heads"),
        ({"rms_norm_eps": "gone"}, "rms_norm_eps must be a positive number, got None"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number"),
        ({"model_type": "qwen2"}, "model_type must be one of .* got 'qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"num_experts_per_tok": 9}, "experts_per_token"),
        ({"tie_word_embeddings": True}, "unsupported: lm_head.weight"),
    ],
)
def test_a_setting_we_cannot_compute_is_named(folder: Path, settings: dict[str, Any], named: str) -> None:
    change(folder, **settings)
    with pytest.raises(ValueError, match=named):
        read_language_model(folder)


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def pickled_under_a_false_name(folder: Path) -> None:
    pickled(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")


def with_tensors(**changes: Tensor | None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        weights: dict[str, Any] = load_file(folder / "model.safetensors") | changes
        save_file({k: v for k, v in weights.items() if v is not None}, folder / "new.safetensors")
        (folder / "new.safetensors").replace(folder / "model.safetensors")

    return make


def with_index(content: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")

    return make


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (cut_short, "model.safetensors: not a safetensors file, or cut short"),
        (pickled, "must hold model.safetensors"),
        (pickled_under_a_false_name, "not a safetensors file"),
        (with_tensors(**{"model.norm.weight": None}), "missing: model.norm.weight"),
        (with_tensors(**{"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}), "unsupported: .*q_proj.bias"),
        (with_tensors(**{"model.norm.weight": torch.ones(31)}), r"model.norm.weight must have the shape \[32\]"),
        (with_tensors(**{"model.norm.weight": torch.ones(32).half()}), "one dtype of F32, BF16, F16, got F16, F32"),
        (with_index({"weight_map": {"x": "../a.safetensors"}}), "in the folder itself"),
        (with_index({"weight_map": {"x": "b.safetensors"}}), "b.safetensors is missing"),
        (with_index({"weight_map": {"x": "a.bin"}}), "safetensors files"),
        (with_index({}), "weight_map"),
        (with_index([]), "must be a JSON object"),
        (lambda folder: (folder / "config.json").write_text("[" * 10**5), "config.json: not JSON"),
        (lambda folder: (folder / "config.json").write_text(" " * (2**20 + 1)), "at most 1048576 bytes"),
    ],
)
def test_a_damaged_folder_is_refused_and_says_why(folder: Path, harm: Callable[[Path], None], named: str) -> None:
    harm(folder)
    with pytest.raises(ValueError, match=named):
        read_language_model(folder)


def test_prompts_that_do_not_fit_are_refused(folder: Path) -> None:
    model = read_language_model(folder)
    with pytest.raises(ValueError, match=r"256 tokens \(context\)"):
        model(torch.zeros(1, 257, dtype=torch.long))
    with pytest.raises(ValueError, match="at least 1 token"):
        model.read(Padded(torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 0])), capacity=5)
    with pytest.raises(ValueError, match="capacity"):
        model.read(Padded(torch.zeros(1, 3, dtype=torch.long), torch.tensor([3])), capacity=2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"window": 17}, r"window must be 1..16 \(context\)"),
        ({"window": 0}, "window must be 1..16"),
        ({"head_width": 7}, "head_width must be even"),
        ({"key_heads": 3}, "key_heads must divide heads"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"num_experts": 4, "dense_layers": (2,)}, "dense_layers must be 0..1"),
        ({"depth": 0}, "depth must be at least 1"),
    ],
)
def test_contradictory_sizes_are_named(change: dict[str, Any], named: str) -> None:
    sizes = {"vocab_size": 9, "width": 16, "depth": 2, "heads": 2, "key_heads": 1, "head_width": 8, "hidden": 8}
    with pytest.raises(ValueError, match=named):
        LanguageConfig(**sizes | {"context": 16} | change)


def test_a_model_of_no_family_is_not_written(folder: Path) -> None:
    model = read_language_model(folder)
    object.__setattr__(model.config, "window", 8)
    with pytest.raises(ValueError, match="no published family"):
        config_entries(model.config, dtype="float32")
    with pytest.raises(ValueError, match="no published family"):
        write_language_model(model, folder / "new")
    assert not (folder / "new").exists()
