"""Top-k and LSH attention against softmax attention written out."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mm.attention import Causal, Full, Keys, Mask, Paged, Window, attend
from mm.decoder.lsh import Hashing, lsh_attention
from mm.decoder.top_k import top_k_attention


def tensors(b: int, m: int, n: int, *, heads: int = 2, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    q = torch.randn(b, m, heads, width, generator=made)
    return q, torch.randn(b, n, heads, width, generator=made), torch.randn(b, n, heads, width + 2, generator=made)


def by_hand(q: Tensor, k: Tensor, v: Tensor, top_k: int, seen: Tensor) -> Tensor:
    """One query at a time, keys ranked by Python."""
    out = torch.zeros(*q.shape[:3], v.shape[3])
    for b, m, h in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        scores = (k[b, :, h] @ q[b, m, h] / math.sqrt(q.shape[3])).tolist()
        allowed = [n for n in range(k.shape[1]) if seen[b, m, n]]
        best = sorted(allowed, key=lambda n: -scores[n])[:top_k]
        if best:
            weights = torch.tensor([scores[n] for n in best]).softmax(0)
            out[b, m, h] = sum(weight * v[b, n, h] for weight, n in zip(weights, best, strict=True))
    return out


def reads_the_k_best_keys(attention: Callable[..., Tensor], top_k: int, mask: Mask) -> None:
    q, k, v = tensors(2, 7, 9)
    seen = mask.dense(7, 9).expand(2, -1, -1)
    got = attention(q, k, v, top_k=top_k, mask=mask)
    torch.testing.assert_close(got, by_hand(q, k, v, top_k, seen))
    if top_k >= 9:
        torch.testing.assert_close(got, attend(q, k, v, mask=mask))


@pytest.mark.parametrize("top_k", [1, 2, 3, 6, 9, 40])
@pytest.mark.parametrize(
    "mask", [Full(), Causal(), Window(3), Keys(torch.tensor([[True] * 4 + [False] * 5, [False] * 9]))]
)
def test_top_k_attention_reads_the_k_best_keys_for_every_k(top_k: int, mask: Mask) -> None:
    reads_the_k_best_keys(top_k_attention, top_k, mask)


def test_top_k_attention_reads_the_k_best_keys_not_where_values_are_not_gathered() -> None:
    """The printed one weighed the first k values with the weights of the k best keys: right for k = n alone."""

    def printed(q: Tensor, k: Tensor, v: Tensor, *, top_k: int, mask: Mask) -> Tensor:
        best = torch.einsum("bmhk,bnhk->bhmn", q, k / math.sqrt(q.shape[3])).topk(top_k)
        weights = torch.zeros(2, 2, 7, 9).scatter(-1, best.indices, best.values.softmax(-1))
        return torch.einsum("bhmn,bnhk->bmhk", weights[..., :top_k], v[:, :top_k])

    reads_the_k_best_keys(printed, 9, Full())
    for top_k in (1, 2, 3, 6):
        with pytest.raises(AssertionError):
            reads_the_k_best_keys(printed, top_k, Full())


def test_top_k_attention_in_parts_is_the_same_and_of_equal_keys_the_first_are_read() -> None:
    q, k, v = tensors(1, 600, 30)
    whole = top_k_attention(q, k, v, top_k=5, mask=Causal())
    torch.testing.assert_close(whole[:, 500:], top_k_attention(q[:, 500:], k, v, top_k=5, mask=Causal()))
    k = k[:, :1].expand(-1, 30, -1, -1)
    torch.testing.assert_close(top_k_attention(q, k, v, top_k=3)[:, 7], v[:, :3].mean(1))


def test_top_k_attention_sends_gradients_to_the_chosen_keys_alone() -> None:
    q, k, v = (x.double().requires_grad_() for x in tensors(1, 4, 6))
    top_k_attention(q[:, :1], k, v, top_k=2).square().sum().backward()
    for x in (k, v):
        assert x.grad is not None
        assert ((x.grad != 0).any(-1).sum(1) == 2).all()
    assert torch.autograd.gradcheck(lambda *x: top_k_attention(*x, top_k=3, mask=Causal()), (q, k, v))


def test_top_k_attention_with_no_key_gives_zeros_and_finite_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(1, 6, 4))
    out = top_k_attention(q, k, v, top_k=2, mask=Causal())
    assert (out[:, :2] == 0).all()
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_top_k_attention_refuses_what_it_cannot_do() -> None:
    q, k, v = tensors(1, 2, 2)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        top_k_attention(q, k, v, top_k=0)
    with pytest.raises(ValueError, match="Paged"):
        top_k_attention(q, k, v, top_k=1, mask=Paged(torch.tensor([[0]]), torch.tensor([2]), page_size=2))


# ------------------------------------------------------------------------------------------------- LSH


def shared(qk: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Full attention with shared queries and keys: keys of unit length, itself only where there is nothing else."""
    scores = torch.einsum("bmhk,bnhk->bhmn", qk, qk / qk.norm(dim=-1, keepdim=True)) / math.sqrt(qk.shape[3])
    itself = torch.eye(qk.shape[1], dtype=torch.bool)
    others = seen & ~itself
    used = torch.where(others.any(-1, keepdim=True), others, itself & seen)[:, None]
    weights = scores.masked_fill(~used, -math.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bhmn,bnhk->bmhk", weights, v)


def tokens(n: int, *, b: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(b, n, 2, 8, generator=made) * 2, torch.randn(b, n, 2, 6, generator=made)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rounds", [1, 3])
def test_lsh_attention_with_one_bucket_is_full_attention_however_many_rounds(causal: bool, rounds: int) -> None:
    qk, v = tokens(13)
    seen = (Causal() if causal else Full()).dense(13, 13)
    got = lsh_attention(qk, v, hashing=Hashing(1, chunk=16, rounds=rounds), causal=causal)
    torch.testing.assert_close(got, shared(qk, v, seen), atol=1e-5, rtol=1e-5)


def reads_exactly_the_keys_whose_hash_is_equal(attention: Callable[..., Tensor], causal: bool) -> None:
    qk, v = tokens(40)
    hashing = Hashing(4, chunk=40, rounds=2, seed=3)
    bucket = hashing.buckets(qk)
    assert len(bucket.unique()) == 4, "tokens fall into all buckets"
    same = (bucket[..., :, None] == bucket[..., None, :]).any(0)
    limit = (Causal() if causal else Full()).dense(40, 40)
    for head in range(2):
        expected = shared(qk[:, :, head : head + 1], v[:, :, head : head + 1], same[:, head] & limit)
        got = attention(qk, v, hashing=hashing, causal=causal)[:, :, head : head + 1]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_lsh_attention_reads_exactly_the_keys_whose_hash_is_equal(causal: bool) -> None:
    reads_exactly_the_keys_whose_hash_is_equal(lsh_attention, causal)


def test_lsh_attention_reads_exactly_the_keys_whose_hash_is_equal_not_where_keys_are_not_hashed() -> None:
    """The printed one hashed queries alone, and sent each bucket to the keys that happened to stand there."""

    def printed(qk: Tensor, v: Tensor, *, hashing: Hashing, causal: bool) -> Tensor:
        stands = torch.arange(40) // (40 // hashing.num_buckets)
        seen = (hashing.buckets(qk)[..., None] == stands).any(0) & (Causal() if causal else Full()).dense(40, 40)
        return torch.cat([shared(qk[:, :, [head]], v[:, :, [head]], seen[:, head]) for head in range(2)], dim=2)

    with pytest.raises(AssertionError):
        reads_exactly_the_keys_whose_hash_is_equal(printed, False)


def test_near_tokens_share_a_bucket_and_opposite_ones_do_not() -> None:
    qk, _ = tokens(200)
    hashing = Hashing(16, chunk=8, rounds=4)
    bucket = hashing.buckets(qk)
    near = hashing.buckets(qk + 0.05 * torch.randn(qk.shape, generator=torch.Generator().manual_seed(1)))
    assert (bucket == near).float().mean() > 0.9
    assert torch.equal(bucket, hashing.buckets(3 * qk)), "only the direction counts"
    assert torch.equal((bucket + 8) % 16, hashing.buckets(-qk))
    assert 0 < (bucket[..., 1:] == bucket[..., :-1]).float().mean() < 0.15


def test_the_error_of_lsh_attention_falls_with_rounds_to_nothing() -> None:
    qk, v = tokens(24, b=1)
    full = shared(qk, v, Full().dense(24, 24))
    errors = []
    for rounds in (1, 2, 4, 8, 16):
        runs = [lsh_attention(qk, v, hashing=Hashing(2, chunk=24, rounds=rounds, seed=seed)) for seed in range(3)]
        errors.append(sum(float((run - full).norm()) for run in runs))
    assert all(later < earlier for earlier, later in pairwise(errors)), errors
    assert errors[-1] < 0.05 * errors[0], errors


def test_a_chunk_sees_itself_and_the_one_before_in_its_bucket() -> None:
    qk, v = tokens(12, b=1)
    place = torch.arange(12)
    near = place[:, None] // 3 - place[None, :] // 3
    got = lsh_attention(qk, v, hashing=Hashing(1, chunk=3, rounds=2))
    torch.testing.assert_close(got, shared(qk, v, ((near == 0) | (near == 1))[None]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 7, 33])
def test_lsh_attention_never_tells_the_past_of_the_future(n: int) -> None:
    qk, v = tokens(n)
    hashing = Hashing(4, chunk=4, rounds=3, seed=1)
    before = lsh_attention(qk, v, hashing=hashing, causal=True)
    for first in range(1, n, 4):
        for seed in range(3):
            other_qk, other_v = tokens(n, seed=7 + seed)
            changed = [torch.cat([a[:, :first], b[:, first:]], dim=1) for a, b in ((qk, other_qk), (v, other_v))]
            after = lsh_attention(*changed, hashing=hashing, causal=True)
            assert torch.equal(after[:, :first], before[:, :first]), first


def test_padding_never_changes_lsh_attention() -> None:
    qk, v = tokens(21)
    valid = torch.arange(21) < torch.tensor([[21], [13]])
    for causal in (False, True):
        hashing = Hashing(4, chunk=3, rounds=2)
        expected = lsh_attention(qk[1:, :13], v[1:, :13], hashing=hashing, causal=causal)
        for filling in (0.0, 50.0):
            padded = [x.masked_fill(~valid[:, :, None, None], filling) for x in (qk, v)]
            got = lsh_attention(*padded, hashing=hashing, causal=causal, valid=valid)
            torch.testing.assert_close(got[1:, :13], expected, atol=1e-6, rtol=1e-6)
            assert (got[1, 13:] == 0).all()


def test_lsh_attention_follows_its_seed_and_a_permutation_of_tokens() -> None:
    qk, v = tokens(30)
    hashing = Hashing(8, chunk=30, rounds=2, seed=5)
    got = lsh_attention(qk, v, hashing=hashing)
    assert torch.equal(got, lsh_attention(qk, v, hashing=hashing))
    assert not torch.allclose(got, lsh_attention(qk, v, hashing=Hashing(8, chunk=30, rounds=2, seed=6)))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(lsh_attention(qk[:, order], v[:, order], hashing=hashing), got[:, order])


def test_lsh_attention_has_the_gradient_of_what_it_computes() -> None:
    qk, v = tokens(9, b=1)
    qk, v = qk.requires_grad_(), v.requires_grad_()
    bucket = Hashing(2, chunk=9, rounds=2).buckets(qk.detach())
    same = (bucket[..., :, None] == bucket[..., None, :]).any(0)
    parts = [shared(qk[:, :, h : h + 1], v[:, :, h : h + 1], same[:, h]) for h in range(2)]
    expected = torch.autograd.grad(torch.cat(parts, dim=2).square().sum(), (qk, v))
    out = lsh_attention(qk, v, hashing=Hashing(2, chunk=9, rounds=2))
    for got, want in zip(torch.autograd.grad(out.square().sum(), (qk, v)), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_hashing_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="num_buckets must be even or 1, got 3"):
        Hashing(3, chunk=4)
    with pytest.raises(ValueError, match="chunk"):
        Hashing(2, chunk=0)
