from dataclasses import replace

import pytest
import torch

from mm.batch import SPECIAL_IDS, Padded, Slots, Tokens, Writing
from mm.decoder.decoder import MoEDecoder
from mm.decoder.score import score_answers

VOCAB, MEMORY = 40, 24
END = SPECIAL_IDS.end
ANSWERS = [
    [12, END],
    [12, 13, END],
    [12, 13, 14, 15, END],
    [12, 13, 14, 16, END],
    [20, END],
    [20, 12, END],
    [END],
    [12, 13, 14, 15, END],  # once more
]


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 2, "heads": 4, "memory_width": MEMORY, "num_experts": 4, "expert_width": 16}
    made = MoEDecoder(VOCAB, shared_expert_width=16, **sizes)
    with torch.no_grad():
        made.embedding.weight.mul_(2)
    return made.eval()


@pytest.fixture(scope="module")
def asked():
    """Five questions of unequal length on three studies."""
    g = torch.Generator().manual_seed(1)
    prompts = [
        [SPECIAL_IDS.en, SPECIAL_IDS.slot, *torch.randint(10, VOCAB, (count,), generator=g).tolist()]
        for count in (1, 4, 2, 7, 3)
    ]
    zeros = torch.zeros(5, dtype=torch.long)
    slots = Slots(torch.full((5,), 4), zeros, zeros, zeros, zeros)
    memory = Tokens(torch.randn(3, 6, MEMORY, generator=g), torch.arange(6) < torch.tensor([[6], [3], [1]]))
    return Writing(torch.tensor([0, 0, 1, 2, 2]), slots, Padded.of(prompts), None), memory


class Counted:
    """A decoder that counts the rows it steps."""

    def __init__(self, decoder):
        self.decoder, self.rows, self.widest = decoder, 0, 0

    def step(self, ids, state):
        self.rows += len(ids)
        self.widest = max(self.widest, len(ids))
        return self.decoder.step(ids, state)


def teacher_forced(decoder, writing, memory, answer):
    """Of each question: the log-probability of one answer read at once, with no cache."""
    rows = len(writing.study)
    with torch.no_grad():
        output = decoder(replace(writing, target=Padded.of([answer] * rows)), memory, rows=writing.study)
    said = output.logits.log_softmax(-1).gather(1, output.targets[:, None])[:, 0]
    return torch.zeros(rows).index_add(0, output.rows, said)


@torch.no_grad()
def scored(decoder, writing, memory, answers=ANSWERS, **options):
    begun = decoder.begin(writing, memory, room=max(map(len, answers)), rows=writing.study)
    counted = Counted(decoder)
    return score_answers(counted, *begun, answers, **options), counted


@pytest.mark.parametrize("most_rows", [1, 3, None])
def test_every_answer_scores_as_with_teacher_forcing(decoder, asked, most_rows):
    got, counted = scored(decoder, *asked, most_rows=most_rows)
    expected = torch.stack([teacher_forced(decoder, *asked, answer) for answer in ANSWERS], dim=1)
    assert got.shape == (5, len(ANSWERS))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-6)
    assert counted.widest <= (most_rows or 1024)


def test_each_beginning_is_read_once_a_question(decoder, asked):
    _, counted = scored(decoder, *asked)
    beginnings = {tuple(answer[:length]) for answer in ANSWERS for length in range(1, len(answer))}
    assert counted.rows == 5 * len(beginnings)


def test_all_answers_of_one_token_are_the_whole_of_it(decoder, asked):
    got, counted = scored(decoder, *asked, answers=[[index] for index in range(VOCAB)])
    assert torch.allclose(got.exp().sum(1), torch.ones(5), atol=1e-5)
    assert counted.rows == 0


@pytest.mark.parametrize(
    ("answers", "message"),
    [([], "one or more"), ([[12], []], "at least 1 token"), ([[12, VOCAB]], f"0..{VOCAB - 1}, got {VOCAB}")],
)
def test_answers_that_are_none(decoder, asked, answers, message):
    begun = decoder.begin(*asked, room=5, rows=asked[0].study)
    with pytest.raises(ValueError, match=message):
        score_answers(decoder, *begun, answers)
