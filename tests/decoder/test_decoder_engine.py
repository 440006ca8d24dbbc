from dataclasses import replace

import pytest
import torch

from mm.batch import SPECIAL_IDS, Padded, Slots, Tokens, Writing
from mm.decoder.decoder import MoEDecoder
from mm.decoder.engine import Engine
from mm.decoder.generate import Sampling
from mm.decoder.request import Request

VOCAB, WIDTH, MEMORY = 60, 32, 24
SAMPLED = Sampling(20, temperature=1.0, top_p=0.9, seed=tuple(range(12)))
SETTINGS = [Sampling(20), SAMPLED, replace(SAMPLED, repetition_penalty=1.5), Sampling(20, repetition_penalty=1.3)]


def make_decoder():
    torch.manual_seed(0)
    sizes = {"width": WIDTH, "depth": 2, "heads": 4, "memory_width": MEMORY, "num_experts": 4, "expert_width": 16}
    decoder = MoEDecoder(VOCAB, shared_expert_width=16, **sizes)
    with torch.no_grad():  # sharp enough for choices to be decided, and rows end at different times
        decoder.embedding.weight.mul_(2)
        decoder.embedding.weight[SPECIAL_IDS.end] *= 2
    return decoder.eval()


def make_writing(rows=12, *, seed=1, longest=12):
    g = torch.Generator().manual_seed(seed)
    prompts = []
    for row in range(rows):
        words = torch.randint(10, VOCAB, (int(torch.randint(1, longest, (), generator=g)),), generator=g).tolist()
        prompts.append([SPECIAL_IDS.en, SPECIAL_IDS.slot, *(words if row % 3 else [])])
    sizes = {"kind": 5, "code": 12, "side": 3, "change": 6, "grade": 4}
    slots = Slots(**{name: torch.randint(0, size, (rows,), generator=g) for name, size in sizes.items()})
    return Writing(torch.arange(rows) // 3, slots, Padded.of(prompts), None)


def make_memory(size=4, length=7):
    g = torch.Generator().manual_seed(2)
    mask = torch.arange(length) < torch.randint(1, length + 1, (size, 1), generator=g)
    return Tokens(torch.randn(size, length, MEMORY, generator=g), mask)


def run(engine, writing, memory, sampling):
    return engine.run(engine.requests(writing, memory, sampling=sampling, rows=writing.study))


@pytest.mark.parametrize("sampling", [SETTINGS[0], pytest.param(SETTINGS[1], marks=pytest.mark.slow), *SETTINGS[2:]])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_sequences": 3, "token_budget": 9, "page_size": 4},
        pytest.param(
            {"max_sequences": 5, "token_budget": 7, "page_size": 1, "num_blocks": 400}, marks=pytest.mark.slow
        ),
        {"page_size": 3, "num_blocks": 13},
    ],
    ids=["all at once", "few at a time, prompts in pieces", "pages of one token", "tiny pool"],
)
def test_the_engine_writes_what_generate_writes(sampling, options):
    decoder, writing, memory = make_decoder(), make_writing(), make_memory()
    expected = decoder.generate(writing, memory, sampling=sampling, rows=writing.study)
    assert len({len(row) for row in expected.rows()}) > 1
    engine = Engine(decoder, **options)
    got = run(engine, writing, memory, sampling)
    assert [list(each.ids) for each in got] == expected.rows()
    scores = [sum(each.log_probabilities) for each in got]
    assert scores == pytest.approx(expected.log_probability.tolist(), abs=1e-4)
    assert engine.scheduler.blocks.free == engine.scheduler.blocks.num_blocks
    for each in got:
        assert each.finish == ("end" if each.ids[-1] == SPECIAL_IDS.end else "length")


def test_running_out_of_blocks_preempts_and_changes_no_token():
    decoder, writing, memory = make_decoder(), make_writing(), make_memory()
    expected = decoder.generate(writing, memory, sampling=SAMPLED, rows=writing.study).rows()
    engine, preempted = Engine(decoder, page_size=2, num_blocks=18), []
    plan = engine.scheduler.plan
    engine.scheduler.plan = lambda: (preempted.extend((step := plan()).preempted), step)[1]
    assert [list(each.ids) for each in run(engine, writing, memory, SAMPLED)] == expected
    assert len(preempted) > 3


