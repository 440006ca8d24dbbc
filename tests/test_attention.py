"""Masks against xFormers' own biases, attention against a plain softmax, padding, empty rows, pages."""

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from mm.attention import Causal, Full, Keys, Mask, Packed, Paged, Window, attend

needs_xformers = pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers isn't installed")

LENGTHS = [(5, 5), (3, 7), (7, 3), (1, 9)]


def tensors(b: int, m: int, n: int, *, heads: int = 2, width: int = 8, c: int | None = None) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shape = (c or b, n, heads, width)
    return torch.randn(b, m, heads, width), torch.randn(shape), torch.randn(shape)


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, scale: float | None = None) -> Tensor:
    """Softmax attention written out, rows without a key set to zero."""
    k, v = k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1)
    scores = torch.einsum("bmhk,bnhk->bhmn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhmn,bnhk->bmhk", weights, v)


def masks(q_len: int, k_len: int) -> list[Mask]:
    valid = torch.arange(k_len) < torch.tensor([k_len, 0, max(k_len - 2, 1)])[:, None]
    return [
        Full(),
        Causal(),
        Window(2),
        Window(0),
        Window(1, 2),
        Keys(valid),
        Keys(valid.flip(1)),
        Keys(valid, causal=True),
    ]


@pytest.mark.parametrize(("q_len", "k_len"), LENGTHS)
def test_attend_is_softmax_attention_under_the_dense_mask(q_len: int, k_len: int) -> None:
    q, k, v = tensors(3, q_len, k_len)
    for mask in masks(q_len, k_len):
        seen = mask.dense(q_len, k_len).expand(3, -1, -1)
        torch.testing.assert_close(
            attend(q, k, v, mask=mask), plain(q, k, v, seen), msg=lambda m, at=mask: f"{at}: {m}"
        )
    torch.testing.assert_close(
        attend(q, k, v, mask=Full(), scale=0.3), plain(q, k, v, torch.ones(3, q_len, k_len).bool(), scale=0.3)
    )


@needs_xformers
@pytest.mark.parametrize(("q_len", "k_len"), LENGTHS)
def test_the_xformers_bias_materialised_is_the_dense_mask(q_len: int, k_len: int) -> None:
    for mask in masks(q_len, k_len):
        bias, dense = mask.bias(q_len, k_len), mask.dense(q_len, k_len)
        if bias is None:
            assert dense.all()
            continue
        table = bias if isinstance(bias, Tensor) else bias.materialize((len(dense), 1, q_len, k_len))  # type: ignore[attr-defined]
        assert torch.equal(table[:, 0] == 0, dense), mask
        assert torch.equal(table[:, 0] == -math.inf, ~dense), mask


@needs_xformers
@pytest.mark.parametrize(
    "mask",
    [
        Packed((3, 1, 4)),
        Packed((3, 1, 4), causal=True),
        Packed((2, 3), (5, 1)),
        Packed((2, 1, 3), (5, 1, 3), causal=True),
        Packed((2, 0, 3), (2, 0, 4), causal=True),
        Packed((2, 5, 3), (5, 5, 9), causal=True, left=2),
    ],
)
def test_the_packed_bias_materialised_is_the_dense_mask(mask: Packed) -> None:
    q_len, k_len = sum(mask.queries), sum(mask.key_lengths)
    table = mask.bias(q_len, k_len).materialize((q_len, k_len))  # type: ignore[attr-defined]
    assert torch.equal(table == 0, mask.dense(q_len, k_len)[0])


@needs_xformers
@pytest.mark.parametrize("q_len", [1, 3])
def test_the_paged_bias_materialised_is_the_dense_mask(q_len: int) -> None:
    mask = paged()
    pool = 6 * mask.page_size
    table = mask.bias(q_len, pool).materialize((3 * q_len, 3 * 2 * mask.page_size))  # type: ignore[attr-defined]
    assert torch.equal((table == 0).unflatten(0, (3, q_len)), mask.dense(q_len, pool))


def paged() -> Paged:
    return Paged(torch.tensor([[4, 0], [2, 5], [1, 3]]), torch.tensor([7, 3, 8]), page_size=4)


