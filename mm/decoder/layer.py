"""One layer of the decoder, and how a row's slot becomes a vector."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm import ontology
from mm.attention import Visible
from mm.batch import SLOT_KINDS, Slots, Tokens
from mm.decoder.cache import MemoryKeys, RowMemory
from mm.decoder.experts import MixtureOfExperts
from mm.decoder.router import Routing
from mm.transformer import Angles, CrossAttention, KeyValueCache, RMSNorm, SelfAttention


class SlotEmbedding(nn.Module):
    """What a row is about, as one vector: the sum of five embeddings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Embedding(len(SLOT_KINDS), width)
        self.code = nn.Embedding(1 + len(ontology.CODES), width)
        self.side = nn.Embedding(len(ontology.SIDES), width)
        self.change = nn.Embedding(len(ontology.CHANGES), width)
        self.grade = nn.Embedding(len(ontology.GRADES), width)

    def forward(self, slots: Slots) -> Float[Tensor, "M D"]:
        """One vector a row."""
        parts = [self.kind(slots.kind), self.code(slots.code), self.side(slots.side)]
        return torch.stack([*parts, self.change(slots.change), self.grade(slots.grade)]).sum(0)


class MemoryAttention(CrossAttention):
    """Cross-attention whose keys and values are made apart, once for all the rows and steps that read them."""

    def project(self, memory: Tokens, rows: Int[Tensor, " M"] | None) -> MemoryKeys:
        """Keys and values of each memory, then dealt out to rows."""
        kv, mask = self.kv(memory.values), memory.mask
        if rows is not None:
            # Dealt out in one piece: the backward of indexing is many times slower on strided halves.
            kv, mask = kv.index_select(0, rows), mask.index_select(0, rows)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).unbind(2)
        return MemoryKeys(k, v, mask)

    def read(self, x: Float[Tensor, "M L D"], memory: RowMemory) -> Float[Tensor, "M L D"]:
        """What each token reads from its row's memory."""
        q = self.q(x).unflatten(-1, (self.heads, -1))
        mixed = memory.attend(q, dropout=self.dropout if self.training else 0.0)
        out: Tensor = self.out(mixed.flatten(2))
        return out


class GatedMemoryAttention(nn.Module):
    """What a finished language model reads from a memory (Alayrac et al. 2022, Flamingo): x + tanh(gate) * read(x).

    The gate starts at 0, so that at first the model is what it was, bit by bit.
    """

    def __init__(self, width: int, heads: int, *, memory_width: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps=norm_eps)
        self.attention = MemoryAttention(width, heads, memory_width=memory_width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "M L D"], memory: RowMemory) -> Float[Tensor, "M L D"]:
        """Each token by itself; one whose row has no memory stays as it is."""
        read = self.attention.read(self.norm(x), memory)
        return x + (self.gate.tanh() * read).to(x.dtype)


class DecoderLayer(nn.Module):
    """Pre-norm: self-attention, cross-attention to the memory, mixture of experts."""

    def __init__(self, width: int, heads: int, *, memory_width: int, experts: MixtureOfExperts, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = SelfAttention(width, heads, rotary_base=10000.0, dropout=dropout)
        self.cross_norm = RMSNorm(width)
        self.cross = MemoryAttention(width, heads, memory_width=memory_width, dropout=dropout)
        self.experts_norm = RMSNorm(width)
        self.experts = experts
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "M L D"],
        *,
        real: Int[Tensor, " T"] | None,
        mask: Visible,
        memory: RowMemory,
        angles: Angles,
        cache: KeyValueCache | None = None,
    ) -> tuple[Float[Tensor, "M L D"], Routing]:
        """One layer; `real` are the places of real tokens in the flattened rows, the only ones routed; None: all."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask=mask, angles=angles, cache=cache))
        x = x + self.dropout(self.cross.read(self.cross_norm(x), memory))
        flat = x.flatten(0, 1)
        if real is None:
            mixed, routing = self.experts(self.experts_norm(flat))
            return (flat + self.dropout(mixed).to(flat.dtype)).view_as(x), routing
        mixed, routing = self.experts(self.experts_norm(flat.index_select(0, real)))
        return flat.index_add(0, real, self.dropout(mixed).to(flat.dtype)).view_as(x), routing