def test_tokens_of_a_request_do_not_depend_on_its_neighbours():
    decoder, writing, memory = make_decoder(), make_writing(), make_memory()
    engine = Engine(decoder, max_sequences=4, token_budget=16, page_size=4)
    together = run(engine, writing, memory, SAMPLED)
    rows = engine.requests(writing, memory, sampling=SAMPLED, rows=writing.study)
    backwards = engine.run(reversed(rows))
    assert [each.ids for each in reversed(backwards)] == [each.ids for each in together]
    assert [engine.run([row])[0].ids for row in rows[::4]] == [each.ids for each in together[::4]]


def test_requests_of_different_settings_run_side_by_side():
    decoder, writing, memory = make_decoder(), make_writing(), make_memory()
    engine, settings = Engine(decoder), [replace(each, seed=3, max_new_tokens=9) for each in SETTINGS]
    rows = [engine.requests(writing, memory, sampling=each, rows=writing.study) for each in settings]
    mixed = engine.run(rows[index % 4][index] for index in range(12))
    for index, got in enumerate(mixed):
        expected = decoder.generate(writing, memory, sampling=settings[index % 4], rows=writing.study).rows()
        assert list(got.ids) == expected[index]


@pytest.mark.slow
def test_requests_may_come_while_others_are_written():
    decoder, writing, memory = make_decoder(), make_writing(), make_memory()
    engine = Engine(decoder, max_sequences=3, token_budget=12, page_size=4)
    written, waiting = {}, engine.requests(writing, memory, rows=writing.study, sampling=Sampling(20))
    while waiting or engine.scheduler.waiting or engine.scheduler.running:
        if waiting:
            engine.submit(waiting.pop(0))
        for piece in engine.step():
            written.setdefault(piece.request, []).append(piece.id)
    expected = decoder.generate(writing, memory, sampling=Sampling(20), rows=writing.study).rows()
    assert [written[index] for index in range(12)] == expected


def test_streaming_gives_every_token_once_as_it_is_written():
    decoder, writing, memory = make_decoder(), make_writing(), make_memory()
    engine = Engine(decoder)
    pieces = list(engine.stream(engine.requests(writing, memory, sampling=Sampling(20), rows=writing.study)))
    expected = decoder.generate(writing, memory, sampling=Sampling(20), rows=writing.study).rows()
    assert [[piece.id for piece in pieces if piece.request == row] for row in range(12)] == expected
    assert len({piece.request for piece in pieces[:12]}) == 12  # side by side, not one after the other
    assert sum(piece.finish is not None for piece in pieces) == 12


class TestReuse:
    """What is the same is read once, and only what is the same."""

    def counted(self, prompts, studies, slots, *, page_size=4):
        """Prompt tokens that each request made the decoder read; all tokens are as without reuse."""
        decoder, memory, read, projected = make_decoder(), make_memory(), [], []
        inner, project = decoder.read, decoder.layers[0].cross.project

        def spy_read(ids, cache, now, **rest):
            read.append(len(ids))
            return inner(ids, cache, now, **rest)

        def spy_project(tokens, rows):
            projected.append(len(tokens.values))
            return project(tokens, rows)

        decoder.read, decoder.layers[0].cross.project = spy_read, spy_project
        engine, counts = Engine(decoder, page_size=page_size), []
        made = engine.remember(memory)
        for prompt, study, slot in zip(prompts, studies, slots, strict=True):
            before = len(read)
            (got,) = engine.run([Request(tuple(prompt), made[study], slot, Sampling(5))])
            counts.append(read[before])
            about = Slots(*torch.tensor([slot]).unbind(-1))
            writing = Writing(torch.tensor([study]), about, Padded.of([list(prompt)]), None)
            alone = make_decoder().generate(writing, memory, sampling=Sampling(5), rows=writing.study)
            assert list(got.ids) == alone.rows()[0]
        assert projected == [4]  # all studies at once, and never again
        return counts

    words = (SPECIAL_IDS.en, SPECIAL_IDS.slot, *range(20, 34))

    def test_the_same_system_text_is_read_once(self):
        prompts = [[*self.words, 40, 41], [*self.words, 42], [*self.words]]
        assert self.counted(prompts, [0, 0, 0], [(0, 1, 0, 0, 0)] * 3) == [18, 1, 4]

    def test_another_study_or_slot_or_beginning_is_not(self):
        other = [SPECIAL_IDS.zh, *self.words[1:]]
        slots = [(0, 1, 0, 0, 0), (0, 1, 0, 0, 0), (0, 2, 0, 0, 0), (0, 1, 0, 0, 0)]
        assert self.counted([self.words, self.words, self.words, other], [0, 1, 0, 0], slots) == [16] * 4


