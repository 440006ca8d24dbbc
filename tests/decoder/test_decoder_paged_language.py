"""Plain language models in the engine: the tokens of the plain loop and of transformers, whatever the engine does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mm.batch import SPECIAL_IDS, Padded
from mm.decoder.engine import Engine
from mm.decoder.generate import NEVER_WRITTEN, Sampling, write
from mm.decoder.huggingface import write_language_model
from mm.decoder.language import LanguageModel
from mm.decoder.language_config import LanguageConfig
from mm.decoder.latent import Latent
from mm.decoder.paged import checked_page_size
from mm.decoder.paged_language import PagedLanguageModel
from mm.decoder.request import Request
from mm.decoder.router import Router

VOCAB, NEW = 80, 24
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "width": 32, "depth": 2, "heads": 4, "key_heads": 2, "head_width": 8}
EXPERTS: dict[str, Any] = {"hidden": 0, "num_experts": 6, "expert_width": 24}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"hidden": 48},
    "qwen3": {"hidden": 48, "norm": "head", "head_width": 12},
    "olmoe": EXPERTS | {"norm": "all", "key_heads": 4, "gates": "softmax"},
    "mixtral with a window": EXPERTS | {"window": 7},
}
LATENT = {"hidden": 48, "latent": Latent(rank=16, plain_width=8, turned_width=4, value_width=6)}
OPTIONS: dict[str, dict[str, Any]] = {
    "all at once": {},
    "few at a time, prompts in pieces": {"max_sequences": 3, "token_budget": 9, "page_size": 4},
    "pages of one token": {"max_sequences": 5, "token_budget": 7, "page_size": 1, "num_blocks": 400},
    "tiny pool": {"page_size": 3, "num_blocks": 19},
}


def make(settings: dict[str, Any]) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(LanguageConfig(**SIZES | {"context": 128} | settings))
    model.init_weights(std=0.3)  # far from zero: choices are decided, and a wrong key or position shows
    with torch.no_grad():  # rows end, at different times
        assert model.output is not None
        model.output.weight[SPECIAL_IDS.end] *= 1.5
    return model.eval()


def prompts(count: int = 10, *, longest: int = 30) -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest, (count,), generator=g).tolist()
    return [torch.randint(10, VOCAB, (length,), generator=g).tolist() for length in lengths]


def loop(model: LanguageModel, rows: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """What `read` and `step` write, from whole rows in one contiguous cache."""
    with torch.no_grad():
        logits, state = model.read(Padded.of(rows), capacity=max(map(len, rows)) + sampling.max_new_tokens)
        return write(model, logits, state, sampling=sampling).rows()


def run(engine: Engine, rows: list[list[int]], sampling: Sampling) -> list[list[int]]:
    return [list(each.ids) for each in engine.run([Request(tuple(row), sampling=sampling) for row in rows])]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("settings", [*CASES.values(), LATENT], ids=[*CASES, "latent attention"])
def test_the_engine_writes_what_the_plain_loop_writes(settings: dict[str, Any], options: dict[str, Any]) -> None:
    model, rows = make(settings), prompts()
    expected = loop(model, rows, Sampling(NEW))
    assert len({len(row) for row in expected}) > 1
    engine = Engine(PagedLanguageModel(model), **options)
    assert run(engine, rows, Sampling(NEW)) == expected
    assert engine.scheduler.blocks.free == engine.scheduler.blocks.num_blocks


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_the_engine_writes_what_transformers_writes(settings: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, rows = make(settings), prompts(5)
    write_language_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    width = max(map(len, rows))
    options = transformers.GenerationConfig(
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=SPECIAL_IDS.pad,
        eos_token_id=SPECIAL_IDS.end,
        suppress_tokens=list(NEVER_WRITTEN),
    )
    left = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    with torch.no_grad():
        written = theirs.generate(
            torch.tensor(left), attention_mask=torch.tensor(mask), generation_config=options
        ).tolist()
    expected = [[token for token in row[width:] if token != SPECIAL_IDS.pad] for row in written]
    engine = Engine(PagedLanguageModel(model), max_sequences=3, token_budget=12, page_size=4)
    assert run(engine, rows, Sampling(NEW)) == expected


def test_a_common_beginning_is_read_once_and_changes_no_token() -> None:
    model = make(CASES["mixtral with a window"])
    common = prompts(1, longest=30)[0] * 2
    rows = [[*common, 20 + row] for row in range(4)]
    decoder, read = PagedLanguageModel(model), []
    inner = decoder.read

    def spy(ids: Any, cache: Any, now: Any, **rest: Any) -> Any:
        read.append(len(ids))
        return inner(ids, cache, now, **rest)

    decoder.read = spy  # type: ignore[method-assign]
    engine = Engine(decoder, page_size=4)
    assert run(engine, rows, Sampling(NEW)) == loop(model, rows, Sampling(NEW))
    assert sum(count for count in read[:2]) <= len(common) + 1 + 4 * 4 + 1  # the others read their last page each


def test_padding_is_neither_computed_nor_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make(CASES["olmoe"]), prompts()
    routed, inner = [], Router.forward

    def spy(self: Router, x: torch.Tensor) -> Any:
        routed.append(len(x))
        return inner(self, x)

    monkeypatch.setattr(Router, "forward", spy)
    run(Engine(PagedLanguageModel(model)), rows, Sampling(1))
    assert routed == [sum(map(len, rows)), len(rows)]  # of the last layer nobody needs more than the last tokens


def test_rows_that_write_and_rows_that_are_read_share_one_pass() -> None:
    model, rows = make(CASES["mixtral with a window"]), prompts()
    expected = loop(model, rows, Sampling(NEW))
    decoder, passes = PagedLanguageModel(model), []
    inner = decoder.read

    def spy(ids: Any, cache: Any, now: Any, **rest: Any) -> Any:
        passes.append((now.writing, 0 if now.reads is None else len(now.reads.counts)))
        return inner(ids, cache, now, **rest)

    decoder.read = spy  # type: ignore[method-assign]
    engine, steps = Engine(decoder, max_sequences=4, page_size=4), 0
    for row in rows:
        engine.submit(Request(tuple(row), sampling=Sampling(NEW)))
    written: dict[int, list[int]] = {row: [] for row in range(len(rows))}
    while engine.scheduler.waiting or engine.scheduler.running:
        steps += 1
        for piece in engine.step():
            written[piece.request].append(piece.id)
    assert list(written.values()) == expected
    assert len(passes) == steps
    assert any(writes and reads for writes, reads in passes)


class TestCancel:
    """What is given up leaves no trace."""

    def drive(self, options: dict[str, Any], given_up: dict[int, int]) -> tuple[dict[int, list[int]], Engine]:
        """Cancels request i before step `given_up[i]`."""
        engine, written, step = Engine(PagedLanguageModel(make(CASES["llama"])), **options), dict[int, list[int]](), 0
        for row in prompts():
            engine.submit(Request(tuple(row), sampling=Sampling(NEW)))
        while engine.scheduler.waiting or engine.scheduler.running:
            for index, when in given_up.items():
                if when == step:
                    assert engine.cancel(index)
                    assert not engine.cancel(index)
            for piece in engine.step():
                assert given_up.get(piece.request, step + 1) > step
                written.setdefault(piece.request, []).append(piece.id)
            step += 1
        return written, engine

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_the_others_write_the_same_and_all_blocks_come_back(self, options: dict[str, Any]) -> None:
        expected = loop(make(CASES["llama"]), prompts(), Sampling(NEW))
        long = [row for row, tokens in enumerate(expected) if len(tokens) > 4][:4]
        assert len(long) == 4
        written, engine = self.drive(options, {row: step for step, row in enumerate(long)})
        for row in set(range(len(expected))) - set(long):
            assert written[row] == expected[row]
        for row in long:
            assert written.get(row, []) == expected[row][: len(written.get(row, []))]
        blocks = engine.scheduler.blocks
        assert blocks.free == blocks.num_blocks
        assert not any(blocks._owners)

    def test_a_request_that_is_done_or_unknown_is_not_on_its_way(self) -> None:
        engine = Engine(PagedLanguageModel(make(CASES["llama"])))
        run(engine, prompts(2), Sampling(2))
        assert not engine.cancel(0)
        assert not engine.cancel(7)


class TestBadInput:
    """Refused before any work."""

    def refused(self, message: str, prompt: tuple[int, ...], **options: Any) -> None:
        engine = Engine(PagedLanguageModel(make(CASES["llama"])), **options)
        with pytest.raises(ValueError, match=message):
            engine.run([Request((20, 21), sampling=Sampling(4)), Request(prompt, sampling=Sampling(4))])
        assert not engine.scheduler.waiting
        assert engine.cache.layers[0].k is None

    def test_zero_length_prompt(self) -> None:
        self.refused("prompt must have at least 1 token, got 0", ())

    def test_prompt_longer_than_the_models_context(self) -> None:
        self.refused(r"at most 128 together \(context\), got 126 \+ 4 = 130", (20,) * 126)

    def test_prompt_longer_than_the_cache(self) -> None:
        self.refused(r"at most 32 together \(context\), got 30 \+ 4 = 34", (20,) * 30, num_blocks=4, page_size=8)

    def test_context_larger_than_the_models(self) -> None:
        with pytest.raises(ValueError, match=r"context must be 1\.\.128 .* got 129"):
            Engine(PagedLanguageModel(make(CASES["llama"])), context=129)

    def test_page_size_that_the_kernel_refuses(self) -> None:
        with pytest.raises(ValueError, match="page_size must be a multiple of 64 on CUDA, got 16"):
            checked_page_size(16, device=torch.device("cuda"))
        with pytest.raises(ValueError, match="window must be null for pages on CUDA, got 7"):
            checked_page_size(64, device=torch.device("cuda"), window=7)
