"""By length, and remembered: the tower's own vectors, each text made once; in a stage whose text tower is frozen."""

import pytest
import torch

from mm.batch import Padded, Tokens
from mm.encoders.text import TextEncoder
from mm.training import text_memory
from mm.training.text_memory import TextMemory, by_length


class Counted(TextEncoder):
    """Counts the texts that it is shown."""

    shown = read = 0

    def forward(self, x: Padded) -> torch.Tensor:
        self.shown += len(x.values)
        return super().forward(x)

    def tokens(self, x: Padded) -> Tokens:
        self.read += len(x.values)
        return super().tokens(x)


def tower() -> Counted:
    torch.manual_seed(0)
    return Counted(vocab_size=32, width=16, depth=1, heads=2, context_length=12).eval()


def texts(*rows: list[int]) -> Padded:
    return Padded.of(list(rows))


def test_texts_of_a_length_together_and_back_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_memory, "AT_ONCE", 2)
    encoder = tower()
    some = texts([3, 4, 5, 6, 7, 8], [6], [9, 10], [7, 8, 9], [11])
    expected = encoder(some)
    got = by_length(encoder, some)
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(expected)
    losses = [(item * weights).sum() for item in (got, expected)]
    slopes = [torch.autograd.grad(loss, list(encoder.parameters()), allow_unused=True) for loss in losses]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_it_gives_the_towers_vectors_and_asks_once() -> None:
    encoder, memory = tower(), TextMemory()
    some = texts([3, 4, 5], [6], [3, 4, 5], [7, 8, 9, 10, 11])
    expected = encoder(some).detach()
    encoder.shown = 0
    torch.testing.assert_close(memory(encoder, some), expected)
    assert encoder.shown == len(memory) == 3
    torch.testing.assert_close(memory(encoder, texts([6], [12], [3, 4, 5])), encoder(texts([6], [12], [3, 4, 5])))
    assert len(memory) == 4
    assert not memory(encoder, some).requires_grad


def test_it_gives_the_towers_tokens_and_asks_once() -> None:
    encoder, memory = tower(), TextMemory()
    some = texts([3, 4, 5], [6], [3, 4, 5], [7, 8, 9, 10, 11])
    expected = encoder.tokens(some)
    encoder.read = 0
    for part in (some, some.select(torch.tensor([2, 1]))):
        found, whole = memory.tokens(encoder, part), encoder.tokens(part)
        width = int(part.lengths.max())
        assert torch.equal(found.mask, whole.mask[:, :width])
        torch.testing.assert_close(found.values[found.mask], whole.values[whole.mask].detach())
        assert not found.values[~found.mask].any()
        assert not found.values.requires_grad
    assert expected.values.requires_grad
    assert encoder.read == len(memory) + 4 + 2
    assert len(memory) == 3


def test_it_takes_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_memory, "MOST", 2 * 16)  # two vectors
    encoder, memory = tower(), TextMemory()
    for start in range(0, 20, 2):
        some = texts([start], [start + 1])
        torch.testing.assert_close(memory(encoder, some), encoder(some).detach())
    assert len(memory) == 2
