from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mm.batch import Padded, Slots, Tokens, Writing
from mm.data.tokenizer import SPECIAL_IDS, train_tokenizer
from mm.decoder.decoder import MoEDecoder
from mm.decoder.engine import Engine
from mm.decoder.generate import NEVER_WRITTEN, Sampling, choose
from mm.decoder.groups import GroupLimit
from mm.decoder.loss import chunked_cross_entropy
from mm.transformer import SwiGLU

VOCAB, WIDTH, MEMORY = 60, 32, 24


def make_decoder(**options):
    torch.manual_seed(0)
    sizes = {"width": WIDTH, "depth": 2, "heads": 4, "memory_width": MEMORY, "num_experts": 4, "expert_width": 16}
    decoder = MoEDecoder(VOCAB, **sizes | {"shared_expert_width": 16} | options)
    with torch.no_grad():  # sharp enough for choices to be decided
        decoder.embedding.weight.mul_(2)
    return decoder.eval()


def make_writing(rows=5, *, target=True, seed=1):
    g = torch.Generator().manual_seed(seed)

    def words(count):
        return torch.randint(10, VOCAB, (count,), generator=g).tolist()

    prompts = [[SPECIAL_IDS.en, SPECIAL_IDS.slot] for _ in range(rows)]
    for row in prompts[::2]:
        row += [*words(int(torch.randint(1, 6, (), generator=g))), SPECIAL_IDS.answer]
    targets = [[*words(int(torch.randint(0, 9, (), generator=g))), SPECIAL_IDS.end] for _ in range(rows)]
    sizes = {"kind": 5, "code": 12, "side": 3, "change": 6, "grade": 4}
    slots = Slots(**{name: torch.randint(0, size, (rows,), generator=g) for name, size in sizes.items()})
    study = torch.arange(rows) // 2
    return Writing(study, slots, Padded.of(prompts), Padded.of(targets) if target else None)


def make_memory(size=5, length=7):
    torch.manual_seed(2)
    mask = torch.arange(length) < torch.randint(1, length + 1, (size, 1))
    return Tokens(torch.randn(size, length, MEMORY), mask)


def pad(padded, extra, junk):
    filler = torch.full((len(padded.values), extra), junk)
    values = torch.cat([padded.values, filler], 1)
    values = torch.where(torch.arange(values.shape[1]) < padded.lengths[:, None], values, junk)
    return Padded(values, padded.lengths)


def select(writing, rows):
    def some(padded):
        return Padded(padded.values[rows], padded.lengths[rows])

    slots = Slots(*(getattr(writing.slots, name)[rows] for name in ("kind", "code", "side", "change", "grade")))
    return Writing(writing.study[rows], slots, some(writing.prompt), some(writing.target))


def test_padding_never_changes_a_result():
    decoder, writing, memory = make_decoder(), make_writing(), make_memory()
    expected = decoder(writing, memory)
    junk = replace(
        writing, prompt=pad(writing.prompt, 3, SPECIAL_IDS.slot), target=pad(writing.target, 4, SPECIAL_IDS.slot)
    )
    noise = torch.full((5, 2, MEMORY), 1e3)
    dirty = memory.values.masked_fill(~memory.mask[:, :, None], 1e3)
    longer = Tokens(torch.cat([dirty, noise], 1), torch.cat([memory.mask, torch.zeros(5, 2, dtype=torch.bool)], 1))
    got = decoder(junk, longer)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.targets, expected.targets)
    assert torch.equal(got.expert_load, expected.expert_load)
    torch.testing.assert_close(got.load_balancing_loss, expected.load_balancing_loss)
    torch.testing.assert_close(got.z_loss, expected.z_loss)


def test_rows_do_not_see_each_other():
    decoder, writing, memory = make_decoder(), make_writing(), make_memory()
    together = decoder(writing, memory)
    for row in range(5):
        alone = decoder(select(writing, [row]), Tokens(memory.values[[row]], memory.mask[[row]]))
        torch.testing.assert_close(alone.logits, together.logits[together.rows == row], rtol=1e-5, atol=1e-5)
        own = together.routed_rows == row
        for routing, everybody in zip(alone.routings, together.routings, strict=True):
            assert torch.equal(routing.experts, everybody.experts[own])


def test_routed_tokens_are_exactly_the_real_ones():
    decoder, writing = make_decoder(), make_writing()
    seen = []
    decoder.layers[0].experts.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    decoder(writing, make_memory())
    assert seen == [int((writing.prompt.lengths + writing.target.lengths - 1).sum())]


