from dataclasses import dataclass
from itertools import product

import pytest
import torch

from mm.batch import SPECIAL_IDS
from mm.decoder.beam import beam_search
from mm.decoder.cache import DecodingState
from mm.decoder.generate import GREEDY, NEVER_WRITTEN, Sampling, penalised, write

VOCAB = 20


@dataclass(frozen=True)
class History(DecodingState):
    """A state that is the words so far."""

    rows: tuple[tuple[int, ...], ...]

    def select(self, rows):
        return history(*(self.rows[row] for row in rows.tolist()))


def history(*rows):
    return History((), (), torch.tensor([len(row) for row in rows]), rows)


class Table:
    """A decoder whose next word depends on the last two and on the row."""

    def __init__(self, seed):
        self.scores = 2 * torch.randn(3, VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))
        self.scores[..., SPECIAL_IDS.end] += 2.5

    def logits(self, words):
        row, *words = words
        a, b = [0, 0, *words][-2:]
        return self.scores[row, a, b]

    def step(self, ids, state):
        state = history(*((*row, token) for row, token in zip(state.rows, ids.tolist(), strict=True)))
        return torch.stack([self.logits(row) for row in state.rows]), state

    def start(self):
        state = history((0,), (1,), (2,))
        return torch.stack([self.logits(row) for row in state.rows]), state


def best_of_all(table, row, longest, length_penalty):
    """Every sentence there is."""
    words = [token for token in range(VOCAB) if token not in NEVER_WRITTEN]
    inner = [token for token in words if token != SPECIAL_IDS.end]
    found = []
    for length in range(1, longest + 1):
        for body in product(inner, repeat=length - 1):
            for last in words if length == longest else [SPECIAL_IDS.end]:
                ids = [*body, last]
                scores = [table.logits((row, *ids[:i])).log_softmax(-1)[token].item() for i, token in enumerate(ids)]
                found.append((sum(scores) / length**length_penalty, ids))
    return max(found)[1]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_sentence_of_all(length_penalty):
    table = Table(0)
    logits, state = table.start()
    got = beam_search(table, logits, state, beams=7, max_new_tokens=2, length_penalty=length_penalty)
    assert got.rows() == [best_of_all(table, row, 2, length_penalty) for row in range(3)]


def test_one_beam_is_greedy():
    for seed in range(10):
        table = Table(seed)
        expected = write(table, *table.start(), sampling=Sampling(12))
        got = beam_search(table, *table.start(), beams=1, max_new_tokens=12)
        assert got.rows() == expected.rows()
        torch.testing.assert_close(got.log_probabilities, expected.log_probabilities)


def test_more_beams_find_more_probable_sentences_and_say_how_probable():
    better = 0
    for seed in range(10):
        table = Table(seed)
        wide = beam_search(table, *table.start(), beams=6, max_new_tokens=5, length_penalty=0.0)
        greedy = write(table, *table.start(), sampling=Sampling(5))
        better += int((wide.log_probability > greedy.log_probability + 1e-6).sum())
        for row, ids in enumerate(wide.rows()):
            scores = [table.logits((row, *ids[:i])).log_softmax(-1)[token] for i, token in enumerate(ids)]
            torch.testing.assert_close(wide.log_probability[row], torch.stack(scores).sum())
    assert better > 5


def test_bad_settings_are_refused():
    table = Table(0)
    for beams in (0, 8):
        with pytest.raises(ValueError, match=f"beams must be 1..7 .*got {beams}"):
            beam_search(table, *table.start(), beams=beams, max_new_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        beam_search(table, *table.start(), beams=1, max_new_tokens=0)


def test_repetition_penalty_equals_that_of_transformers():
    processors = pytest.importorskip("transformers.generation.logits_process")
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, VOCAB, generator=g)
    written = torch.randint(0, VOCAB, (4, 9), generator=g)
    expected = processors.RepetitionPenaltyLogitsProcessor(1.7)(written, logits)
    torch.testing.assert_close(penalised(logits, written, 1.7), expected)
    assert GREEDY.repetition_penalty == 1
