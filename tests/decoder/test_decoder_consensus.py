"""Minimum Bayes risk: the sentence that agrees most with all that were drawn, whoever else is in the batch."""

from dataclasses import dataclass, replace

import pytest
import sacrebleu
import torch
from test_decoder_model import make_decoder, make_memory, make_writing, select, without_cache
from test_decoder_writing import make_decoder as make_writing_model

from mm.batch import SPECIAL_IDS, Padded, Slots, Tokens, Writing
from mm.decoder.cache import MemoryKeys
from mm.decoder.consensus import consensus, ngrams, overlap
from mm.decoder.engine import Engine
from mm.decoder.generate import Sampling

DRAWN = Sampling(7, temperature=3.0, seed=(5, 1, 5, 2, 9), samples=4)
DECODERS = {
    "experts": make_decoder,
    "cross_attention": make_writing_model,
    "prefix": lambda: make_writing_model(reads="prefix"),
}


def random_sentences(number, *, seed, words=6):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (number,), generator=g).tolist()
    return [torch.randint(words, (length,), generator=g).tolist() for length in lengths]


def test_overlap_is_sacrebleus_smoothed_sentence_bleu():
    sentences = random_sentences(40, seed=0)
    for own, other in zip(sentences[::2], sentences[1::2], strict=True):
        texts = [" ".join(map(str, ids)) for ids in (own, other)]
        if set(own) & set(other) and len(own) >= 4:  # sacrebleu calls shorter ones 0, whatever is smoothed
            score = sacrebleu.sentence_bleu(
                texts[0], [texts[1]], smooth_method="add-k", smooth_value=1, tokenize="none"
            ).score
            assert overlap(ngrams(own), ngrams(other)) == pytest.approx(score / 100, abs=1e-9)
    assert overlap(ngrams([1, 2]), ngrams([3, 4, 5])) == 0


def test_the_one_kept_agrees_most_with_all_that_were_drawn():
    for seed in range(6):
        drawn = random_sentences(9, seed=seed) * 2
        counted = [ngrams(ids) for ids in drawn]
        means = [sum(overlap(own, other) for other in counted) for own in counted]
        assert means[consensus(drawn)] == pytest.approx(max(means))


def test_an_outlier_is_not_kept_and_one_drawn_twice_counts_twice():
    alike = [[10, 11, 12, 13, 1], [10, 11, 12, 14, 1], [10, 11, 12, 15, 1]]
    for place in range(4):
        drawn = [*alike[:place], [20, 21, 22, 23, 1], *alike[place:]]
        assert consensus(drawn) != place
    assert consensus([[10, 11, 1], [12, 13, 1], [12, 13, 1]]) == 1
    assert consensus([[10, 11, 1], [12, 13, 1]]) == 0
    assert consensus([[10]]) == 0


@dataclass(frozen=True)
class Given(Sampling):
    """Draws that were made before."""

    given: torch.Tensor | None = None

    def draws(self, rows):
        assert self.given is not None
        assert len(self.given) == rows
        return self.given


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_samples_are_drawn_one_by_one_and_their_consensus_is_kept(name):
    decoder, writing, memory = DECODERS[name](), make_writing(), make_memory()
    if name == "experts":
        decoder.embedding.weight[SPECIAL_IDS.end] *= 3  # so that rows end at different times
    each = torch.arange(5).repeat_interleave(4)
    given = Given(7, 3.0, given=DRAWN.draws(5))
    rows, scores = without_cache(decoder, select(writing, each), Tokens(memory.values[each], memory.mask[each]), given)
    kept = [first + consensus(rows[first : first + 4]) for first in range(0, 20, 4)]
    got = decoder.generate(writing, memory, sampling=DRAWN)
    assert got.rows() == [rows[place] for place in kept]
    assert got.log_probability.tolist() == pytest.approx([scores[place] for place in kept], abs=1e-4)
    assert len({tuple(row) for row in rows}) > 10
    assert len({len(row) for row in rows}) > 1


@torch.no_grad()
def test_a_row_is_the_same_alone_and_again():
    decoder, writing, memory = make_decoder(), make_writing(), make_memory()
    together = decoder.generate(writing, memory, sampling=DRAWN, rows=writing.study).rows()
    assert decoder.generate(writing, memory, sampling=DRAWN, rows=writing.study).rows() == together
    for row, seed in enumerate(DRAWN.seeds(5)):
        one = select(writing, [row])
        alone = replace(DRAWN, seed=seed)
        assert decoder.generate(one, memory, sampling=alone, rows=one.study).rows() == [together[row]]


def test_no_rows_are_no_sentences():
    none = torch.empty(0, dtype=torch.long)
    writing = Writing(none, Slots(*[none] * 5), Padded(torch.empty(0, 2, dtype=torch.long), none), None)
    sampling = Sampling(4, temperature=1.0, samples=3)
    assert make_decoder().generate(writing, make_memory(), sampling=sampling, rows=none).rows() == []


def test_shared_memories_are_read_as_copies_would_be():
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(3, 7, 2, 8, generator=g) for _ in range(2))
    mask = torch.arange(7) < torch.tensor([[7], [3], [0]])
    shared, copies = MemoryKeys(k, v, mask).fork(4), MemoryKeys(k, v, mask).select(torch.arange(3).repeat_interleave(4))
    for some in (torch.arange(12), torch.tensor([0, 3, 5, 8, 9, 10]), torch.tensor([1, 3]), torch.tensor([1])):
        shared, copies = shared.select(some), copies.select(some)
        for length in (1, 3):
            q = torch.randn(len(some), length, 2, 8, generator=g)
            torch.testing.assert_close(shared.attend(q), copies.attend(q))
        assert shared.row_bytes == copies.row_bytes
    q = torch.randn(3, 1, 2, 8, generator=g)
    torch.testing.assert_close(shared.fork(3).attend(q), copies.select(torch.tensor([0, 0, 0])).attend(q))


def test_settings_that_make_no_consensus_are_refused():
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        Sampling(samples=0)
    with pytest.raises(ValueError, match=r"samples must be 1 with temperature 0 .* got 2"):
        Sampling(samples=2)
    decoder, writing, memory = make_decoder(), make_writing(), make_memory()
    engine = Engine(decoder)
    with pytest.raises(ValueError, match=r"samples of a request must be 1 .* got 4"):
        engine.run(engine.requests(writing, memory, sampling=DRAWN))


def test_a_consensus_of_one_is_greedy():
    assert Sampling.consensus_of(1) == Sampling()
    assert Sampling.consensus_of(8).samples == 8