@pytest.mark.parametrize("gates", ["softmax", "sigmoid", "sigmoid_renormalised"])
def test_a_decoder_of_any_gates_reaches_every_router(gates):
    decoder = make_decoder(gates=gates, selection_bias=True).train()
    output = decoder(make_writing(), make_memory())
    output.cross_entropy().backward()
    assert len(decoder.routers()) == 2
    for router in decoder.routers():
        assert router.selection_bias.tolist() == [0.0] * 4
        assert router.logits.weight.grad.norm() > 0


def test_one_expert_for_every_token_is_a_plain_dense_decoder():
    decoder = make_decoder(num_experts=1, experts_per_token=1, gates="softmax", shared_expert_width=0, expert_width=24)
    seen = []
    for layer in decoder.layers:
        layer.experts.register_forward_hook(lambda *call: seen.append(call))
    output = decoder(make_writing(), make_memory())
    assert len(seen) == 2
    for mixture, (x,), (got, routing) in seen:
        dense = SwiGLU(WIDTH, 24)
        with torch.no_grad():
            gate, up = mixture.experts.gate_up[0].T.chunk(2)
            dense.gate.weight.copy_(gate), dense.up.weight.copy_(up)
            dense.down.weight.copy_(mixture.experts.down[0].T)
        torch.testing.assert_close(got, dense(x), rtol=1e-5, atol=1e-6)
        assert (routing.gates == 1).all()
    output.cross_entropy().backward()
    for mixture, _, _ in seen:
        assert mixture.router.logits.weight.grad.abs().max() < 1e-6  # there is nothing to learn
    assert output.load_balancing_loss == 1


