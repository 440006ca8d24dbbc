"""Our own decoder: cross-attention to the memory in every layer, and experts."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm.attention import Causal, Visible
from mm.batch import Slots, Tokens
from mm.decoder.cache import MemoryKeys, RowMemory
from mm.decoder.experts import MixtureOfExperts
from mm.decoder.groups import GroupLimit
from mm.decoder.layer import DecoderLayer, SlotEmbedding
from mm.decoder.paged import PagedCache
from mm.decoder.router import Gates, Router, Routing
from mm.decoder.sentences import SentenceDecoder, places_of
from mm.transformer import KeyValueCache, RMSNorm


class MoEDecoder(SentenceDecoder):
    """RMSNorm, rotary positions, top-k of SwiGLU experts beside a shared one, cross-attention in every layer.

    Output weights are the input embedding's.

    A dense decoder is the mixture of one: `num_experts=1, experts_per_token=1, gates="softmax",
    shared_expert_width=0`. Its one gate is a softmax over one score and so exactly 1: each layer then is the plain
    SwiGLU of `expert_width`. (Its router learns nothing, and its load-balancing loss is the constant 1.)
    """

    def __init__(
        self,
        vocab_size: int = 2048,
        *,
        width: int = 192,
        depth: int = 3,
        heads: int = 6,
        memory_width: int | None = None,
        num_experts: int = 8,
        experts_per_token: int = 2,
        expert_width: int = 128,
        shared_expert_width: int = 128,
        gates: Gates = "renormalised",
        scale: float = 1.0,
        groups: GroupLimit | None = None,
        shared_gate: bool = False,
        selection_bias: bool = False,
        capacity_factor: float | None = None,
        evaluation_capacity_factor: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        """Makes a decoder.

        Args:
            vocab_size: Ids of the tokenizer, or more.
            width: Of tokens.
            depth: Number of layers.
            heads: Attention heads; divide `width` into even parts.
            memory_width: Width of the memory; None: the same as `width`.
            num_experts: Routed experts a layer.
            experts_per_token: How many of them a token visits.
            expert_width: Hidden width of a routed expert.
            shared_expert_width: Hidden width of the expert that every token visits; 0: none.
            gates: "renormalised", "softmax", "sigmoid" or "sigmoid_renormalised", see `Router`.
            scale: Times the gates, see `Router`.
            groups: Limits a token's choice to its best groups of experts, see `GroupLimit`; None: all experts.
            shared_gate: Whether a sigmoid of the token weighs the shared expert.
            selection_bias: Balance by a bias on the choice in place of a loss, see `Router`.
            capacity_factor: Room of an expert in training, see `Router`; None: nothing is dropped.
            evaluation_capacity_factor: The same in evaluation, where a row's text then depends on its neighbours and
                on how it is cut into steps: for measuring what dropping costs. The engine refuses it.
            dropout: On attention weights and residual branches, in training.

        Raises:
            ValueError: Numbers that don't fit together; the message names the argument.
        """
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if experts_per_token == num_experts and (selection_bias or groups is not None):
            named = "selection_bias" if selection_bias else "groups"
            raise ValueError(
                f"{named} needs a choice: experts_per_token must be below num_experts {num_experts}, "
                f"got {experts_per_token}"
            )
        self.width, self.vocab_size, self.memory_width = width, vocab_size, memory_width or width
        self.evaluation_capacity_factor = evaluation_capacity_factor
        self.embedding = nn.Embedding(vocab_size, width)
        self.slot = SlotEmbedding(width)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            experts = MixtureOfExperts(
                width,
                num_experts=num_experts,
                experts_per_token=experts_per_token,
                expert_width=expert_width,
                shared_expert_width=shared_expert_width,
                gates=gates,
                scale=scale,
                groups=groups,
                shared_gate=shared_gate,
                selection_bias=selection_bias,
                capacity_factor=capacity_factor,
                evaluation_capacity_factor=evaluation_capacity_factor,
            )
            layer = DecoderLayer(width, heads, memory_width=self.memory_width, experts=experts, dropout=dropout)
            self.layers.append(layer)
        self.norm = RMSNorm(width)
        self.init_weights()

    def init_weights(self) -> None:
        """Fresh weights: variance-preserving, residual branches scaled down by the root of their number."""
        branches = (3 * len(self.layers)) ** -0.5
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5 if module is not self.embedding else self.width**-0.5)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for layer in self._layers():
            layer.experts.router.init_weights()
            layer.experts.experts.init_weights(output_scale=branches)
            outputs = [layer.attention.out, layer.cross.out]
            outputs += [layer.experts.shared.down] if layer.experts.shared is not None else []
            with torch.no_grad():
                for output in outputs:
                    output.weight.mul_(branches)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def routers(self) -> tuple[Router, ...]:
        """The routers, layer by layer."""
        return tuple(layer.experts.router for layer in self._layers())

    def paged_cache(self, *, num_blocks: int, page_size: int | None) -> PagedCache:
        """Room for keys and values of all layers; for the engine.

        Raises:
            ValueError: Rows would depend on their neighbours, or the pages don't suit the kernel on CUDA.
        """
        if self.evaluation_capacity_factor is not None:
            raise ValueError(
                "evaluation_capacity_factor must be null to run in an engine, where no row may depend on its "
                f"neighbours; got {self.evaluation_capacity_factor}"
            )
        return super().paged_cache(num_blocks=num_blocks, page_size=page_size)

    def _run(
        self,
        ids: Int[Tensor, "M L"],
        lengths: Int[Tensor, " M"] | None,
        slots: Slots | None,
        memory: tuple[RowMemory, ...],
        *,
        caches: Sequence[KeyValueCache] | None = None,
        mask: Visible | None = None,
        positions: Int[Tensor, "#M L"] | None = None,
    ) -> tuple[Float[Tensor, "M L D"], list[Routing]]:
        """See `SentenceDecoder`."""
        # Token vectors of unit variance; their table is small because it is the output layer too.
        x = self._mark(self.embedding(ids) * self.width**0.5, ids, slots)
        positions = torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions
        mask, real, routings = mask or Causal(), None if lengths is None else places_of(ids, lengths), []
        rotary = self._layers()[0].attention.rotary
        assert rotary is not None, "made with rotary positions"
        angles = rotary.angles(positions)
        for index, layer in enumerate(self._layers()):
            cache = None if caches is None else caches[index]
            x, routing = layer(x, real=real, mask=mask, memory=memory[index], angles=angles, cache=cache)
            routings.append(routing)
        return x, routings

    def _project(
        self, memory: Tokens, rows: Int[Tensor, " M"] | None
    ) -> tuple[tuple[MemoryKeys, ...], tuple[Routing, ...]]:
        return tuple(layer.cross.project(memory, rows) for layer in self._layers()), ()

    def _last(self) -> tuple[RMSNorm, Tensor]:
        return self.norm, self.embedding.weight

    def _layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
