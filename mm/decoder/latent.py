"""Multi-head latent attention: a token leaves one short vector in the cache, whatever the number of heads."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mm.attention import Mask, Mixed, Paged, Visible, attend
from mm.decoder.paged import Table
from mm.transformer import Angles, KeyValueCache, RMSNorm


@dataclass(frozen=True)
class Latent:
    """Sizes of multi-head latent attention.

    Attributes:
        rank: Of what keys and values are made from: the width of the cached latent.
        plain_width: Of the part of a query or key that knows no position.
        turned_width: Of the part that is turned by its position; keys share it among heads. Even.
        value_width: Of a value.
        query_rank: Of what queries are made from; None: from the token directly (DeepSeek-V2-Lite).
    """

    rank: int
    plain_width: int
    turned_width: int
    value_width: int
    query_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "plain_width", "turned_width", "value_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.turned_width % 2:
            raise ValueError(f"turned_width must be even for rotary positions, got {self.turned_width}")
        if self.query_rank is not None and self.query_rank < 1:
            raise ValueError(f"query_rank must be at least 1 or null, got {self.query_rank}")


class LatentAttention(nn.Module):
    """Multi-head latent attention as DeepSeek-V2 and V3 have it (DeepSeek-AI 2024, section 2.1).

    The cache holds the normed latent (`rank` numbers a token) and the turned key (`turned_width`), both shared by
    all heads, and nothing else. It is read in two forms that are equal but for rounding. *Written out*: keys and
    values of every head are made from the latents, which costs rank * (plain + value) a head and key. *Absorbed*:
    queries are taken into the latent's space and values out of it after mixing, so that all heads read the one
    latent, at 2 * rank + turned a head, query and key. Training and long prompts are written out; with a cache,
    the form of fewer multiplications is taken, which for a decoding step is the absorbed one.

    On CUDA xFormers' kernels want values as wide as keys and heads of at most 256: `attend` pads the values of the
    written-out form with zeros, and leaves the absorbed form (width rank + turned, 576 in DeepSeek-V3) to PyTorch.

    Args:
        width: Of tokens.
        heads: Number of heads.
        sizes: Of the latent and of one head.
        score_factor: Of the scores, beside 1 / sqrt(plain + turned), see `RotaryScaling`.
        norm_eps: Of the norms on the latents.
        neighbours: How the turned channels pair, see `Angles.turn`: DeepSeek's own weights want True.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        sizes: Latent,
        score_factor: float = 1.0,
        norm_eps: float = 1e-6,
        neighbours: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.sizes, self.neighbours = heads, sizes, neighbours
        self.scale = score_factor * (sizes.plain_width + sizes.turned_width) ** -0.5
        self.q_down = None if sizes.query_rank is None else nn.Linear(width, sizes.query_rank, bias=False)
        self.q_norm = None if sizes.query_rank is None else RMSNorm(sizes.query_rank, eps=norm_eps)
        self.q = nn.Linear(sizes.query_rank or width, heads * (sizes.plain_width + sizes.turned_width), bias=False)
        self.kv_down = nn.Linear(width, sizes.rank + sizes.turned_width, bias=False)
        self.kv_norm = RMSNorm(sizes.rank, eps=norm_eps)
        self.kv = nn.Linear(sizes.rank, heads * (sizes.plain_width + sizes.value_width), bias=False)
        self.out = nn.Linear(heads * sizes.value_width, width, bias=False)

    def forward(
        self, x: Float[Tensor, "B M D"], *, mask: Visible, angles: Angles, cache: KeyValueCache | None = None
    ) -> Float[Tensor, "B M D"]:
        """Mixes tokens along M.

        Args:
            x: Tokens.
            mask: Over the keys: M of them, or all those of the cache.
            angles: Of each token's position, for heads of `turned_width`.
            cache: Where earlier latents and turned keys are kept, as [B N 1 rank] and [B N 1 turned].
        """
        sizes = self.sizes
        asked = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q_plain, q_turned = (
            self.q(asked).unflatten(-1, (self.heads, -1)).split([sizes.plain_width, sizes.turned_width], dim=-1)
        )
        latent, k_turned = self.kv_down(x)[:, :, None].split([sizes.rank, sizes.turned_width], dim=-1)
        latent = self.kv_norm(latent)
        q_turned = angles.turn(q_turned, neighbours=self.neighbours)
        k_turned = angles.turn(k_turned, neighbours=self.neighbours)
        if cache is not None:
            latent, k_turned = cache.update(latent, k_turned)
        cached = cache is not None
        if isinstance(mask, Mixed):
            queries = [item.flatten(0, 1)[None] for item in (q_plain, q_turned)]
            parts = mask.parts(queries, [latent, k_turned])
            read = mask.joined([self._read(*own, *keys, mask=seen, cached=cached) for own, keys, seen in parts])
        else:
            read = self._read(q_plain, q_turned, latent, k_turned, mask=mask, cached=cached)
        out: Tensor = self.out(read.reshape(*x.shape[:2], -1))
        return out

    def _read(
        self, q_plain: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor, *, mask: Mask, cached: bool
    ) -> Float[Tensor, "B M H W"]:
        """In the cheaper form."""
        if isinstance(mask, Paged):
            # No paged kernel has keys and values of unequal width: each row's own are taken out of the pool.
            places, _ = mask.place()
            latent, k_turned, mask = latent[0, places], k_turned[0, places], Table(mask.logical(q_plain.shape[1]))
        absorb = cached and self._absorbed_is_cheaper(q_plain.shape[1], latent.shape[1])
        read = self._read_absorbed if absorb else self._read_written_out
        return read(q_plain, q_turned, latent, k_turned, mask=mask)

    def _read_written_out(
        self, q_plain: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor, *, mask: Mask
    ) -> Float[Tensor, "B M H W"]:
        """Keys and values of every head are made."""
        kv = self.kv(latent[:, :, 0]).unflatten(-1, (self.heads, -1))
        k_plain, v = kv.split([self.sizes.plain_width, self.sizes.value_width], dim=-1)
        q = torch.cat([q_plain, q_turned], dim=-1)
        k = torch.cat([k_plain, k_turned.expand(-1, -1, self.heads, -1)], dim=-1)
        return attend(q, k, v, mask=mask, scale=self.scale)

    def _read_absorbed(
        self, q_plain: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor, *, mask: Mask
    ) -> Float[Tensor, "B M H W"]:
        """Every head reads the latents themselves: q (U c) = (q U) c, and V sum(p c) = sum(p V c)."""
        up = self.kv.weight.view(self.heads, -1, self.sizes.rank)
        k_up, v_up = up[:, : self.sizes.plain_width], up[:, self.sizes.plain_width :]
        q = torch.cat([torch.einsum("bmhk,hkr->bmhr", q_plain, k_up), q_turned], dim=-1)
        k = torch.cat([latent, k_turned], dim=-1)
        mixed = attend(q, k, latent, mask=mask, scale=self.scale)
        return torch.einsum("bmhr,hwr->bmhw", mixed, v_up)

    def _absorbed_is_cheaper(self, q_len: int, k_len: int) -> bool:
        """Multiplications of a head: to make or absorb, and to score and mix."""
        s = self.sizes
        a_token = s.rank * (s.plain_width + s.value_width)
        written_out = k_len * (a_token + q_len * (s.plain_width + s.turned_width + s.value_width))
        absorbed = q_len * (a_token + k_len * (2 * s.rank + s.turned_width))
        return absorbed < written_out
