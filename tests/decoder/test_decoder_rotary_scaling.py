"""Scaled rotary positions against transformers, the papers' words for them, and bad numbers."""

import math
from typing import Any

import pytest
import torch

from mm.decoder.huggingface_entries import Entries
from mm.decoder.huggingface_rotary import read_rotary, rotary_entries
from mm.decoder.rotary_scaling import RotaryScaling, rotary_angles
from mm.transformer import Angles, rotary_frequencies

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
SETTINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 5e5},
    LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5},
    LLAMA3 | {"low_freq_factor": 0.5, "original_max_position_embeddings": 100},
    LLAMA3,
    YARN,
    YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    YARN | {"mscale": 0.5, "mscale_all_dim": 1.5, "beta_fast": 16, "beta_slow": 2},
    YARN | {"attention_factor": 0.8, "truncate": False, "rope_theta": 150000.0},
    YARN | {"original_max_position_embeddings": 16},
    YARN | {"beta_fast": 1.5, "beta_slow": 1.4},
    {"rope_type": "yarn", "factor": 1.0},
    {"type": "yarn", "factor": 4},
]


def read(rope: dict[str, Any], *, key: str = "rope_parameters") -> tuple[float, RotaryScaling | None]:
    return read_rotary(Entries({key: dict(rope), "rope_theta": 10000.0}), context=131072)


@pytest.mark.parametrize("head_width", [8, 64, 128])
@pytest.mark.parametrize("rope", SETTINGS)
def test_angles_are_those_of_transformers(rope: dict[str, Any], head_width: int) -> None:
    transformers = pytest.importorskip("transformers")
    modeling = transformers.models.llama.modeling_llama
    config = transformers.LlamaConfig(
        head_dim=head_width,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 10000.0} | rope,
    )
    positions = torch.tensor([[0, 1, 2, 7, 100, 1000]])
    cos, sin = modeling.LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float32), positions)
    base, scaling = read(rope)
    got = rotary_angles(positions, head_width=head_width, base=base, scaling=scaling)
    half = head_width // 2
    # Angles of 1000 radians are known to 1e-4 in float32.
    torch.testing.assert_close(got.cos[:, :, 0], cos, atol=3e-4, rtol=0)
    torch.testing.assert_close(got.sin[:, :, 0, half:], sin[..., half:], atol=3e-4, rtol=0)
    torch.testing.assert_close(got.sin[:, :, 0, :half], -sin[..., :half], atol=3e-4, rtol=0)
    if scaling is not None:
        plain = rotary_frequencies(head_width, base=base)
        reference = modeling.ROPE_INIT_FUNCTIONS[scaling.kind](config)
        torch.testing.assert_close(scaling.frequencies(plain, base=base), reference[0], atol=0, rtol=2e-6)
        assert scaling.angle_factor == pytest.approx(reference[1])


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("rope", SETTINGS)
def test_the_factor_on_latent_scores_is_that_of_transformers(rope: dict[str, Any], version: int) -> None:
    transformers = pytest.importorskip("transformers")
    name = f"deepseek_v{version}"
    modeling = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["x"])
    _, scaling = read(rope)
    expected = modeling.yarn_apply_mscale({"rope_type": rope.get("type")} | rope, 1.0)
    assert (1.0 if scaling is None else scaling.score_factor) == pytest.approx(expected)
    assert transformers


@pytest.mark.parametrize("rope", SETTINGS)
def test_what_is_written_is_read_again(rope: dict[str, Any]) -> None:
    base, scaling = read(rope)
    assert read(rotary_entries(base, scaling)) == (base, scaling)
    assert read(rope, key="rope_scaling") == (base, scaling)
    both = {"rope_parameters": rotary_entries(base, scaling), "rope_scaling": rotary_entries(base, scaling)}
    assert read_rotary(Entries(both), context=131072) == (base, scaling)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_a_factor_of_one_changes_nothing(kind: Any) -> None:
    positions = torch.arange(50)[None]
    plain = Angles.at(positions, rotary_frequencies(32, base=1e4))
    got = rotary_angles(positions, head_width=32, base=1e4, scaling=RotaryScaling(kind, 1.0, original_context=20))
    torch.testing.assert_close((got.cos, got.sin), (plain.cos, plain.sin), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_fast_pairs_stay_and_slow_ones_are_slowed_down_by_the_factor(kind: Any) -> None:
    plain = rotary_frequencies(128, base=1e4)
    turns = 4096 * plain / (2 * math.pi)
    scaled = RotaryScaling(kind, 8.0, original_context=4096, slow=1.0, fast=32.0).frequencies(plain, base=1e4)
    torch.testing.assert_close(scaled[turns >= 40], plain[turns >= 40])
    torch.testing.assert_close(scaled[turns <= 0.8], plain[turns <= 0.8] / 8)
    between = (turns > 1.3) & (turns < 25)
    assert between.any()
    assert bool(((scaled < plain) & (scaled > plain / 8))[between].all())
    assert bool((scaled.diff() < 0).all())


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type must be one of default, linear, .*'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type must be one of .* got 'longrope'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type must be one of"),
        ({"rope_parameters": ["yarn"]}, "rope_parameters must be an object"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor must be a positive number, got None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor must be a positive number, got '2'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, r"factor of 'linear' must be 1\.\..*, got 0.5"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1e300}}, "factor of 'linear' must be"),
        ({"rope_parameters": {"rope_type": "linear", "factor": math.nan}}, "factor must be a positive number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, "belong to 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be a positive number"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "must be below fast .* got slow=1.0, fast=1.0"),
        ({"rope_parameters": LLAMA3 | {"attention_factor": 2.0}}, "belong to 'yarn'"),
        ({"rope_parameters": YARN | {"beta_fast": 1e-300}}, "must be below fast"),
        ({"rope_parameters": YARN | {"beta_slow": 64}}, "must be below fast .* got slow=64.0, fast=32.0"),
        ({"rope_parameters": YARN | {"mscale": 1.0}}, "given together, got 1.0 and 0.0"),
        ({"rope_parameters": YARN | {"mscale_all_dim": 1e300, "mscale": 1.0}}, "mscale and mscale_all_dim must be 0"),
        ({"rope_parameters": YARN | {"truncate": None}}, "truncate must be true or false"),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings"),
        ({"rope_parameters": YARN, "original_max_position_embeddings": 64}, "must be 4096, got 64"),
        ({"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 4.0}}, "contradicts rope_parameters"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN}, "contradicts rope_parameters"),
        ({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1, got 0.5"),
        ({"rope_theta": None}, "rope_theta must be a positive number, got None"),
    ],
)
def test_settings_we_cannot_compute_are_named(entries: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        read_rotary(Entries({"rope_theta": 1e4} | entries), context=8192)


def test_a_scaling_without_its_original_context_is_refused() -> None:
    with pytest.raises(ValueError, match="original_context of 'yarn' must be at least 1, got 0"):
        RotaryScaling("yarn", 2.0)