def test_all_that_the_router_can_is_passed_on():
    groups = GroupLimit(groups=2, kept=1)
    decoder = make_decoder(
        gates="sigmoid_renormalised", scale=2.5, groups=groups, shared_gate=True, selection_bias=True,
        capacity_factor=1.0, evaluation_capacity_factor=0.5,
    )  # fmt: skip
    for layer in decoder.layers:
        router = layer.experts.router
        assert (router.scale, router.groups, router.capacity_factor) == (2.5, groups, 1.0)
        assert layer.experts.shared_gate.weight.shape == (1, WIDTH)
        assert router.selection_bias is not None
    writing, memory = make_writing(20), make_memory(20)
    evaluated = decoder(writing, memory)
    assert (evaluated.dropped > 0).all()  # half of the room that even load wants
    for routing in evaluated.routings:
        assert ((routing.experts // 2) == (routing.experts[:, :1] // 2)).all()  # one group of two experts a token
        kept = routing.gates.sum(-1)[(routing.gates > 0).all(-1)]
        torch.testing.assert_close(kept, torch.full_like(kept, 2.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, r"scale must be positive, got 0\.0"),
        ({"groups": GroupLimit(groups=3, kept=1)}, "groups must divide num_experts 4, got 3"),
        ({"groups": GroupLimit(groups=4, kept=1)}, "experts_per_token must be at most 1 .kept groups of 1., got 2"),
        ({"shared_gate": True, "shared_expert_width": 0}, "shared_gate needs a shared expert"),
        ({"evaluation_capacity_factor": -1.0}, "evaluation_capacity_factor must be positive or null, got -1"),
        ({"experts_per_token": 1}, "experts_per_token 1 with gates 'renormalised' gives the router no gradient"),
        (
            {"num_experts": 2, "selection_bias": True},
            "selection_bias needs a choice: experts_per_token must be below num_experts 2, got 2",
        ),
        (
            {"num_experts": 2, "groups": GroupLimit(groups=1, kept=1)},
            "groups needs a choice: experts_per_token must be below num_experts 2, got 2",
        ),
    ],
)
def test_contradictions_are_refused_when_the_decoder_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        make_decoder(**options)


def test_the_engine_refuses_rows_that_depend_on_their_neighbours():
    with pytest.raises(ValueError, match=r"evaluation_capacity_factor must be null to run in an engine.* got 2"):
        Engine(make_decoder(evaluation_capacity_factor=2.0))


def test_the_language_loss_and_its_gradients_are_those_of_the_whole_cross_entropy():
    decoder = make_decoder().train()
    output = decoder(make_writing(60), make_memory(60))
    whole, parameters = F.cross_entropy(output.logits, output.targets), list(decoder.parameters())
    assert len(output.targets) > 200
    torch.testing.assert_close(output.cross_entropy(), whole, rtol=1e-6, atol=1e-6)
    chunked = chunked_cross_entropy(output.hidden, output.weight, output.targets, chunk=16)
    expected = torch.autograd.grad(whole, parameters, retain_graph=True)
    for loss in (output.cross_entropy(), chunked):
        for got, right in zip(torch.autograd.grad(loss, parameters, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


def test_memory_of_a_study_dealt_to_rows_equals_memory_gathered():
    decoder, writing, memory = make_decoder(), make_writing(), make_memory(size=3)
    gathered = Tokens(memory.values[writing.study], memory.mask[writing.study])
    dealt = decoder(writing, memory, rows=writing.study)
    torch.testing.assert_close(dealt.logits, decoder(writing, gathered).logits, rtol=1e-5, atol=1e-5)
    assert decoder.generate(writing, memory, rows=writing.study).rows() == decoder.generate(writing, gathered).rows()


def without_cache(decoder, writing, memory, sampling):
    """The same words by running the whole row again for every token."""
    draws, rows, scores = sampling.draws(len(writing.study)), [], []
    for row in range(len(writing.study)):
        some, ids, score = select(writing, [row]), [], 0.0
        for index in range(sampling.max_new_tokens):
            some = replace(some, target=Padded.of([[*ids, 0]]))
            logits = decoder(some, Tokens(memory.values[[row]], memory.mask[[row]])).logits[-1:]
            chosen, log_probability = choose(logits, sampling=sampling, draw=draws[[row], index])
            ids.append(chosen.item())
            score += log_probability.item()
            if ids[-1] == SPECIAL_IDS.end:
                break
        rows.append(ids)
        scores.append(score)
    return rows, scores


@pytest.mark.parametrize(
    "sampling",
    [Sampling(12), Sampling(20, temperature=1.0, top_p=0.9, seed=3), Sampling(20, 1.0, seed=(5, 1, 5, 2, 9))],
)
@torch.no_grad()
def test_cache_equals_no_cache(sampling):
    decoder, writing, memory = make_decoder(), make_writing(), make_memory()
    decoder.embedding.weight[SPECIAL_IDS.end] *= 3  # so that rows end at different times
    expected, scores = without_cache(decoder, writing, memory, sampling)
    got = decoder.generate(writing, memory, sampling=sampling)
    assert got.rows() == expected
    assert len({len(row) for row in expected}) > 1
    assert got.log_probability.tolist() == pytest.approx(scores, abs=1e-4)


def test_generation_is_blind_to_the_target():
    decoder, writing, memory = make_decoder(), make_writing(), make_memory()
    sampling = Sampling(8, temperature=1.0)
    rows = [
        decoder.generate(replace(writing, target=target), memory, sampling=sampling).rows()
        for target in (writing.target, None, Padded.of([[7]] * 5))
    ]
    assert rows[0] == rows[1] == rows[2]


def test_forward_refuses_to_train_on_nothing():
    with pytest.raises(ValueError, match=r"writing\.target is needed.*got None"):
        make_decoder()(make_writing(target=False), make_memory())


def test_gradient_reaches_every_parameter():
    decoder = make_decoder().train()
    writing, memory = make_writing(60), make_memory(size=60)
    memory = Tokens(memory.values.requires_grad_(), memory.mask)
    output = decoder(writing, memory)
    (output.cross_entropy() + output.load_balancing_loss + output.z_loss).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        rows = parameter.grad if parameter.grad.dim() > 2 or name.startswith("slot") else parameter.grad[None]
        for row in rows:
            assert row.abs().sum() > 0, name
    assert (memory.values.grad.abs().sum(-1) > 0).equal(memory.mask)


def test_a_study_without_any_input_is_written_without_nan():
    decoder, writing, memory = make_decoder(), make_writing(), make_memory()
    empty = Tokens(memory.values, torch.zeros_like(memory.mask))
    assert decoder(writing, empty).logits.isfinite().all()
    assert decoder.generate(writing, empty).log_probability.isfinite().all()


def test_bfloat16_autocast_is_close_and_generates():
    decoder, writing, memory = make_decoder(), make_writing(), make_memory()
    expected = decoder(writing, memory).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = decoder(writing, memory)
        loss = output.cross_entropy()
        rows = decoder.generate(writing, memory, sampling=Sampling(4)).rows()
    assert (output.logits.float() - expected).norm() / expected.norm() < 0.05
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(expected, output.targets), rtol=0.02, atol=0.02)
    assert output.z_loss.dtype == torch.float32
    assert all(rows)


def test_default_size_and_fresh_weights_are_reproducible():
    decoder = MoEDecoder(2048)
    assert sum(parameter.numel() for parameter in decoder.parameters()) <= 3_600_000
    torch.manual_seed(4)
    decoder.init_weights()
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    torch.manual_seed(4)
    decoder.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())


def test_depth_zero_is_refused():
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        MoEDecoder(60, depth=0)


class TestChoose:
    logits = torch.tensor([[0.0] * 10 + [3.0, 2.0, 1.0, 0.0]])

    def drawn(self, **options):
        draws = torch.linspace(0, 1 - 1e-6, 4001)
        sampling = Sampling(1, **options)
        return choose(self.logits.expand(4001, -1), sampling=sampling, draw=draws)[0]

    def test_frequencies_follow_the_tempered_distribution(self):
        counts = torch.bincount(self.drawn(temperature=2.0), minlength=14) / 4001
        tempered = self.logits[0] / 2
        tempered[list(NEVER_WRITTEN)] = -torch.inf
        torch.testing.assert_close(counts, tempered.softmax(0), rtol=0, atol=1e-3)

    def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(self):
        probabilities = self.logits[0].clone()
        probabilities[list(NEVER_WRITTEN)] = -torch.inf
        probabilities = probabilities.softmax(0)
        assert set(self.drawn(temperature=1.0, top_p=probabilities[10].item() * 0.99).tolist()) == {10}
        both = (probabilities[10] + probabilities[11]).item() * 0.99
        assert set(self.drawn(temperature=1.0, top_p=both).tolist()) == {10, 11}

    def test_prompt_specials_are_never_written(self):
        logits = torch.zeros(1, 14)
        logits[0, list(NEVER_WRITTEN)] = 50.0
        for temperature in (0.0, 1.0):
            ids, _ = choose(logits, sampling=Sampling(1, temperature), draw=torch.tensor([0.999999]))
            assert ids.item() not in NEVER_WRITTEN

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
            ({"temperature": -1.0}, "temperature must be 0.*got -1"),
            ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0"),
        ],
    )
    def test_bad_settings_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            Sampling(**options)

    def test_seeds_must_fit_the_rows(self):
        with pytest.raises(ValueError, match="seed must be one number or 3"):
            Sampling(seed=(1, 2)).draws(3)


