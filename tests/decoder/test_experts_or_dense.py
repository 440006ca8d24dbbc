"""benchmarks/experts_or_dense.py: rows differ in nothing but the mixture, judges know right from wrong."""

import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from mm import ontology
from mm.batch import Tokens
from mm.data.readers import open_words, texts
from mm.data.spec import load_spec
from mm.data.tokenizer import train_tokenizer
from mm.decoder.router import Router
from mm.decoder.telemetry import routing_health

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> dict[str, ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import cached_studies
        import experts_or_dense
        import judge_writing

        return {"studies": cached_studies, "rows": experts_or_dense, "judge": judge_writing}


@pytest.mark.parametrize("size", ["default", "larger"])
def test_all_rows_have_equal_active_parameters(bench: dict[str, ModuleType], size: str) -> None:
    rows = bench["rows"]
    decoders = {
        row: row.decoder(rows.SIZES[size], vocab_size=64, memory_width=192) for row in (rows.DENSE, *rows.MIXED)
    }
    assert len({row.name for row in decoders}) == len(decoders)
    assert len({rows.active_without_routers(decoder) for decoder in decoders.values()}) == 1
    for row, decoder in decoders.items():
        total = rows.parameter_counts(decoder).total
        if row == rows.DENSE:
            assert total == rows.parameter_counts(decoder).active
        else:
            assert total > rows.parameter_counts(decoders[rows.DENSE]).total


def test_true_sentences_are_among_the_allowed_and_are_read_back(bench: dict[str, ModuleType]) -> None:
    studies, judge = bench["studies"], bench["judge"]
    for split in ("train", "val", "test"):
        words = open_words(load_spec("phantom"), split, studies=8)
        for index in range(8):
            sample = words[index]
            true = [sentence.text for sentence in sample.report]
            allowed = studies.situations(sample)
            assert all(text in {t.text for t in these} for text, these in zip(true, allowed, strict=True))
            assert all(judge.read_back(sample, true))
            codes = {item.code for item in sample.truth.findings if item.present}
            wrong = "effusion" if "effusion" not in codes else "nodule"
            name = ontology.finding(wrong).en if sample.language == "en" else ontology.finding(wrong).zh
            lies = [f"there is {name}." if sample.language == "en" else f"可见{name}。"] * len(true)
            assert not any(text in {t.text for t in these} for text, these in zip(lies, allowed, strict=True))


def test_chance_is_the_entropy_of_the_draw(bench: dict[str, ModuleType]) -> None:
    sample = next(
        item
        for item in (open_words(load_spec("phantom"), "val", studies=20)[index] for index in range(20))
        if item.language == "en" and item.report[-1].kind == "impression"
    )
    *_, impression = bench["studies"].situations(sample)
    assert bench["studies"].chance(impression) == pytest.approx(math.log(4))  # five wordings, one of them held out


def test_every_finding_is_asked_in_a_wording_of_training(bench: dict[str, ModuleType]) -> None:
    words = open_words(load_spec("phantom"), "train", studies=40)
    seen = {question.question for index in range(40) for question in words[index].questions}
    for language in ("en", "zh"):
        asked = [question.question for question in bench["studies"].every_question(language)]
        assert len(asked) == len(ontology.CODES)
        assert len(seen.intersection(asked)) > 3  # each is one of three wordings of a question that few are asked


def test_routing_of_parts_is_that_of_the_whole(bench: dict[str, ModuleType]) -> None:
    torch.manual_seed(0)
    router = Router(16, num_experts=8, experts_per_token=2)
    x = torch.randn(60, 16)
    whole = router(x)
    joined = bench["judge"].together((router(x[:7]), router(x[7:50]), router(x[50:])))
    torch.testing.assert_close(joined.load, whole.load)
    torch.testing.assert_close(joined.entropy, whole.entropy)
    assert routing_health([joined]).dead == routing_health([whole]).dead


def test_the_best_have_the_lowest_loss(bench: dict[str, ModuleType]) -> None:
    rows = bench["rows"]
    results = {row: {"loss": loss} for row, loss in zip(rows.MIXED, (0.3, 0.1, 0.5, 0.2, 0.6, 0.4), strict=True)}
    assert rows.best(results, 2) == [rows.MIXED[1], rows.MIXED[3]]


def test_a_row_is_run_once_and_only_with_its_own_settings(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    rows = bench["rows"]
    spec = load_spec("phantom")
    tokenizer = train_tokenizer(texts(spec, studies=10), vocab_size=300)
    memory = Tokens(torch.randn(3, 4, 32), torch.ones(3, 4, dtype=torch.bool))
    detected = np.zeros((3, len(ontology.CODES)), dtype=bool)
    train, val = (
        bench["studies"].Studies(open_words(spec, split, studies=3), tokenizer, memory, detected=detected)
        for split in ("train", "val")
    )
    one, again, other = (train.shuffled(steps=2, size=2, seed=seed) for seed in (0, 0, 1))
    assert [part.numbers for part in one] == [part.numbers for part in again]
    assert [part.samples for part in one] == [part.samples for part in again]
    assert [part.samples for part in one] != [part.samples for part in other]
    settings = {"steps": 2, "batch_size": 2, "vocab_size": train.tokenizer.vocab_size}
    file, judge = tmp_path / "rows.json", bench["judge"].Judge(val)
    result = rows.Experiment(train, judge, file, settings).run(rows.MIXED[4], seed=0)
    assert result["row"] == rows.MIXED[4].name
    assert 0 < result["loss"] < math.inf
    assert all(0 <= result[name] <= 1 for name in ("exact_sentences", "exact_answers", "asked_f1", "entropy"))
    before = file.stat().st_mtime_ns
    resumed = rows.Experiment(train, judge, file, settings)
    assert resumed.run(rows.MIXED[4], seed=0) == json.loads(json.dumps(result))
    assert file.stat().st_mtime_ns == before
    assert rows.MIXED[4].name in rows.table(resumed.content)
    with pytest.raises(SystemExit, match="use another file"):
        rows.Experiment(train, judge, file, settings | {"steps": 3})
    references = judge.references()
    assert 0 < references["wording_entropy"] < 2
    assert np.array_equal(judge.truth, bench["studies"].truth_of(val.in_order()))
