"""An open model that reads our tokens: at first it is itself; as a prefix they are the start of one long sequence."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_decoder_model import MEMORY, VOCAB, make_memory, make_writing, pad, select, without_cache

from mm.attention import Causal, Window
from mm.batch import SPECIAL_IDS, Padded, Slots, Tokens
from mm.decoder.beam import beam_search
from mm.decoder.engine import Engine
from mm.decoder.generate import Sampling
from mm.decoder.language import LanguageModel
from mm.decoder.language_config import LanguageConfig
from mm.decoder.latent import Latent
from mm.decoder.output import pack
from mm.decoder.request import Request
from mm.decoder.writing import WritingModel

SIZES = {
    "vocab_size": VOCAB, "width": 32, "depth": 3, "heads": 4, "key_heads": 2, "head_width": 8, "hidden": 48,
    "context": 64,
}  # fmt: skip
CONFIGS = {
    "dense": LanguageConfig(**SIZES, norm="head"),
    "experts": LanguageConfig(**SIZES | {"hidden": 0}, num_experts=4, expert_width=16, tied=True),
    "latent, one layer dense": LanguageConfig(
        **SIZES, num_experts=4, expert_width=16, gates="softmax", dense_layers=(0,),
        latent=Latent(rank=8, plain_width=8, turned_width=4, value_width=6),
    ),
    "window": LanguageConfig(**SIZES, window=6),
}  # fmt: skip
READS = ("cross_attention", "prefix")
every_kind = pytest.mark.parametrize(
    ("kind", "reads"),
    [(kind, reads) for kind in CONFIGS for reads in READS],
    ids=[f"{kind}, {reads}" for kind in CONFIGS for reads in READS],
)


def make_decoder(kind="experts", reads="cross_attention", *, fresh=False, **options):
    torch.manual_seed(0)
    decoder = WritingModel(CONFIGS[kind], memory_width=MEMORY, reads=reads, **options).eval()
    if not fresh:  # open gates and weights far from zero, so that choices are decided and the memory matters
        g = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                if name.endswith("gate") and parameter.shape == (1,):
                    parameter.fill_(1.0)
                elif "norm" not in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.25)
            _, weight = decoder._last()
            weight[SPECIAL_IDS.end] *= 3
    return decoder


def plain(decoder, writing):
    """The language model's own logits of every target token, one row at a time."""
    rows = []
    for row in range(len(writing.study)):
        ids, _ = pack(*(getattr(select(writing, [row]), name) for name in ("prompt", "target")))
        first = int(writing.prompt.lengths[row]) - 1
        rows.append(decoder.language(ids).logits[0, first:])
    return torch.cat(rows)


