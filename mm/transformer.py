"""Parts of the transformers we write: norm, rotary positions, attention, gated feed-forward, and a block.

Everything is pre-norm, without biases, and attends through `mm.attention.attend`. Weights live in Linear and
norm modules only. `Block` takes its feed-forward from outside, so that a mixture of experts fits in.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mm.attention import Full, Mask, Visible, attend

FEW_NUMBERS = 2**15
"""Up to so many, calls cost more than memory."""


@runtime_checkable
class KeyValueCache(Protocol):
    """What self-attention writes new keys and values to, and reads all of them from."""

    def update(
        self, k: Float[Tensor, "B M H K"], v: Float[Tensor, "B M H W"]
    ) -> tuple[Float[Tensor, "C N H K"], Float[Tensor, "C N H W"]]:
        """Appends, and returns everything so far (or the pool that holds it)."""
        ...


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, width: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """The same shape and dtype, each vector scaled to a mean square of 1, then by the weight."""
        if torch.is_grad_enabled() or x.dtype != torch.float32 or self.weight.dtype != torch.float32:
            return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)
        if x.numel() <= FEW_NUMBERS:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        # Nothing is kept for a backward pass: one tensor of the input's size is made, not three.
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        scaled: Tensor = (x * scale).mul_(self.weight)
        return scaled


@dataclass(frozen=True)
class Angles:
    """Cosine and sine for every token and pair of channels, in float32; made once, used by every layer."""

    cos: Float[Tensor, "#B M 1 K"]
    sin: Float[Tensor, "#B M 1 K"]
    """Of the first half of a head negative: what a first channel takes from its second one."""

    @staticmethod
    def at(positions: Int[Tensor, "#B M"], frequencies: Float[Tensor, " P"]) -> "Angles":
        """Position times frequency, for heads of K = 2 P channels."""
        angles = (positions[..., None].float() * frequencies.float())[:, :, None]
        cos, sin = angles.cos(), angles.sin()
        return Angles(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))

    def turn(self, x: Float[Tensor, "B M H K"], *, neighbours: bool = False) -> Float[Tensor, "B M H K"]:
        """Each vector turned by the angle of its position.

        Args:
            x: Queries or keys.
            neighbours: A pair is channels 2i and 2i + 1 (DeepSeek), not i and i + P (GPT-NeoX, Llama).
                The result has the first of each pair in its first half either way: scores don't know.
        """
        wide = x.float()
        if neighbours:
            wide = torch.cat([wide[..., 0::2], wide[..., 1::2]], dim=-1)
        partner = wide.roll(x.shape[-1] // 2, dims=-1)
        return torch.addcmul(wide * self.cos, partner, self.sin).to(x.dtype)


def rotary_frequencies(
    head_width: int, *, base: float, device: torch.device | str | None = None
) -> Float[Tensor, " P"]:
    """Radians a position for each of P = head_width / 2 pairs of channels (Su et al. 2021), in float32."""
    return base ** -(torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width)


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021): a score depends on the distance of query and key alone.

    The first half of a head pairs with the second half (as in GPT-NeoX and Llama).
    """

    frequencies: Tensor

    def __init__(self, head_width: int, *, base: float = 10000.0) -> None:
        super().__init__()
        if head_width % 2:
            raise ValueError(f"head_width must be even for rotary positions, got {head_width}")
        self.base = base
        self.register_buffer("frequencies", rotary_frequencies(head_width, base=base), persistent=False)

    def forward(self, x: Float[Tensor, "B M H K"], positions: Int[Tensor, "#B M"]) -> Float[Tensor, "B M H K"]:
        """Each vector turned by the angle of its position."""
        return self.angles(positions).turn(x)

    def angles(self, positions: Int[Tensor, "#B M"]) -> Angles:
        """Of these positions; they turn queries, keys and other layers' alike."""
        frequencies = self.frequencies
        if frequencies.dtype != torch.float32:
            # A module turned to bfloat16 has its buffers rounded: angles of far positions would be wrong.
            frequencies = rotary_frequencies(2 * len(frequencies), base=self.base, device=frequencies.device)
        return Angles.at(positions, frequencies)


