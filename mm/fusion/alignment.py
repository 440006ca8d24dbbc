"""Attention across modalities: each reads all the others, whichever there are.

The result feeds the decoder. It never feeds an embedding: see `mm.fusion.adapters`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mm.attention import Keys
from mm.batch import BySource, Tokens
from mm.fusion.adapters import mean
from mm.ontology import SOURCES
from mm.transformer import CrossAttention, RMSNorm, SwiGLU


class CrossLayer(nn.Module):
    """Pre-norm cross-attention to another set of tokens, then feed-forward."""

    def __init__(self, width: int, heads: int, *, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.attention = CrossAttention(width, heads, dropout=dropout)
        self.feed_forward_norm = RMSNorm(width)
        self.feed_forward = SwiGLU(width, hidden)

    def forward(self, x: Tokens, other: Tokens | None) -> Tokens:
        """Tokens that have read `other`; None, or a study that has none of it, leaves them to themselves."""
        values = x.values
        if other is not None:
            values = values + self.attention(self.norm(values), self.norm(other.values), mask=Keys(other.mask))
        return Tokens(values + self.feed_forward(self.feed_forward_norm(values)), x.mask)


class CrossModalAlignment(nn.Module):
    """Bidirectional cross-attention over the token sets of a study; any subset may be missing.

    All modalities share the layers; an embedding says which one a token is of.

    Args:
        width: Of all tokens; the encoders' tokens are adapted to it.
        depth: Number of layers; with 0 nothing is read, and the token sets are only put side by side.
        heads: Of attention; divides `width`.
        hidden: Of the feed-forward; None for twice the width.
        dropout: On attention weights, in training only.
    """

    def __init__(
        self, width: int = 192, *, depth: int = 1, heads: int = 6, hidden: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if depth < 0:
            raise ValueError(f"depth must be at least 0, got {depth}")
        self.width = width
        self.kind = nn.Embedding(len(SOURCES), width)
        self.layers = nn.ModuleList(
            CrossLayer(width, heads, hidden=hidden or 2 * width, dropout=dropout) for _ in range(depth)
        )
        self.norm = RMSNorm(width)
        self.matches = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 1))
        nn.init.trunc_normal_(self.kind.weight, std=0.02)

    def forward(self, tokens: BySource[Tokens]) -> BySource[Tokens]:
        """Each modality's tokens after reading the others'.

        Args:
            tokens: Adapted to `width`.
        """
        marked = {
            source: Tokens(item.values + self.kind.weight[SOURCES.index(source)].to(item.values.dtype), item.mask)
            for source, item in tokens.items()
        }
        for layer in self.layers:
            marked = {
                source: layer(item, concatenate([other for name, other in marked.items() if name != source]))
                for source, item in marked.items()
            }
        normed = {source: Tokens(self.norm(item.values), item.mask) for source, item in marked.items()}
        return BySource(**normed)

    def match(self, first: Tokens, second: Tokens) -> Float[Tensor, " B"]:
        """Logit that two token sets are of one study; each reads the other, token by token."""
        for layer in self.layers:
            first, second = layer(first, second), layer(second, first)
        pooled = [mean(Tokens(self.norm(item.values), item.mask)) for item in (first, second)]
        return self.matches(torch.cat(pooled, dim=-1)).float()[:, 0]  # type: ignore[no-any-return]

    def matching_loss(
        self,
        first: Tokens,
        second: Tokens,
        *,
        similarity: Float[Tensor, "B B"],
        same: Bool[Tensor, "B B"] | None = None,
    ) -> Float[Tensor, ""]:
        """Pairs against hard negatives of both sides (Li et al. 2021, ALBEF, section 3.2).

        Args:
            first: Token sets.
            second: Their partners.
            similarity: Of embeddings, scaled by the inverse temperature: the likelier a wrong partner is to be
                taken for the right one, the oftener it is drawn.
            same: Symmetric; studies whose partners are the same, none of which is a wrong one. A study without a
                wrong partner is trained on as a pair only. None: each has its own.

        Raises:
            ValueError: A batch of one has no negatives.
        """
        if len(similarity) < 2:
            raise ValueError("matching needs at least 2 studies a batch, got 1")
        right = torch.arange(len(similarity), device=similarity.device)
        alike = right[:, None] == right
        if same is not None:
            alike = alike | same
        some = (~alike).any(1).nonzero()[:, 0]
        weights = similarity.detach().float().masked_fill(alike, -torch.inf)
        wrong_second, wrong_first = right[:0], right[:0]
        if len(some):
            wrong_second = torch.multinomial(weights[some].softmax(1), 1)[:, 0]
            wrong_first = torch.multinomial(weights.T[some].softmax(1), 1)[:, 0]
        firsts, seconds = torch.cat([right, some, wrong_first]), torch.cat([right, wrong_second, some])
        logits = self.match(select(first, firsts), select(second, seconds))
        labels = torch.zeros_like(logits)
        labels[: len(right)] = 1
        return F.binary_cross_entropy_with_logits(logits, labels)


def concatenate(parts: list[Tokens]) -> Tokens | None:
    """All tokens of each study in one sequence; None of nothing."""
    if not parts:
        return None
    return Tokens(torch.cat([item.values for item in parts], dim=1), torch.cat([item.mask for item in parts], dim=1))


def select(tokens: Tokens, rows: Int[Tensor, " R"]) -> Tokens:
    """Some of the studies."""
    return Tokens(tokens.values[rows], tokens.mask[rows])


def spread(tokens: Tokens, rows: Int[Tensor, " R"], *, size: int) -> Tokens:
    """The opposite of `select`: each row's tokens at its study of `size`; nothing is valid elsewhere."""
    values = tokens.values.new_zeros(size, *tokens.values.shape[1:]).index_copy(0, rows, tokens.values)
    mask = torch.zeros(size, tokens.mask.shape[1], dtype=torch.bool, device=rows.device)
    return Tokens(values, mask.index_copy(0, rows, tokens.mask))