def test_stop_strings_end_a_row_with_the_token_that_completes_them():
    decoder, writing, memory = make_decoder(), make_writing(), make_memory()

    def decode(ids):
        return "".join(chr(48 + token) for token in ids)

    free = decoder.generate(writing, memory, sampling=Sampling(20), rows=writing.study).rows()
    stop = decode(free[0][2:4])
    expected = []
    for row in free:
        cut = next((n for n in range(1, len(row) + 1) if stop in decode(row[:n])), len(row))
        expected.append(row[:cut])
    assert expected != free
    sampling = Sampling(20, stop=(stop, "never"))
    assert decoder.generate(writing, memory, sampling=sampling, rows=writing.study, decode=decode).rows() == expected
    got = run(Engine(decoder, decode=decode), writing, memory, sampling)
    assert [list(each.ids) for each in got] == expected
    assert got[0].finish == "stop"
    with pytest.raises(ValueError, match="needs `decode`"):
        decoder.generate(writing, memory, sampling=sampling, rows=writing.study)


class TestBadInput:
    def refused(self, message, request=None, **options):
        decoder, engines = make_decoder(), []
        good = Request((2, 4, 20), Engine(decoder).remember(make_memory())[0], sampling=Sampling(4))

        def begin():
            engines.append(Engine(decoder, **options))
            engines[0].run([good, replace(good, **request or {})])

        with pytest.raises(ValueError, match=message):
            begin()
        assert not any(engine.scheduler.waiting for engine in engines)  # nothing was begun

    def test_zero_length_prompt(self):
        self.refused("prompt must have at least 1 token, got 0", {"prompt": ()})

    def test_prompt_longer_than_the_context(self):
        message = r"at most 32 together \(context\), got 30 \+ 4 = 34"
        self.refused(message, {"prompt": (20,) * 30}, context=32)
        self.refused(message, {"prompt": (20,) * 30}, num_blocks=4, page_size=8)

    def test_unknown_token(self):
        self.refused(r"prompt must hold ids 0\.\.59, got 60", {"prompt": (2, 60)})

    def test_several_seeds(self):
        self.refused("seed of a request must be one number, got 2", {"sampling": Sampling(4, seed=(1, 2))})

    def test_stop_without_a_tokenizer(self):
        self.refused(r"stop \('a',\) needs `decode`", {"sampling": Sampling(4, stop=("a",))})

    def test_context_larger_than_the_cache(self):
        self.refused(r"context must be 1\.\.64 .* got 65", num_blocks=8, page_size=8, context=65)

    def test_budget_that_reads_no_prompt(self):
        self.refused("token_budget must be above max_sequences", max_sequences=8, token_budget=8)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"top_p": 0.5}, r"top_p must be 1 with temperature 0 .* got 0\.5"),
            ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0"),
            ({"stop": ("",)}, "stop must hold strings of at least one character"),
        ],
    )
    def test_contradictory_sampling(self, options, message):
        with pytest.raises(ValueError, match=message):
            Sampling(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_kernel_writes_what_generate_writes_on_cuda(dtype):
    torch.manual_seed(0)
    decoder = MoEDecoder(VOCAB, width=64, depth=2, heads=2, memory_width=MEMORY, num_experts=4).eval().to("cuda", dtype)
    writing, memory = make_writing().to("cuda"), make_memory().to("cuda")
    memory = Tokens(memory.values.to(dtype), memory.mask)
    engine = Engine(decoder, page_size=64, num_blocks=32, max_sequences=5, token_budget=32)
    got = [list(each.ids) for each in run(engine, writing, memory, Sampling(20))]
    expected = decoder.generate(writing, memory, sampling=Sampling(20), rows=writing.study).rows()
    same = sum(a == b for row, other in zip(got, expected, strict=True) for a, b in zip(row, other, strict=False))
    if dtype == torch.float32:
        assert got == expected
    else:  # near ties may fall the other way in bfloat16
        assert same > 0.5 * sum(map(len, expected))
    with pytest.raises(ValueError, match="page_size must be a multiple of 64 on CUDA, got 16"):
        Engine(decoder, page_size=16)