SENTENCES = {
    "en": [
        "A <size> nodule in the <side> lung.",
        "The <side> lung has a <size> nodule, which has grown.",
        "<side> pleural effusion of <size>, smaller.",
        "Small <side> pneumothorax.",
        "The heart is enlarged.",
        "Compared with the study <days> days ago.",
        "No other abnormality.",
        "Impression: <findings>.",
        "Emphysema involving <size> of the lungs.",
        "Rib fracture on the <side>.",
    ],
    "zh": [
        "<side>肺见<size>结节。",
        "<side>肺<size>结节，较前增大。",
        "<side>侧胸腔积液，约<size>，较前减少。",
        "<side>侧少量气胸。",
        "心影增大。",
        "与<days>天前比较。",
        "余未见异常。",
        "印象：<findings>。",
        "肺气肿，累及<size>。",
        "<side>侧肋骨骨折。",
    ],
}


def test_a_tiny_decoder_learns_twenty_sentences_by_their_slots():
    tokenizer = train_tokenizer([text for texts in SENTENCES.values() for text in texts], vocab_size=350)
    torch.manual_seed(0)
    code = torch.tensor([1, 1, 4, 5, 6, 0, 0, 0, 7, 8] * 2)
    kind = torch.tensor([0, 0, 0, 0, 0, 2, 1, 3, 0, 0] * 2)
    change = torch.tensor([0, 2, 4, 0, 0, 0, 0, 0, 0, 0] * 2)
    zero = torch.zeros(20, dtype=torch.long)
    texts = SENTENCES["en"] + SENTENCES["zh"]
    writing = Writing(
        study=zero,
        slots=Slots(kind, code, zero, change, zero),
        prompt=Padded.of([tokenizer.prompt("en")] * 10 + [tokenizer.prompt("zh")] * 10),
        target=Padded.of([tokenizer.target(text) for text in texts]),
    )
    memory = Tokens(torch.zeros(1, 1, 64), torch.ones(1, 1, dtype=torch.bool))
    decoder = MoEDecoder(tokenizer.vocab_size, width=64, depth=2, heads=4, expert_width=32, shared_expert_width=32)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=5e-3)
    for _ in range(60):
        output = decoder(writing, memory, rows=writing.study)
        loss = output.cross_entropy() + 0.01 * output.load_balancing_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    written = decoder.eval().generate(writing, memory, rows=writing.study)
    assert [tokenizer.decode(row) for row in written.rows()] == texts
    assert written.log_probability.exp().min() > 0.5