@pytest.mark.parametrize("kind", CONFIGS)
def test_fresh_gates_and_slots_leave_the_language_model_as_it_is(kind):
    decoder = make_decoder(kind, fresh=True)
    writing, memory = select(make_writing(), [0]), make_memory(1)
    same = {"rtol": 1e-6, "atol": 1e-6}  # rows of another product's size may be summed in another order
    torch.testing.assert_close(decoder(writing, memory).logits, plain(decoder, writing), **same)
    text = make_decoder(kind, "prefix", fresh=True)
    nothing = Tokens(memory.values, torch.zeros_like(memory.mask))
    torch.testing.assert_close(text(writing, nothing).logits, plain(text, writing), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_prefix_equals_one_causal_sequence(kind):
    """Each row run alone: its memory's real tokens, its prompt and target end to end, through the plain layers."""
    decoder, writing, memory = make_decoder(kind, "prefix"), make_writing(), make_memory(3)
    memory = Tokens(memory.values, torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0], [1] * 7]).bool())
    got = decoder(writing, memory, rows=writing.study)
    for row, study in enumerate(writing.study.tolist()):
        one = select(writing, [row])
        ids, _ = pack(one.prompt, one.target)
        words = decoder.language.embedding(ids)
        words = words + (ids == SPECIAL_IDS.slot)[..., None] * decoder.slot(one.slots)[:, None]
        x = torch.cat([decoder.projection(memory.values[study][memory.mask[study]])[None], words], 1)
        mask = Causal() if decoder.window is None or decoder.window >= x.shape[1] else Window(decoder.window - 1)
        hidden, _ = decoder.language._run(x, mask=mask, positions=torch.arange(x.shape[1])[None])
        expected = decoder.language.logits(hidden[0, -int(one.target.lengths) :])
        torch.testing.assert_close(got.logits[got.rows == row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reads", READS)
def test_the_memory_is_run_or_projected_once_a_study(reads):
    decoder, writing, memory = make_decoder(reads=reads), make_writing(), make_memory(3)
    seen = []
    layer = decoder.projection if reads == "prefix" else decoder.cross[0].attention.kv
    layer.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    decoder(writing, memory, rows=writing.study)
    decoder.generate(writing, memory, rows=writing.study, sampling=Sampling(4))
    assert seen == [3, 3]
    gathered = Tokens(memory.values[writing.study], memory.mask[writing.study])
    dealt = decoder(writing, memory, rows=writing.study)
    torch.testing.assert_close(dealt.logits, decoder(writing, gathered).logits, rtol=1e-5, atol=1e-5)


@every_kind
def test_padding_never_changes_a_result(kind, reads):
    decoder, writing, memory = make_decoder(kind, reads), make_writing(), make_memory()
    expected = decoder(writing, memory)
    junk = replace(
        writing, prompt=pad(writing.prompt, 3, SPECIAL_IDS.slot), target=pad(writing.target, 4, SPECIAL_IDS.slot)
    )
    noise = torch.full((5, 2, MEMORY), 1e3)
    dirty = memory.values.masked_fill(~memory.mask[:, :, None], 1e3)
    none = torch.zeros(5, 2, dtype=torch.bool)
    # Padding stands behind and in front of the real tokens.
    longer = Tokens(torch.cat([noise, dirty, noise], 1), torch.cat([none, memory.mask, none], 1))
    got = decoder(junk, longer)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.targets, expected.targets)
    torch.testing.assert_close(got.expert_load, expected.expert_load)
    torch.testing.assert_close(got.load_balancing_loss, expected.load_balancing_loss)
    torch.testing.assert_close(got.z_loss, expected.z_loss)
    sampling = Sampling(8)
    assert (
        decoder.generate(junk, longer, sampling=sampling).rows()
        == decoder.generate(writing, memory, sampling=sampling).rows()
    )


@every_kind
def test_rows_do_not_see_each_other(kind, reads):
    decoder, writing, memory = make_decoder(kind, reads), make_writing(), make_memory()
    together = decoder(writing, memory)
    for row in range(5):
        alone = decoder(select(writing, [row]), Tokens(memory.values[[row]], memory.mask[[row]]))
        torch.testing.assert_close(alone.logits, together.logits[together.rows == row], rtol=1e-5, atol=1e-5)


@every_kind
@torch.no_grad()
def test_cache_equals_no_cache(kind, reads):
    decoder, writing, memory = make_decoder(kind, reads), make_writing(), make_memory()
    sampling = Sampling(8, temperature=1.0, top_p=0.9, seed=3)
    expected, scores = without_cache(decoder, writing, memory, sampling)
    got = decoder.generate(writing, memory, sampling=sampling)
    assert got.rows() == expected
    assert len({len(row) for row in expected}) > 1
    assert got.log_probability.tolist() == pytest.approx(scores, abs=1e-4)


@every_kind
@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"max_sequences": 3, "token_budget": 9, "page_size": 4}],
    ids=["at once", "prompts in pieces"],
)
def test_the_engine_writes_what_generate_writes(kind, reads, options):
    decoder, writing, memory = make_decoder(kind, reads), make_writing(6), make_memory()
    sampling = Sampling(8, temperature=1.0, seed=tuple(range(6)))
    expected = decoder.generate(writing, memory, sampling=sampling, rows=writing.study)
    engine = Engine(decoder, **options)
    got = engine.run(engine.requests(writing, memory, sampling=sampling, rows=writing.study))
    assert [list(each.ids) for each in got] == expected.rows()
    scores = [sum(each.log_probabilities) for each in got]
    assert scores == pytest.approx(expected.log_probability.tolist(), abs=1e-4)


@pytest.mark.parametrize("reads", READS)
def test_the_engine_runs_plain_text_without_a_memory(reads):
    decoder, prompt = make_decoder(reads=reads), [12, 30, 14, 9]
    (got,) = Engine(decoder).run([Request(tuple(prompt), sampling=Sampling(6))])
    logits, state = decoder.language.read(Padded.of([prompt]), capacity=16)
    for token in got.ids:
        allowed = logits.clone()
        allowed[:, [0, 2, 3, 4, 5]] = -torch.inf
        assert allowed.argmax(-1).tolist() == [token]
        logits, state = decoder.language.step(torch.tensor([token]), state)