class SelfAttention(nn.Module):
    """Multi-head self-attention with optional rotary positions and an optional cache.

    Args:
        width: Of tokens.
        heads: Number of heads; divides `width`.
        rotary_base: Base of the rotary frequencies; None for no rotary positions.
        dropout: On attention weights, in training only.
    """

    def __init__(self, width: int, heads: int, *, rotary_base: float | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        head_width = _head_width(width, heads)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.rotary = None if rotary_base is None else Rotary(head_width, base=rotary_base)

    def forward(
        self,
        x: Float[Tensor, "B M D"],
        *,
        mask: Visible,
        positions: Int[Tensor, "#B M"] | None = None,
        angles: Angles | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "B M D"]:
        """Mixes tokens along M.

        Args:
            x: Tokens.
            mask: Over the keys: M of them, or all those of the cache.
            positions: Of each token, for rotary; None for 0, 1, 2...
            angles: Of these positions where they are known, see `Rotary.angles`.
            cache: Where earlier keys and values are kept.
        """
        heads = self.qkv(x).unflatten(-1, (3 * self.heads, -1))
        turned, v = heads.split([2 * self.heads, self.heads], dim=2)
        if self.rotary is not None:
            places = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions
            angles = self.rotary.angles(places) if angles is None else angles
            turned = angles.turn(turned)
        q, k = turned.chunk(2, dim=2)
        if cache is not None:
            k, v = cache.update(k, v)
        mixed = attend(q, k, v, mask=mask, dropout=self.dropout if self.training else 0.0)
        return self.out(mixed.flatten(2))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to a memory of another width.

    Args:
        width: Of the tokens that ask.
        heads: Number of heads; divides `width`.
        memory_width: Of the memory; None for `width`.
        dropout: On attention weights, in training only.
    """

    def __init__(self, width: int, heads: int, *, memory_width: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        _head_width(width, heads)
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(memory_width or width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Float[Tensor, "B M D"], memory: Float[Tensor, "B N E"], *, mask: Mask
    ) -> Float[Tensor, "B M D"]:
        """What each token reads from the memory; zeros where it may see nothing of it."""
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k, v = self.kv(memory).unflatten(-1, (2, self.heads, -1)).unbind(2)
        mixed = attend(q, k, v, mask=mask, dropout=self.dropout if self.training else 0.0)
        return self.out(mixed.flatten(2))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer 2020): down(silu(gate x) * up x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Each token by itself."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then cross-attention if there is a memory, then feed-forward.

    Args:
        width: Of tokens.
        heads: Number of heads.
        feed_forward: A module on [B M D]; None for a SwiGLU of `hidden`.
        hidden: Hidden width of that SwiGLU; None for about 8/3 of `width`.
        memory_width: Width of the memory that cross-attention reads; None for no cross-attention.
        rotary_base: None for no rotary positions.
        dropout: On attention weights and residual branches, in training only.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        feed_forward: nn.Module | None = None,
        hidden: int | None = None,
        memory_width: int | None = None,
        rotary_base: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = SelfAttention(width, heads, rotary_base=rotary_base, dropout=dropout)
        self.cross_norm = None if memory_width is None else RMSNorm(width)
        self.cross = (
            None if memory_width is None else CrossAttention(width, heads, memory_width=memory_width, dropout=dropout)
        )
        self.feed_forward_norm = RMSNorm(width)
        self.feed_forward = feed_forward or SwiGLU(width, hidden or 8 * ((8 * width // 3 + 7) // 8))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "B M D"],
        *,
        mask: Mask,
        memory: Float[Tensor, "B N E"] | None = None,
        memory_mask: Mask | None = None,
        positions: Int[Tensor, "#B M"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "B M D"]:
        """One layer.

        Args:
            x: Tokens.
            mask: For self-attention.
            memory: For cross-attention; required where the block has one.
            memory_mask: For cross-attention; None for all of the memory.
            positions: Of tokens, for rotary.
            cache: For self-attention.
        """
        x = x + self.dropout(self.attention(self.attention_norm(x), mask=mask, positions=positions, cache=cache))
        if self.cross is not None and self.cross_norm is not None:
            assert memory is not None, "this block reads a memory and was given none"
            x = x + self.dropout(self.cross(self.cross_norm(x), memory, mask=memory_mask or Full()))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))  # type: ignore[no-any-return]


def masked_mean(values: Float[Tensor, "*batch N D"], mask: Bool[Tensor, "*batch N"]) -> Float[Tensor, "*batch D"]:
    """Mean over the marked tokens; zeros where none is marked."""
    weight = mask.unsqueeze(-1).to(values.dtype)
    return (values.masked_fill(~mask.unsqueeze(-1), 0)).sum(-2) / weight.sum(-2).clamp(min=1)


def _head_width(width: int, heads: int) -> int:
    if width % heads:
        raise ValueError(f"width must be a multiple of heads, got width={width}, heads={heads}")
    return width // heads
