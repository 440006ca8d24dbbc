"""LSH attention: a token looks only at tokens whose direction falls into the same bucket of a random rotation."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

SELF = -1e5
"""Score of a token with itself: it reads itself only where it sees nothing else."""


@dataclass(frozen=True)
class Hashing:
    """How tokens are hashed.

    Attributes:
        num_buckets: Even, or 1 for no hashing at all.
        chunk: Tokens of a bucket that are looked at together.
        rounds: Independent hashes; a token sees what any of them shows it.
        seed: Of the rotations.
    """

    num_buckets: int
    chunk: int
    rounds: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_buckets < 1 or (self.num_buckets > 1 and self.num_buckets % 2):
            raise ValueError(f"num_buckets must be even or 1, got {self.num_buckets}")
        if self.chunk < 1 or self.rounds < 1:
            raise ValueError(f"chunk and rounds must be at least 1, got chunk={self.chunk}, rounds={self.rounds}")

    def buckets(self, x: Float[Tensor, "B N H K"]) -> Int[Tensor, "R B H N"]:
        """Angular hash (Andoni et al. 2015): the nearest of the axes, and their opposites, of a random projection."""
        if self.num_buckets == 1:
            return x.new_zeros(self.rounds, len(x), x.shape[2], x.shape[1], dtype=torch.long)
        made = torch.Generator().manual_seed(self.seed)
        shape = (self.rounds, x.shape[2], x.shape[3], self.num_buckets // 2)
        turned = torch.einsum("bnhk,rhka->rbhna", x.float(), torch.randn(shape, generator=made).to(x.device))
        return torch.cat([turned, -turned], dim=-1).argmax(-1)


def lsh_attention(
    qk: Float[Tensor, "B N H K"],
    v: Float[Tensor, "B N H W"],
    *,
    hashing: Hashing,
    causal: bool = False,
    valid: Bool[Tensor, "B N"] | None = None,
) -> Float[Tensor, "B N H W"]:
    """Attention among the tokens of a bucket (Kitaev et al., Reformer, 2020), with queries and keys shared.

    A token's key is its query at unit length, so that both fall into the same bucket; separate queries and keys
    would not, and are not taken. A token never reads itself unless it sees nothing else. In every round tokens are
    sorted by bucket and cut into chunks, and a token sees its own chunk and the one before. Rounds are joined by
    their log-sum-exp, a pair that m rounds show counting 1/m in each: the result is the exact softmax over all keys
    that any round shows, and becomes full (shared, self-less) attention as rounds are added, if chunks hold buckets.

    Chunks lie within buckets, not as in the paper across the sorted whole: there the place of a cut, and so what a
    token sees, hangs on how many *later* tokens fell into lower buckets. Here a causal result hangs on nothing later.

    What it costs: O(R (N + num_buckets chunk) chunk (K + W)) multiplications, and R times as many comparisons again
    to count pairs. Half-filled chunks and gathers make it slower than `attend` until N is many thousands.

    Args:
        qk: Queries, and directions of the keys.
        v: Values.
        hashing: Buckets, chunks, rounds, seed.
        causal: Hide later tokens.
        valid: True where a token is real; others are never read and read zeros. None for all.

    Returns:
        One vector a token and head.
    """
    if valid is None:
        valid = torch.ones(qk.shape[:2], dtype=torch.bool, device=qk.device)
    place = _Place.of(hashing.buckets(qk.detach()), valid, hashing=hashing)
    rounds = [_round(qk, v, place, index, causal=causal) for index in range(hashing.rounds)]
    mixed, weight = (torch.stack(parts) for parts in zip(*rounds, strict=True))
    out = (weight.softmax(0)[..., None] * mixed).sum(0)
    return out.transpose(1, 2).masked_fill(~valid[:, :, None, None], 0).to(v.dtype)


@dataclass(frozen=True)
class _Place:
    """Where each token stands in each round.

    Attributes:
        bucket: Of each token; padding has one of its own.
        chunk: Which chunk of its bucket.
        slot: Among C chunks of m slots, those of a bucket in a row.
        token: Which token stands in a slot, -1 for none.
        valid: Which tokens are real.
    """

    bucket: Int[Tensor, "R B H N"]
    chunk: Int[Tensor, "R B H N"]
    slot: Int[Tensor, "R B H N"]
    token: Int[Tensor, "R B H C m"]
    valid: Bool[Tensor, "B N"]

    @staticmethod
    def of(bucket: Int[Tensor, "R B H N"], valid: Bool[Tensor, "B N"], *, hashing: Hashing) -> "_Place":
        """Sorts tokens by bucket and, within it, by position. How many chunks there are does not depend on tokens."""
        count, size = bucket.shape[-1], hashing.chunk
        bucket = bucket.masked_fill(~valid[:, None], hashing.num_buckets)
        ordered, order = bucket.sort(dim=-1, stable=True)
        filled = F.one_hot(bucket, hashing.num_buckets + 1).sum(-2)
        before = filled.cumsum(-1) - filled
        rank = torch.empty_like(bucket).scatter_(
            -1, order, torch.arange(count, device=bucket.device) - before.gather(-1, ordered)
        )
        needed = (filled + size - 1) // size
        first = (needed.cumsum(-1) - needed).gather(-1, bucket)
        slot = first * size + rank
        chunks = math.ceil(count / size) + hashing.num_buckets + 1
        token = bucket.new_full((*bucket.shape[:-1], chunks * size), -1)
        token.scatter_(-1, slot, torch.arange(count, device=bucket.device).expand_as(slot))
        return _Place(bucket, rank // size, slot, token.view(*token.shape[:-1], chunks, size), valid)

    def shown(self, index: int, query: Tensor, key: Tensor) -> Bool[Tensor, "B H C m n"]:
        """Whether that round shows the query the key: same bucket, same chunk or the one before."""
        bucket, chunk = self.bucket[index], self.chunk[index]
        near = _take(chunk, query)[..., :, None] - _take(chunk, key)[..., None, :]
        same = _take(bucket, query)[..., :, None] == _take(bucket, key)[..., None, :]
        return same & (near >= 0) & (near <= 1)


def _round(
    qk: Tensor, v: Tensor, place: _Place, index: int, *, causal: bool
) -> tuple[Float[Tensor, "B H N W"], Float[Tensor, "B H N"]]:
    """What each token reads in one round, and the log-sum-exp of its scores."""
    token = place.token[index]
    neighbours = torch.cat([token.roll(1, dims=2), token], dim=-1)
    query, key = token.clamp(min=0), neighbours.clamp(min=0)
    rows = qk.float().transpose(1, 2)
    q = _take_rows(rows, query) * qk.shape[-1] ** -0.5
    scores = q @ _take_rows(F.normalize(rows, dim=-1), key).transpose(-1, -2)
    times = torch.stack([place.shown(other, query, key) for other in range(len(place.bucket))]).sum(0)
    seen = place.shown(index, query, key) & (neighbours >= 0)[..., None, :]
    if causal:
        seen = seen & (key[..., None, :] <= query[..., :, None])
    scores = scores.masked_fill(key[..., None, :] == query[..., :, None], SELF) - times.clamp(min=1).log()
    # Empty slots may see nothing; they are given one score, and no token ever reads them.
    scores = scores.masked_fill(~seen, -math.inf).masked_fill(~seen.any(-1, keepdim=True), 0)
    weight = scores.logsumexp(-1, keepdim=True)
    mixed = (scores - weight).exp() @ _take_rows(v.float().transpose(1, 2), key)
    slot = place.slot[index]
    return _take_rows(mixed.flatten(2, 3), slot), _take(weight.flatten(2), slot)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """[B H N] at [B H ...]."""
    return x.gather(2, index.flatten(2)).view(index.shape)


def _take_rows(x: Tensor, index: Tensor) -> Tensor:
    """[B H N K] at [B H ...]."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).view(*index.shape, x.shape[-1])