def test_causal_is_aligned_at_the_bottom_right() -> None:
    assert Causal().dense(2, 4)[0].tolist() == [[True, True, True, False], [True, True, True, True]]
    assert Window(1).dense(2, 4)[0].tolist() == [[False, True, True, False], [False, False, True, True]]


def test_the_last_queries_give_the_same_alone_against_the_whole_cache() -> None:
    q, k, v = tensors(2, 9, 9)
    for mask in (Causal(), Window(3)):
        torch.testing.assert_close(attend(q[:, -2:], k, v, mask=mask), attend(q, k, v, mask=mask)[:, -2:])


@pytest.mark.parametrize("mask", [Keys(torch.tensor([[False] * 4, [True] * 4])), Causal(), Packed((5, 1), (0, 4))])
def test_a_query_with_no_key_gives_zeros_and_a_finite_gradient(mask: Mask) -> None:
    q, k, v = tensors(1 if isinstance(mask, Packed) else 2, 6, 4)
    for x in (q, k, v):
        x.requires_grad_()
    out = attend(q, k, v, mask=mask)
    none = ~mask.dense(6, 4).any(-1).expand(len(q), -1)
    assert none.any()
    assert (out[none] == 0).all()
    assert (out[~none] != 0).all()
    out.square().sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.isfinite().all()
    assert q.grad is not None
    assert (q.grad[none] == 0).all()


def test_padding_keys_never_changes_a_result() -> None:
    q, k, v = tensors(2, 3, 6)
    valid = torch.tensor([[True] * 4 + [False] * 2] * 2)
    expected = attend(q, k[:, :4], v[:, :4], mask=Full())
    for filling in (0.0, -7.0, 1e4):
        k[:, 4:], v[:, 4:] = filling, filling
        torch.testing.assert_close(attend(q, k, v, mask=Keys(valid)), expected)


def test_bfloat16_is_float32_to_its_precision_forward_and_backward() -> None:
    for mask in masks(7, 9):
        results = []
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [x.to(dtype).requires_grad_() for x in tensors(3, 7, 9)]
            out = attend(*inputs, mask=mask, scale=0.3)
            out.float().square().sum().backward()
            results.append([out.float(), *(x.grad.float() for x in inputs if x.grad is not None)])
        for expected, got in zip(*results, strict=True):
            assert (got - expected).norm() <= 0.02 * expected.norm() + 0.02, mask


def test_packed_equals_one_sequence_at_a_time() -> None:
    for causal in (False, True):
        mask = Packed((2, 4, 1), (3, 4, 2), causal=causal)
        q, k, v = tensors(1, 7, 9)
        got = attend(q, k, v, mask=mask)
        single: Mask = Causal() if causal else Full()
        parts = zip(q.split(mask.queries, 1), k.split(mask.key_lengths, 1), v.split(mask.key_lengths, 1), strict=True)
        expected = torch.cat([attend(a, b, c, mask=single) for a, b, c in parts], dim=1)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("q_len", [1, 3])
def test_paged_equals_contiguous_keys_and_its_own_dense_mask(q_len: int) -> None:
    mask = paged()
    q, k, v = tensors(3, q_len, 24, c=1)
    got = attend(q, k, v, mask=mask)
    torch.testing.assert_close(got, plain(q, k, v, mask.dense(q_len, 24)))
    for row, (table, length) in enumerate(zip(mask.block_tables, mask.lengths, strict=True)):
        places = torch.cat([torch.arange(int(page) * 4, int(page) * 4 + 4) for page in table])[: int(length)]
        alone = attend(q[row : row + 1], k[:, places], v[:, places], mask=Causal())
        torch.testing.assert_close(got[row : row + 1], alone)


@pytest.mark.parametrize(("q_len", "k_len", "readers"), [(1, 5, 1), (1, 5, 3), (2, 5, 1), (5, 5, 1)])
def test_where_keys_lie_in_memory_changes_no_result(q_len: int, k_len: int, readers: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, q_len, 2 * readers, 8)
    k, v = (torch.randn(3, k_len, 2, width) for width in (8, 6))
    seen = torch.tensor([[True] * 5, [True, False, True, True, False], [False] * 5])
    for mask in (Full(), Causal(), Window(1), Keys(seen), Keys(seen, causal=True)):
        for own_k, own_v in ((k, v), (k[:1], v[:1])):
            if isinstance(mask, Keys) and len(own_k) == 1:
                continue
            rows = q[: len(own_k)]
            # A place of more keys than are read, head by head.
            room = [x.new_full((len(x), 2, k_len + 3, x.shape[3]), torch.nan) for x in (own_k, own_v)]
            by_head = [x.transpose(1, 2)[:, :k_len].copy_(own) for x, own in zip(room, (own_k, own_v), strict=True)]
            torch.testing.assert_close(attend(rows, *by_head, mask=mask), attend(rows, own_k, own_v, mask=mask))