@pytest.mark.parametrize("reads", READS)
def test_beams_of_one_are_greedy(reads):
    decoder, writing, memory = make_decoder(reads=reads), make_writing(), make_memory()
    greedy = decoder.generate(writing, memory, sampling=Sampling(6)).rows()
    keys, _ = decoder._project(memory, None)
    state = decoder._open(keys, writing.prompt.lengths, capacity=20)
    hidden = decoder._continue(writing.prompt.values, writing.prompt.lengths, writing.slots, state)
    logits = decoder._logits(hidden[torch.arange(5), writing.prompt.lengths - 1])
    state = state.advance(state.lengths + writing.prompt.lengths)
    assert beam_search(decoder, logits, state, beams=1, max_new_tokens=6).rows() == greedy


@every_kind
def test_generation_is_blind_to_the_target(kind, reads):
    decoder, writing, memory = make_decoder(kind, reads), make_writing(), make_memory()
    sampling = Sampling(8, temperature=1.0)
    rows = [
        decoder.generate(replace(writing, target=target), memory, sampling=sampling).rows()
        for target in (writing.target, None, Padded.of([[7]] * 5))
    ]
    assert rows[0] == rows[1] == rows[2]


@every_kind
def test_memory_and_slot_matter(kind, reads):
    decoder, writing, memory = make_decoder(kind, reads), make_writing(), make_memory()
    before = decoder(writing, memory)
    other = decoder(writing, Tokens(memory.values + 1, memory.mask)).logits
    slots = Slots(**{name: value * 0 for name, value in vars(writing.slots).items()})
    about = decoder(replace(writing, slots=slots), memory).logits
    for changed in (other, about):
        for row in range(5):
            assert (changed - before.logits)[before.rows == row].abs().max() > 1e-3


@every_kind
def test_gradient_reaches_every_parameter(kind, reads):
    decoder = make_decoder(kind, reads).train()
    writing, memory = make_writing(60), make_memory(size=60)
    memory = Tokens(memory.values.requires_grad_(), memory.mask)
    output = decoder(writing, memory)
    (output.cross_entropy() + output.load_balancing_loss + output.z_loss).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        rows = parameter.grad if parameter.grad.dim() > 2 or name.startswith("slot") else parameter.grad[None]
        for row in rows:
            assert row.abs().sum() > 0, name
    if kind != "window":  # in a window not every token is seen
        assert (memory.values.grad.abs().sum(-1) > 0).equal(memory.mask)


def test_a_fresh_gate_learns():
    decoder = make_decoder(fresh=True).train()
    decoder(make_writing(), make_memory()).cross_entropy().backward()
    assert all(cross.gate.grad.abs() > 0 for cross in decoder.cross)
    assert decoder.slot.code.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reads", READS)
def test_routed_tokens_are_exactly_the_real_ones(reads):
    decoder, writing, memory = make_decoder(reads=reads), make_writing(), make_memory(3)
    seen = []
    decoder.language.layers[0].feed_forward.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    output = decoder(writing, memory, rows=writing.study)
    real = int((writing.prompt.lengths + writing.target.lengths - 1).sum())
    assert seen == [*([int(memory.mask.sum())] if reads == "prefix" else []), real]
    assert len(output.routed_rows) == len(output.routings[0].experts) == real
    assert len(decoder.routers()) == len(output.routings) == 3


def test_load_counts_prefix_and_text_by_their_tokens():
    decoder, writing, memory = make_decoder(reads="prefix"), make_writing(), make_memory(3)
    chosen = []
    for router in decoder.routers():
        router.register_forward_hook(lambda own, _, out: chosen.append((own, out.experts)))
    output = decoder(writing, memory, rows=writing.study)
    for index, router in enumerate(decoder.routers()):
        counts = torch.bincount(torch.cat([e for own, e in chosen if own is router]).flatten(), minlength=4)
        torch.testing.assert_close(output.expert_load[index], counts / counts.sum())


def test_a_dense_model_has_no_routers_and_no_router_losses():
    decoder = make_decoder("dense")
    output = decoder(make_writing(), make_memory())
    assert decoder.routers() == output.routings == ()
    assert (output.load_balancing_loss, output.z_loss) == (0, 0)


def test_cross_attention_may_stand_before_every_other_layer():
    decoder, writing, memory = make_decoder(every=2), make_writing(), make_memory()
    assert len(decoder.cross) == len(decoder.remember(memory)) == 2
    rows = decoder.generate(writing, memory, sampling=Sampling(8)).rows()
    engine = Engine(decoder)
    assert [list(e.ids) for e in engine.run(engine.requests(writing, memory, sampling=Sampling(8)))] == rows


