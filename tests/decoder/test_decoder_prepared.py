"""A decoder laid out for generation computes what it computed before, and leaves the trained one alone."""

import pytest
import torch

import mm.decoder.prepared
from mm.attention import Causal, Mixed, Packed, Paged, attend
from mm.decoder.decoder import MoEDecoder
from mm.decoder.experts import MixtureOfExperts
from mm.decoder.language import LanguageModel
from mm.decoder.language_config import LanguageConfig
from mm.decoder.latent import Latent
from mm.decoder.prepared import FEW_ROWS, Laid, LaidNorm, prepared
from mm.transformer import RMSNorm

SIZES = {"vocab_size": 50, "width": 32, "depth": 2, "heads": 4, "key_heads": 2, "head_width": 8, "context": 64}
CONFIGS = {
    "dense": LanguageConfig(**SIZES, hidden=48),
    "normed heads, tied": LanguageConfig(**SIZES, hidden=48, norm="head", tied=True),
    "normed rows, experts": LanguageConfig(**SIZES, hidden=0, norm="all", num_experts=4, expert_width=16),
    "latent": LanguageConfig(**SIZES, hidden=48, latent=Latent(rank=16, plain_width=8, turned_width=4, value_width=8)),
}


@pytest.fixture(params=[0, mm.decoder.prepared.WORTH_LAYING], ids=["all laid out", "small as they are"])
def _layout(request, monkeypatch):
    monkeypatch.setattr(mm.decoder.prepared, "WORTH_LAYING", request.param)


laid = pytest.mark.usefixtures("_layout")


@laid
@pytest.mark.parametrize("rows", [1, 7, 33, 100])
def test_a_laid_out_product_is_the_product_whatever_the_rows(rows):
    torch.manual_seed(0)
    first, second, x = torch.randn(24, 40), torch.randn(8, 40), torch.randn(rows, 40)
    expected = x.double() @ torch.cat([first, second]).double().T
    torch.testing.assert_close(Laid(first, second)(x), expected.float(), rtol=1e-5, atol=1e-5)


@laid
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_the_twin_are_those_of_the_model(name):
    torch.manual_seed(0)
    model = LanguageModel(CONFIGS[name]).eval()
    model.init_weights(std=0.2)
    before = {key: item.clone() for key, item in model.state_dict().items()}
    ids = torch.randint(0, 50, (3, 9))
    with torch.no_grad():
        expected, twin = model(ids).logits, model.prepared()
        torch.testing.assert_close(twin(ids).logits, expected, rtol=1e-4, atol=1e-5)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], item) for key, item in before.items())


@laid
@pytest.mark.parametrize(("shared", "shared_gate"), [(0, False), (24, False), (24, True)])
@pytest.mark.parametrize("tokens", [1, FEW_ROWS, FEW_ROWS + 1])
def test_all_experts_for_few_tokens_give_what_sorting_gives(tokens, shared, shared_gate):
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "experts_per_token": 2, "expert_width": 16}
    layer = MixtureOfExperts(32, **sizes, shared_expert_width=shared, shared_gate=shared_gate).eval()
    layer.experts.init_weights(output_scale=1.0)
    x = torch.randn(tokens, 32)
    holder = torch.nn.Sequential(layer)
    with torch.no_grad():
        (expected, routing), (got, other) = layer(x), prepared(holder)[0](x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(other.experts, routing.experts)


@laid
def test_an_expert_that_overflows_for_a_token_that_did_not_choose_it_changes_nothing():
    torch.manual_seed(0)
    layer = MixtureOfExperts(
        32, num_experts=4, experts_per_token=2, expert_width=16, shared_expert_width=0, selection_bias=True
    ).eval()
    layer.experts.init_weights(output_scale=1.0)
    with torch.no_grad():
        layer.router.selection_bias[3] = -10  # nobody chooses it
        layer.experts.gate_up[3] *= 1e25
        x = torch.randn(FEW_ROWS, 32)
        expected, got = layer(x)[0], prepared(torch.nn.Sequential(layer))[0](x)[0]
    assert expected.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_the_laid_norm_is_the_norm_at_every_size(scale):
    torch.manual_seed(0)
    norm, x = RMSNorm(40, eps=1e-5), scale * torch.randn(2, 3, 40)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(40))
        torch.testing.assert_close(LaidNorm(norm)(x), norm(x), rtol=1e-5, atol=1e-6)


@laid
def test_the_output_layer_is_laid_out_too():
    """It is the largest of all, and was once left out without a word."""
    decoder = MoEDecoder(100, width=64, depth=1, heads=2).eval()
    twin, hidden = decoder.prepared(), torch.randn(3, 64)
    assert isinstance(twin._output, Laid)
    torch.testing.assert_close(twin._logits(hidden), decoder._logits(hidden), rtol=1e-4, atol=1e-4)


def test_our_decoder_keeps_its_parameters():
    decoder = MoEDecoder(50, width=32, depth=2, heads=4)
    ids = [id(item) for item in decoder.parameters()]
    decoder.prepared()
    assert [id(item) for item in decoder.parameters()] == ids


@pytest.mark.parametrize("left", [None, 2])
def test_a_mixed_pass_is_what_its_dense_mask_says(left):
    g, page = torch.Generator().manual_seed(0), 2
    k, v = (torch.randn(1, 60 * page, 2, 8, generator=g) for _ in range(2))
    lengths = [1, 40, 3, 2, 39]  # so unequal that rows are taken in two groups
    blocks = torch.randperm(60, generator=g)
    tables, start = torch.zeros(len(lengths), 20, dtype=torch.long), 0
    for row, length in enumerate(lengths):
        own = blocks[start : start + -(-length // page)]
        tables[row, : len(own)], start = own, start + len(own)
    steps = Paged(tables, torch.tensor(lengths), page, left=left)
    assert len(steps.alike(1)) > 1
    reads = Packed((3, 2), (5, 2), causal=True, left=left)
    places = torch.randperm(120, generator=g)[:7]
    mask, q = Mixed(steps, reads, places), torch.randn(1, 10, 4, 8, generator=g)
    seen = mask.dense(10, 120)
    scores = torch.einsum("bmhk,bnhk->bhmn", q, k.repeat_interleave(2, 2)) * 8**-0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    expected = torch.einsum("bhmn,bnhk->bmhk", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(attend(q, k, v, mask=mask), expected, rtol=1e-4, atol=1e-5)
    alone = attend(q[:, 8:], k[:, places[5:]], v[:, places[5:]], mask=Causal() if left is None else reads.within)
    torch.testing.assert_close(attend(q, k, v, mask=mask)[:, 8:], alone, rtol=1e-4, atol=1e-5)