def test_unused_entries_of_a_block_table_are_never_read() -> None:
    q, k, v = tensors(2, 1, 16, c=1)
    lengths = torch.tensor([4, 2])
    one = Paged(torch.tensor([[2, 0], [1, 3]]), lengths, page_size=4)
    other = Paged(torch.tensor([[2, 1], [1, 2]]), lengths, page_size=4)
    assert torch.equal(attend(q, k, v, mask=one), attend(q, k, v, mask=other))
    assert torch.equal(one.dense(1, 16), other.dense(1, 16))


@pytest.mark.parametrize(("heads", "readers"), [(1, 4), (2, 3), (4, 1)])
@pytest.mark.parametrize(("q_len", "k_len"), [*LENGTHS, (1, 1)])
def test_grouped_queries_equal_keys_repeated_for_every_reader(heads: int, readers: int, q_len: int, k_len: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, q_len, heads * readers, 8, requires_grad=True)
    k, v = (torch.randn(3, k_len, heads, width, requires_grad=True) for width in (8, 5))
    for mask in masks(q_len, k_len):
        seen = mask.dense(q_len, k_len).expand(3, -1, -1)
        # A query head and the key head it reads, named one by one.
        pairs = [(head, head // readers) for head in range(heads * readers)]
        each = [plain(q[:, :, a : a + 1], k[:, :, b : b + 1], v[:, :, b : b + 1], seen) for a, b in pairs]
        expected, got = torch.cat(each, dim=2), attend(q, k, v, mask=mask)
        torch.testing.assert_close(got, expected)
        direction = torch.randn_like(got)
        ours, theirs = (torch.autograd.grad((out * direction).sum(), (q, k, v)) for out in (got, expected))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other.nan_to_num(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("q_len", [1, 3])
def test_grouped_queries_read_pages(q_len: int) -> None:
    mask = paged()
    q, k, v = tensors(3, q_len, 24, heads=2, c=1)
    many = torch.cat([q, -q, 2 * q], dim=-1).unflatten(-1, (3, 8)).flatten(2, 3)
    got = attend(many, k, v, mask=mask)
    expected = plain(many, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), mask.dense(q_len, 24))
    torch.testing.assert_close(got, expected)


def test_heads_that_do_not_divide_are_named() -> None:
    q, k, v = tensors(1, 2, 2, heads=2)
    with pytest.raises(ValueError, match="query heads must be a multiple of key heads, got 3 and 2"):
        attend(q[:, :, [0, 1, 1]], k, v, mask=Full())


@needs_xformers
@pytest.mark.parametrize(("q_len", "k_len"), [(5, 5), (2, 7)])
def test_attend_is_sdpa_under_the_bias_that_xformers_materialises(q_len: int, k_len: int) -> None:
    q, k, v = tensors(1, q_len, k_len)
    lengths = ((q_len - 1, 1), (k_len - 1, 1))
    every = [Causal(), Window(2), Window(1, 2), Packed(*lengths), Packed(*lengths, causal=True)]
    every.append(Packed(*lengths, causal=True, left=1))
    for mask in every:
        table = mask.bias(q_len, k_len).materialize((1, 1, q_len, k_len))  # type: ignore[attr-defined]
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=table
        )
        torch.testing.assert_close(attend(q, k, v, mask=mask), expected.transpose(1, 2))


def test_bad_masks_name_the_argument() -> None:
    with pytest.raises(ValueError, match="left"):
        Window(-1)
    with pytest.raises(ValueError, match="keys must have 2 lengths"):
        Packed((1, 2), (1,))
    with pytest.raises(ValueError, match="keys >= queries"):
        Packed((3,), (2,), causal=True)
    with pytest.raises(ValueError, match="left must be 0 or more and needs causal"):
        Packed((3,), left=2)
