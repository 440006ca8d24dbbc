"""Multi-head latent attention against transformers' DeepSeek-V2 and V3, its two forms, its cache, and pages."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm.attention import Causal, Paged
from mm.batch import Padded
from mm.decoder.cache import LayerCache
from mm.decoder.language import LanguageModel
from mm.decoder.language_config import LanguageConfig
from mm.decoder.latent import Latent, LatentAttention
from mm.transformer import Angles, rotary_frequencies

WIDTH, HEADS, BASE = 32, 4, 10000.0
SIZES = [
    Latent(rank=16, plain_width=8, turned_width=4, value_width=8),
    Latent(rank=12, plain_width=6, turned_width=8, value_width=10, query_rank=20),
    Latent(rank=40, plain_width=8, turned_width=4, value_width=4, query_rank=8),
]


def theirs(version: int, sizes: Latent, **settings: Any) -> tuple[nn.Module, nn.Module]:
    transformers = pytest.importorskip("transformers")
    name = f"deepseek_v{version}"
    module = getattr(transformers.models, name)
    modeling = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["x"])
    config = getattr(module, f"DeepseekV{version}Config")(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=sizes.query_rank,
        kv_lora_rank=sizes.rank,
        qk_nope_head_dim=sizes.plain_width,
        qk_rope_head_dim=sizes.turned_width,
        v_head_dim=sizes.value_width,
        attn_implementation="eager",
        **settings,
    )
    torch.manual_seed(0)
    attention = getattr(modeling, f"DeepseekV{version}Attention")(config, 0).eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(
                torch.rand_like(parameter) + 0.5 if parameter.dim() == 1 else torch.randn_like(parameter) / 4
            )
    return attention, getattr(modeling, f"DeepseekV{version}RotaryEmbedding")(config)


NAMES = {
    "q_proj": "q",
    "q_a_proj": "q_down",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "q",
    "kv_a_proj_with_mqa": "kv_down",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "kv",
    "o_proj": "out",
}


def angles(places: Tensor, sizes: Latent) -> Angles:
    return Angles.at(places, rotary_frequencies(sizes.turned_width, base=BASE))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("version", "settings"), [(2, {}), (3, {}), (3, {"rope_interleave": False})], ids=["v2", "v3", "v3 in halves"]
)
def test_outputs_and_gradients_are_those_of_transformers(version: int, settings: dict[str, Any], sizes: Latent) -> None:
    reference, rotary = theirs(version, sizes, **settings)
    ours = LatentAttention(WIDTH, heads=HEADS, sizes=sizes, neighbours=not settings)
    ours.load_state_dict({f"{NAMES[key.split('.')[0]]}.weight": value for key, value in reference.state_dict().items()})
    made = torch.Generator().manual_seed(1)
    x, direction = torch.randn(2, 11, WIDTH, generator=made), torch.randn(2, 11, WIDTH, generator=made)
    places = torch.arange(11)[None]
    hidden = torch.zeros(11, 11).masked_fill(~Causal().dense(11, 11)[0], -torch.inf)[None, None]
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = reference(one, position_embeddings=rotary(one, places), attention_mask=hidden)[0]
    got = ours(other, mask=Causal(), angles=angles(places, sizes))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for out in (expected, got):
        (out * direction).sum().backward()
    torch.testing.assert_close(other.grad, one.grad, atol=1e-4, rtol=1e-4)
    parameters = dict(ours.named_parameters())
    assert len(parameters) == len(list(reference.parameters()))
    for key, parameter in reference.named_parameters():
        gradient = parameters[f"{NAMES[key.split('.')[0]]}.weight"].grad
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-4, msg=lambda m, at=key: f"{at}: {m}")


def module(sizes: Latent) -> LatentAttention:
    torch.manual_seed(0)
    return LatentAttention(WIDTH, heads=HEADS, sizes=sizes)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_absorbed_form_equals_the_written_out_one(sizes: Latent) -> None:
    attention, made = module(sizes), torch.Generator().manual_seed(2)
    q_plain = torch.randn(2, 3, HEADS, sizes.plain_width, generator=made)
    q_turned = torch.randn(2, 3, HEADS, sizes.turned_width, generator=made)
    latent = torch.randn(2, 9, 1, sizes.rank, generator=made)
    k_turned = torch.randn(2, 9, 1, sizes.turned_width, generator=made)
    expected = attention._read_written_out(q_plain, q_turned, latent, k_turned, mask=Causal())
    got = attention._read_absorbed(q_plain, q_turned, latent, k_turned, mask=Causal())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_form_of_fewer_multiplications_is_taken() -> None:
    """At DeepSeek-V3's sizes a decoding step is absorbed and a fresh prompt is written out."""
    with torch.device("meta"):
        attention = LatentAttention(64, heads=2, sizes=Latent(512, 128, 64, 128, query_rank=1536))
    assert attention._absorbed_is_cheaper(1, 4096)
    assert attention._absorbed_is_cheaper(64, 4096)
    assert not attention._absorbed_is_cheaper(4096, 4096)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_cache_holds_the_latent_and_the_turned_key_alone_and_gives_the_same(sizes: Latent) -> None:
    attention = module(sizes)
    x = torch.randn(2, 10, WIDTH, generator=torch.Generator().manual_seed(3))
    places = torch.arange(10)[None]
    with torch.no_grad():
        expected = attention(x, mask=Causal(), angles=angles(places, sizes))
        cache, parts = LayerCache(torch.zeros(2, dtype=torch.long), capacity=10), []
        for start, end in ((0, 4), (4, 7), (7, 8), (8, 9), (9, 10)):
            cache.advance(torch.tensor([start, start]))
            at = angles(places[:, start:end], sizes)
            parts.append(attention(x[:, start:end], mask=Causal(), angles=at, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)
    stored = [value for value in vars(cache).values() if isinstance(value, Tensor) and value.dim() == 4]
    assert sum(value[0].numel() for value in stored) == 10 * (sizes.rank + sizes.turned_width)


class Pool:
    """A stand-in for a paged cache: one row of pages in the order of the block table."""

    def __init__(self, latent: Tensor, k_turned: Tensor, places: Tensor) -> None:
        self.latent, self.k_turned, self.places = latent, k_turned, places

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for pool, new in ((self.latent, k), (self.k_turned, v)):
            pool[0, self.places] = new[:, 0]
        return self.latent, self.k_turned


def test_pages_of_latents_equal_a_contiguous_cache() -> None:
    sizes = SIZES[1]
    attention = module(sizes)
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(4))
    tables = torch.tensor([[3, 1], [0, 2]])
    latent, k_turned = torch.zeros(1, 16, 1, sizes.rank), torch.zeros(1, 16, 1, sizes.turned_width)
    with torch.no_grad():
        expected = attention(x, mask=Causal(), angles=angles(torch.arange(7)[None], sizes))
        for step in range(7):
            pool = Pool(latent, k_turned, tables[:, step // 4] * 4 + step % 4)
            mask = Paged(tables, torch.tensor([step + 1] * 2), page_size=4)
            at = angles(torch.tensor([[step]]), sizes)
            got = attention(x[:, step : step + 1], mask=mask, angles=at, cache=pool)
            torch.testing.assert_close(got[:, 0], expected[:, step], atol=1e-5, rtol=1e-5)


def test_a_language_model_with_latent_attention_writes_the_same_with_and_without_its_cache() -> None:
    config = LanguageConfig(
        vocab_size=50, width=32, depth=2, heads=4, key_heads=4, head_width=8, hidden=48, context=40, latent=SIZES[1]
    )
    torch.manual_seed(0)
    model = LanguageModel(config).eval()
    model.init_weights(std=0.2)
    row = [3, 14, 15]
    with torch.no_grad():
        logits, state = model.read(Padded(torch.tensor([row]), torch.tensor([3])), capacity=40)
        for _ in range(20):
            torch.testing.assert_close(logits[0], model(torch.tensor([row])).logits[0, -1], atol=1e-5, rtol=1e-5)
            row.append(int(logits.argmax()))
            logits, state = model.step(logits.argmax(-1), state)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="turned_width must be even"):
        Latent(8, 8, 3, 8)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        Latent(0, 8, 4, 8)
    with pytest.raises(ValueError, match="query_rank"):
        Latent(8, 8, 4, 8, query_rank=0)
