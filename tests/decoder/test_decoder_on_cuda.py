"""Decoders on CUDA: pages read in place by one kernel, experts without waiting for the device, a step as a graph.

What doesn't need the kernels themselves is judged without a GPU: the very passes, masks and pools that CUDA gets.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_decoder_model import MEMORY, VOCAB, make_memory, make_writing

import mm.attention
from mm.attention import Paged
from mm.batch import SPECIAL_IDS, Tokens
from mm.decoder.blocks import BlockAllocator, BlockTable
from mm.decoder.decoder import MoEDecoder
from mm.decoder.engine import Engine
from mm.decoder.experts import MixtureOfExperts
from mm.decoder.generate import Sampling
from mm.decoder.language_config import LanguageConfig
from mm.decoder.latent import Latent
from mm.decoder.paged import LayerPass, Pass
from mm.decoder.tally import tally
from mm.decoder.writing import WritingModel
from mm.transformer import Rotary, rotary_frequencies

SIZES = {
    "vocab_size": VOCAB, "width": 64, "depth": 2, "heads": 4, "key_heads": 2, "head_width": 32, "hidden": 96,
    "context": 256,
}  # fmt: skip
CONFIGS = {
    "dense": LanguageConfig(**SIZES, norm="head"),
    "experts": LanguageConfig(**SIZES | {"hidden": 0}, num_experts=4, expert_width=32, tied=True),
    "latent": LanguageConfig(**SIZES, latent=Latent(rank=16, plain_width=16, turned_width=8, value_width=8)),
}
KINDS = ["own", *(f"{kind}, {reads}" for kind in CONFIGS for reads in ("cross_attention", "prefix"))]


def make_decoder(name):
    torch.manual_seed(0)
    if name == "own":
        decoder = MoEDecoder(VOCAB, width=64, depth=2, heads=2, memory_width=MEMORY, num_experts=4, expert_width=32)
        with torch.no_grad():
            decoder.embedding.weight.mul_(2)
            decoder.embedding.weight[SPECIAL_IDS.end] *= 2
        return decoder.eval()
    kind, reads = name.split(", ")
    decoder, g = WritingModel(CONFIGS[kind], memory_width=MEMORY, reads=reads).eval(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in decoder.named_parameters():
            if key.endswith("gate") and parameter.shape == (1,):
                parameter.fill_(1.0)
            elif "norm" not in key:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
        decoder._last()[1][SPECIAL_IDS.end] *= 3
    return decoder


def written(decoder, writing, memory, **options):
    """Rows by `generate`, and by the engine in pages."""
    sampling = Sampling(20)
    expected = decoder.generate(writing, memory, sampling=sampling, rows=writing.study).rows()
    engine = Engine(decoder, **options)
    got = engine.run(engine.requests(writing, memory, sampling=sampling, rows=writing.study))
    return expected, [list(each.ids) for each in got]


# ------------------------------------------------------------------------------------------------------ without a GPU


@pytest.mark.parametrize("name", KINDS)
def test_passes_as_cuda_gets_them_write_what_generate_writes(name, monkeypatch):
    def over_the_pool(self, *, window=None):
        assert window is None
        return Paged(self.tables, self.starts + self.positions.shape[1], self.page_size)

    def whole_pool(self, k, v):
        self.layer.write(k, v, self.now.places)
        return self.layer.pool()

    monkeypatch.setattr(Pass, "mask", over_the_pool)
    monkeypatch.setattr(LayerPass, "update", whole_pool)
    decoder, writing, memory = make_decoder(name), make_writing(), make_memory(3)
    expected, got = written(decoder, writing, memory, page_size=8, num_blocks=64, max_sequences=3, token_budget=9)
    assert got == expected


def test_a_tally_is_what_bincount_gives():
    g = torch.Generator().manual_seed(0)
    for count in (0, 1, 50):
        numbers = torch.randint(0, 7, (count,), generator=g)
        assert torch.equal(tally(numbers, 9), torch.bincount(numbers, minlength=9))


def test_rotary_positions_of_a_module_in_bfloat16_are_those_of_one_in_float32():
    x, places = torch.randn(1, 3, 2, 32), torch.tensor([[5, 700, 4000]])
    expected = Rotary(32)(x, places)
    turned = Rotary(32).to(torch.bfloat16)
    torch.testing.assert_close(turned(x, places), expected, rtol=1e-6, atol=1e-6)
    rounded = rotary_frequencies(32, base=10000.0).to(torch.bfloat16).float()
    off = 4000 * (rounded - rotary_frequencies(32, base=10000.0)).abs().max()
    assert off > 0.5  # radians: what it would be wrong by


def test_latents_are_taken_out_of_the_pool_row_by_row(monkeypatch):
    """A pool is as large as the whole cache; a step must not copy it."""
    decoder, seen = make_decoder("latent, cross_attention"), []
    inner = mm.attention._attend_dense

    def spy(q, k, v, **rest):
        seen.append(k.shape)
        return inner(q, k, v, **rest)

    attention = decoder.language.layers[0].attention
    monkeypatch.setattr(mm.attention, "_attend_dense", spy)
    pool = torch.zeros(1, 40 * 64, 1, 16), torch.zeros(1, 40 * 64, 1, 8)

    class Pool:
        def update(self, k, v):
            return pool

    mask = Paged(torch.tensor([[3, 1], [7, 0]]), torch.tensor([70, 20]), page_size=64)
    from mm.decoder.rotary_scaling import rotary_angles

    angles = rotary_angles(torch.tensor([[69], [19]]), head_width=8, base=10000.0, scaling=None)
    attention(torch.randn(2, 1, 64), mask=mask, angles=angles, cache=Pool())
    assert [shape[:2] for shape in seen] == [(2, 128)]


# -------------------------------------------------------------------------------------------------------- on a real GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_the_engine_on_cuda_writes_what_generate_writes_there_and_on_the_cpu(name):
    decoder, writing, memory = make_decoder(name), make_writing(), make_memory(3)
    plain = decoder.generate(writing, memory, sampling=Sampling(20), rows=writing.study).rows()
    expected, got = written(
        decoder.cuda(),
        writing.to("cuda"),
        memory.to("cuda"),
        page_size=64,
        num_blocks=32,
        max_sequences=3,
        token_budget=40,
    )
    assert got == expected
    assert expected == plain


@pytest.mark.gpu
@pytest.mark.parametrize("name", [kind for kind in KINDS if "experts" not in kind and kind != "own"])
def test_pages_in_bfloat16_give_the_logits_of_whole_rows_in_fp32(name, monkeypatch):
    """Prompt in one pass, then token by token; the paged kernel takes the steps of all but latents and prefixes."""
    taken, inner = [], mm.attention._attend_paged

    def spy(*args, **options):
        taken.append(inner(*args, **options))
        return taken[-1]

    monkeypatch.setattr(mm.attention, "_attend_paged", spy)
    decoder, memory = make_decoder(name).cuda(), make_memory(2).to("cuda")
    ids = torch.randint(10, VOCAB, (2, 90), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with torch.no_grad():
        keys, _ = decoder._project(memory, None)
        expected = decoder._logits(decoder._run(ids, None, None, keys)[0][:, 59:].flatten(0, 1)).unflatten(0, (2, -1))
        decoder = decoder.to(torch.bfloat16)
        memory = Tokens(memory.values.to(torch.bfloat16), memory.mask)
        keys = decoder.remember(memory)
        allocator, cache = BlockAllocator(8, page_size=64), decoder.paged_cache(num_blocks=8, page_size=64)
        tables, got = [BlockTable(), BlockTable()], []
        for start, end in [(0, 60), *((place, place + 1) for place in range(60, 90))]:
            for table in tables:
                allocator.extend(table, end - start)
            now = cache.plan(tables, [end - start] * 2)
            got.append(decoder.read(ids[:, start:end], cache, now, slots=None, memory=keys))
    logits = torch.stack(got, dim=1).float()
    assert (logits - expected).norm() <= 5e-2 * expected.norm()
    steps = [out for out in taken if out is not None and out.shape[1] == 1]
    assert len(steps) == (60 if name == "dense, cross_attention" else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_losses_and_gradients_on_cuda_are_those_of_the_cpu(name):
    decoder, writing, memory = make_decoder(name), make_writing(), make_memory(3)
    results = []
    for device in ("cpu", "cuda"):
        decoder = decoder.to(device)
        decoder.zero_grad()
        output = decoder(writing.to(device), memory.to(device), rows=writing.study.to(device))
        loss = output.cross_entropy() + 0.01 * output.load_balancing_loss
        loss.backward()
        gradients = {key: item.grad.cpu() for key, item in decoder.named_parameters() if item.grad is not None}
        results.append((loss.detach().cpu(), gradients))
    (loss, gradients), (other, others) = results
    torch.testing.assert_close(other, loss, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == others.keys()
    for key, gradient in gradients.items():
        assert (others[key] - gradient).norm() <= 2e-3 * gradient.norm() + 1e-5, key


def mixture(num_experts):
    torch.manual_seed(0)
    layer = MixtureOfExperts(
        64, num_experts=num_experts, experts_per_token=2, expert_width=48, shared_expert_width=32
    ).cuda()
    layer.router.init_weights()
    layer.experts.init_weights(output_scale=1.0)
    with torch.no_grad():
        layer.router.logits.weight.mul_(50)
    return layer


def one_by_one(layer, x):
    """Every token through its own experts, in a loop."""
    routing, rows = layer.router(x), []
    for token, gates, experts in zip(x, routing.gates, routing.experts.tolist(), strict=True):
        out = layer.shared(token).float()
        for gate, expert in zip(gates, experts, strict=True):
            first, second = (token @ layer.experts.gate_up[expert]).chunk(2)
            out = out + gate * ((F.silu(first) * second) @ layer.experts.down[expert]).float()
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [4, 64])  # of 64 some get no token at all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_experts_on_cuda_equal_a_loop(dtype, num_experts):
    layer, allowed = mixture(num_experts).to(dtype), 1e-4 if dtype == torch.float32 else 3e-2
    x = torch.randn(40, 64, device="cuda", dtype=dtype)
    direction, results = torch.randn(40, 64, device="cuda"), []
    for run in (one_by_one, lambda layer, x: layer(x)[0]):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        out = run(layer, leaf).float()
        (out * direction).sum().backward()
        results.append(
            [out, leaf.grad, layer.experts.gate_up.grad, layer.experts.down.grad, layer.shared.down.weight.grad]
        )
    for expected, got in zip(*results, strict=True):
        assert (got.float() - expected.float()).norm() <= allowed * expected.float().norm()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # that watching for waits is a prototype
def test_a_mixture_in_bfloat16_never_waits_for_the_device():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("PyTorch's grouped_mm runs without the host on Hopper")
    layer, x = mixture(8).to(torch.bfloat16), torch.randn(40, 64, device="cuda", dtype=torch.bfloat16)
    layer(x)[0].sum().mul(2).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, routing = layer(x)
        (out.square().sum() + routing.load_balancing_loss + routing.z_loss).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampled_rows_on_cuda_depend_on_their_own_seed_alone(dtype):
    decoder, writing = make_decoder("own").to("cuda", dtype), make_writing().to("cuda")
    memory = make_memory(3).to("cuda")
    memory = Tokens(memory.values.to(dtype), memory.mask)
    engine = Engine(decoder, page_size=64, num_blocks=32, max_sequences=1, token_budget=40)
    sampling = Sampling(12, temperature=1.0, top_p=0.9, seed=tuple(range(len(writing.study))))
    rows = engine.requests(writing, memory, sampling=sampling, rows=writing.study)
    first = engine.run(rows)
    again = engine.run(replace(row) for row in reversed(rows))
    assert [each.ids for each in reversed(again)] == [each.ids for each in first]
