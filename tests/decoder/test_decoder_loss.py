import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mm.decoder.loss import chunked_cross_entropy


def make(tokens, width, vocabulary):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=g, requires_grad=True)
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), generator=g)


@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 1000])
def test_loss_and_gradients_equal_the_whole_cross_entropy(chunk):
    hidden, weight, targets = make(100, 16, 50)
    expected = F.cross_entropy(hidden @ weight.T, targets)
    wanted = torch.autograd.grad(3 * expected, [hidden, weight])
    loss = chunked_cross_entropy(hidden, weight, targets, chunk=chunk)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for got, right in zip(torch.autograd.grad(3 * loss, [hidden, weight]), wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def largest(loss, parts):
    with Largest() as mode:
        loss().backward()
    assert all(part.grad is not None for part in parts)
    return mode.elements


def test_logits_of_a_long_batch_never_exist_at_once():
    hidden, weight, targets = make(2048, 8, 300)
    whole = largest(lambda: F.cross_entropy(hidden @ weight.T, targets), [hidden, weight])
    chunked = largest(lambda: chunked_cross_entropy(hidden, weight, targets, chunk=64), [hidden, weight])
    assert whole == 2048 * 300
    assert chunked == max(64 * 300, 2048 * 8)


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, targets = make(10, 4, 12)
    chunked_cross_entropy(hidden, weight.detach(), targets, chunk=4).backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert chunked_cross_entropy(hidden, weight, targets, chunk=4).item() > 0


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "mm" in str(func)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("recording", "products"), [(True, 3), (False, 1)])
def test_gradients_are_made_only_where_they_are_recorded(recording, products):
    hidden, weight, targets = make(10, 4, 12)
    with Products() as mode, torch.set_grad_enabled(recording):
        chunked_cross_entropy(hidden, weight, targets, chunk=5)
    assert mode.count == 2 * products  # of two chunks


def test_autocast_is_as_close_as_the_whole_cross_entropy_under_it():
    hidden, weight, targets = make(100, 16, 50)
    exact = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), [hidden, weight])
    errors = []
    for whole in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = F.linear(hidden, weight).float()
            loss = F.cross_entropy(logits, targets) if whole else chunked_cross_entropy(hidden, weight, targets)
        assert loss.dtype == torch.float32
        got = torch.autograd.grad(loss, [hidden, weight])
        assert all(one.dtype == torch.float32 for one in got)
        errors.append([float((one - true).norm() / true.norm()) for one, true in zip(got, exact, strict=True)])
    assert all(chunked < 1.2 * whole for whole, chunked in zip(*errors, strict=True))
    assert max(errors[0]) < 0.02


def test_bfloat16_hidden_vectors_meet_a_float32_table_as_in_autocast():
    hidden, weight, targets = make(100, 16, 50)
    loss = chunked_cross_entropy(hidden.bfloat16(), weight, targets, chunk=9)
    loss.backward()
    expected = F.cross_entropy(hidden @ weight.T, targets)
    assert loss.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)


def test_bad_arguments_are_refused():
    hidden, weight, targets = make(4, 4, 12)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        chunked_cross_entropy(hidden, weight, targets, chunk=0)
    with pytest.raises(ValueError, match="targets must hold at least 1 token, got 0"):
        chunked_cross_entropy(hidden[:0], weight, targets[:0])
