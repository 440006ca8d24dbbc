"""Self-attention of the open language models: fewer heads for keys than for queries, perhaps normed before turned."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from mm.attention import Visible, attend
from mm.transformer import Angles, KeyValueCache, RMSNorm

QueryKeyNorm = Literal["none", "head", "all"]


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions.

    Args:
        width: Of tokens.
        heads: Of queries.
        key_heads: Of keys and values; divides `heads`.
        head_width: Of one head.
        norm: RMS norm of queries and keys before they are turned: "head" over each head (Qwen3), "all" over all
            heads together (OLMoE), "none" (Llama, Mixtral).
        norm_eps: Of that norm.

    Raises:
        ValueError: `key_heads` doesn't divide `heads`.
    """

    def __init__(
        self, width: int, *, heads: int, key_heads: int, head_width: int, norm: QueryKeyNorm, norm_eps: float
    ) -> None:
        super().__init__()
        if heads % key_heads:
            raise ValueError(f"key_heads must divide heads, got key_heads={key_heads}, heads={heads}")
        self.head_width = head_width
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.k = nn.Linear(width, key_heads * head_width, bias=False)
        self.v = nn.Linear(width, key_heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.norm: QueryKeyNorm = norm
        self.q_norm = self.k_norm = None
        if norm != "none":
            self.q_norm = RMSNorm(head_width if norm == "head" else heads * head_width, eps=norm_eps)
            self.k_norm = RMSNorm(head_width if norm == "head" else key_heads * head_width, eps=norm_eps)

    def forward(
        self, x: Float[Tensor, "B M D"], *, mask: Visible, angles: Angles, cache: KeyValueCache | None = None
    ) -> Float[Tensor, "B M D"]:
        """Mixes tokens along M.

        Args:
            x: Tokens.
            mask: Over the keys: M of them, or all those of the cache.
            angles: Of each token's position.
            cache: Where earlier keys and values are kept, by key head.
        """
        q, k, v = self._project(x, angles)
        if cache is not None:
            k, v = cache.update(k, v)
        out: Tensor = self.out(attend(q, k, v, mask=mask).flatten(2))
        return out

    def _project(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part(x).unflatten(-1, (-1, self.head_width)) for part in (self.q, self.k, self.v))
        return angles.turn(self._normed(q, self.q_norm)), angles.turn(self._normed(k, self.k_norm)), v

    def _normed(self, heads: Float[Tensor, "B M H K"], norm: RMSNorm | None) -> Float[Tensor, "B M H K"]:
        if norm is None:
            return heads
        out: Tensor = norm(heads.flatten(2)).view_as(heads) if self.norm == "all" else norm(heads)
        return out