@pytest.mark.parametrize("reads", READS)
def test_bfloat16_autocast_is_close_and_generates(reads):
    decoder, writing, memory = make_decoder(reads=reads), make_writing(), make_memory()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(0.5)
    expected = decoder(writing, memory)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = decoder(writing, memory)
        loss = output.cross_entropy()
        rows = decoder.generate(writing, memory, sampling=Sampling(4)).rows()
    assert (output.logits.float() - expected.logits).norm() / expected.logits.norm() < 0.05
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.cross_entropy(), rtol=0.02, atol=0.02)
    assert all(rows)


@pytest.mark.parametrize("reads", READS)
def test_a_study_without_any_input_is_written_without_nan(reads):
    decoder, writing, memory = make_decoder(reads=reads), make_writing(), make_memory()
    empty = Tokens(memory.values, torch.zeros_like(memory.mask))
    assert decoder(writing, empty).logits.isfinite().all()
    assert decoder.generate(writing, empty, sampling=Sampling(4)).log_probability.isfinite().all()


class TestImported:
    def test_weights_and_sizes_are_those_of_the_folder(self, monkeypatch):
        model = LanguageModel(CONFIGS["dense"])
        model.init_weights()
        fake = SimpleNamespace(read_decoder=lambda folder: (model.bfloat16(), Path(folder) / "tokenizer.json"))
        monkeypatch.setitem(sys.modules, "mm.decoder.folder", fake)
        made = WritingModel(folder="imported", memory_width=MEMORY, reads="prefix")
        assert (made.config, made.vocab_size, made.width) == (CONFIGS["dense"], VOCAB, 32)
        assert made.vocabulary == str(Path("imported") / "tokenizer.json")
        assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
        assert torch.equal(made.language.embedding.weight.bfloat16(), model.embedding.weight.bfloat16())
        # Projected tokens of unit variance are about as large as words.
        size = made.projection(torch.randn(500, MEMORY)).square().mean() / model.embedding.weight.square().mean()
        assert 0.7 < size < 1.4

    @pytest.mark.parametrize(
        ("given", "said"), [({}, "neither"), ({"config": CONFIGS["dense"], "folder": "imported"}, "both")]
    )
    def test_either_config_or_folder(self, given, said):
        with pytest.raises(ValueError, match=f"give either config or folder, got {said}"):
            WritingModel(**given, memory_width=MEMORY)


class TestBadInput:
    @pytest.mark.parametrize("reads", READS)
    def test_longer_than_the_context(self, reads):
        decoder, writing, memory = make_decoder(reads=reads), make_writing(), make_memory()
        long = replace(writing, target=pad(writing.target, 60, 10))
        long = replace(long, target=Padded(long.target.values, long.target.lengths + 60))
        message = r"at most 64 tokens \(context\) fit in a row"
        with pytest.raises(ValueError, match=message):
            decoder(long, memory)
        with pytest.raises(ValueError, match=message):
            decoder.generate(writing, memory, sampling=Sampling(60))
        engine = Engine(decoder)
        (study, *_) = engine.remember(memory)
        with pytest.raises(ValueError, match=r"at most 64 together \(context\)"):
            engine.run([Request((12,) * 65, memory=study, sampling=Sampling(4))])

    def test_a_memory_longer_than_the_context(self):
        with pytest.raises(ValueError, match=r"at most 64 tokens .*its memory included, got 65"):
            make_decoder(reads="prefix")(make_writing(), Tokens(torch.randn(5, 65, MEMORY), torch.ones(5, 65).bool()))

    def test_no_targets(self):
        with pytest.raises(ValueError, match=r"writing\.target is needed.*got None"):
            make_decoder()(make_writing(target=False), make_memory())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"every": 4}, r"every must be 1\.\.3 \(depth\), got 4"),
            ({"every": 0}, r"every must be 1\.\.3 \(depth\), got 0"),
            ({"memory_width": 0}, "memory_width must be at least 1, got 0"),
        ],
    )
    def test_numbers_that_do_not_fit(self, options, message):
        with pytest.raises(ValueError, match=message):
            WritingModel(CONFIGS["dense"], **{"memory_width": MEMORY} | options)


def test_the_loss_is_the_whole_cross_entropy():
    decoder = make_decoder().train()
    output = decoder(make_writing(40), make_memory(40))
    whole = F.cross_entropy(output.logits, output.targets)
    parameters = list(decoder.parameters())
    expected = torch.autograd.grad(whole, parameters, retain_graph=True, allow_unused=True)
    got = torch.autograd.grad(output.cross_entropy(), parameters, allow_unused=True)
    torch.testing.assert_close(output.cross_entropy(), whole, rtol=1e-6, atol=1e-6)
    for own, right in zip(got, expected, strict=True):
        torch.testing.assert_close(own, right, rtol=1e-5, atol=1e-6)
