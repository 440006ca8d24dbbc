"""The decoder: a prompt with a slot and a memory in, one sentence out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm.attention import SPLIT_K_PAGE, Causal, Keys, Mask
from mm.batch import SPECIAL_IDS, Padded, Slots, Tokens, Writing
from mm.decoder.cache import DecodingState, LayerCache, MemoryKeys
from mm.decoder.experts import MixtureOfExperts
from mm.decoder.generate import GREEDY, Generated, Sampling, write
from mm.decoder.layer import DecoderLayer, SlotEmbedding
from mm.decoder.paged import PagedCache, Pass
from mm.decoder.router import Gates, Router, Routing
from mm.transformer import KeyValueCache, RMSNorm

WHOLE_ROWS = Causal()


@dataclass(frozen=True)
class DecoderOutput:
    """What training needs. T counts the real target tokens of all rows, in order; there is no padding.

    Attributes:
        logits: Of each target token, given everything before it.
        targets: The target tokens themselves: `F.cross_entropy(logits, targets)` is the language loss.
        rows: The row of `Writing` that each belongs to.
        load_balancing_loss: Mean over layers; 1 where routing is uniform.
        z_loss: Mean over layers.
        expert_load: Share of the choices that each expert got, layer by layer.
        dropped: Share of the choices dropped for capacity, layer by layer.
        routings: The routers' choices, layer by layer, for each of R routed tokens (prompts and targets).
        routed_rows: The row of `Writing` that each routed token belongs to.
    """

    logits: Float[Tensor, "T V"]
    targets: Int[Tensor, " T"]
    rows: Int[Tensor, " T"]
    load_balancing_loss: Float[Tensor, ""]
    z_loss: Float[Tensor, ""]
    expert_load: Float[Tensor, "depth E"]
    dropped: Float[Tensor, " depth"]
    routings: tuple[Routing, ...]
    routed_rows: Int[Tensor, " R"]


class MoEDecoder(nn.Module):
    """Writes one sentence a row: language, slot and perhaps a question in; sentence and `<end>` out.

    RMSNorm, rotary positions, top-k of SwiGLU experts beside a shared one, cross-attention to a memory in every
    layer. The slot's embedding is added where the prompt has its `<slot>` token. Output weights are the input
    embedding's. Padding is never routed, never counted and never changes a result.

    Example:
        output = decoder(writing, memory, rows=writing.study)
        loss = F.cross_entropy(output.logits, output.targets) + 0.01 * output.load_balancing_loss
        texts = [tokenizer.decode(row) for row in decoder.generate(writing, memory, rows=writing.study).rows()]
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
        selection_bias: bool = False,
        capacity_factor: float | None = None,
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
            selection_bias: Balance by a bias on the choice in place of a loss, see `Router`.
            capacity_factor: Room of an expert in training, see `Router`; None: nothing is dropped.
            dropout: On attention weights and residual branches, in training.

        Raises:
            ValueError: Numbers that don't fit together; the message names the argument.
        """
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.width, self.vocab_size = width, vocab_size
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
                selection_bias=selection_bias,
                capacity_factor=capacity_factor,
            )
            layer = DecoderLayer(width, heads, memory_width=memory_width or width, experts=experts, dropout=dropout)
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

    def forward(self, writing: Writing, memory: Tokens, *, rows: Int[Tensor, " M"] | None = None) -> DecoderOutput:
        """Reads prompts and targets at once and predicts every target token.

        Args:
            writing: Prompts, slots and targets; `writing.study` is not looked at.
            memory: What the rows may read: one memory a row, or, with `rows`, any number of them.
            rows: Row m reads memory `rows[m]`; None: row m reads memory m. Pass `writing.study` and one memory a
                study: keys and values are then projected once a study, not once a row.

        Raises:
            ValueError: There are no targets.
        """
        if writing.target is None:
            raise ValueError("writing.target is needed to train the decoder, got None; `generate` works without")
        prompt, target = writing.prompt, writing.target
        ids, lengths = _pack(prompt, target)
        hidden, routings = self._run(ids, lengths, writing.slots, self._project(memory, rows))
        row, place = target.mask.nonzero(as_tuple=True)
        behind = row * hidden.shape[1] + prompt.lengths[row] - 1 + place
        logits = self._logits(hidden.flatten(0, 1).index_select(0, behind))
        return DecoderOutput(
            logits=logits,
            targets=target.values[row, place],
            rows=row,
            load_balancing_loss=torch.stack([routing.load_balancing_loss for routing in routings]).mean(),
            z_loss=torch.stack([routing.z_loss for routing in routings]).mean(),
            expert_load=torch.stack([routing.load for routing in routings]),
            dropped=torch.stack([routing.dropped for routing in routings]),
            routings=tuple(routings),
            routed_rows=torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths),
        )

    @torch.no_grad()
    def generate(
        self,
        writing: Writing,
        memory: Tokens,
        *,
        sampling: Sampling = GREEDY,
        rows: Int[Tensor, " M"] | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> Generated:
        """Writes every row, with cached keys and values; call it in evaluation mode.

        Args:
            writing: Prompts and slots; `target` is not looked at.
            memory: As in `forward`.
            sampling: Greedy by default.
            rows: As in `forward`.
            decode: The tokenizer's; needed for stop strings.
        """
        prompt = writing.prompt
        capacity = prompt.values.shape[1] + sampling.max_new_tokens
        start = torch.zeros_like(prompt.lengths)
        caches = tuple(LayerCache(start, capacity=capacity) for _ in self.layers)
        keys = self._project(memory, rows)
        hidden, _ = self._run(prompt.values, prompt.lengths, writing.slots, keys, caches=caches)
        last = hidden[torch.arange(len(hidden), device=hidden.device), prompt.lengths - 1]
        state = DecodingState(caches, keys, start).advance(prompt.lengths)
        return write(self, self._logits(last), state, sampling=sampling, decode=decode)

    def step(self, ids: Int[Tensor, " M"], state: DecodingState) -> tuple[Float[Tensor, "M V"], DecodingState]:
        """Logits behind one more token a row, and the state after it."""
        x = self._embed(ids[:, None])
        keys = torch.arange(state.layers[0].extent + 1, device=ids.device)
        mask = Keys(keys <= state.lengths[:, None])
        real = torch.arange(len(ids), device=ids.device)
        for layer, memory, cache in zip(self._layers(), state.memory, state.layers, strict=True):
            x, _ = layer(x, real=real, mask=mask, memory=memory, positions=state.lengths[:, None], cache=cache)
        return self._logits(x[:, 0]), state.advance(state.lengths + 1)

    def paged_cache(self, *, num_blocks: int, page_size: int) -> PagedCache:
        """Room for keys and values of all layers; for the engine.

        Raises:
            ValueError: The paged kernel on CUDA can't read pages of this size.
        """
        device = self.embedding.weight.device
        if device.type == "cuda" and page_size % SPLIT_K_PAGE:
            raise ValueError(f"page_size must be a multiple of {SPLIT_K_PAGE} on CUDA, got {page_size}")
        return PagedCache(len(self.layers), num_blocks=num_blocks, page_size=page_size, device=device)

    @torch.no_grad()
    def remember(self, memory: Tokens) -> tuple[MemoryKeys, ...]:
        """Every layer's keys and values of some memories; for the engine."""
        return self._project(memory, None)

    @torch.no_grad()
    def read(
        self,
        ids: Int[Tensor, "M L"],
        cache: PagedCache,
        now: Pass,
        *,
        slots: Slots | None,
        memory: tuple[MemoryKeys, ...],
    ) -> Float[Tensor, "M V"]:
        """Some more tokens of some rows, their past in pages; for the engine.

        Args:
            ids: New tokens, padded on the right.
            cache: Gets their keys and values.
            now: Where they belong.
            slots: Of the rows; None where no prompt is among the new tokens.
            memory: Of the rows.

        Returns:
            Logits behind each row's last new token.
        """
        hidden, _ = self._run(
            ids, now.counts, slots, memory, caches=cache.bind(now), mask=now.mask(), positions=now.positions
        )
        return self._logits(hidden[torch.arange(len(ids), device=ids.device), now.counts - 1])

    def _run(
        self,
        ids: Int[Tensor, "M L"],
        lengths: Int[Tensor, " M"],
        slots: Slots | None,
        memory: tuple[MemoryKeys, ...],
        *,
        caches: Sequence[KeyValueCache] | None = None,
        mask: Mask = WHOLE_ROWS,
        positions: Int[Tensor, "#M L"] | None = None,
    ) -> tuple[Float[Tensor, "M L D"], list[Routing]]:
        """All layers over rows padded on the right: causal attention alone keeps padding out of sight."""
        x = self._embed(ids)
        if slots is not None:
            here = (ids == SPECIAL_IDS.slot)[:, :, None]
            x = x + here * self.slot(slots)[:, None]
        places = torch.arange(ids.shape[1], device=ids.device)
        positions = places[None] if positions is None else positions
        real = (places < lengths[:, None]).flatten().nonzero()[:, 0]
        routings = []
        for index, layer in enumerate(self._layers()):
            cache = None if caches is None else caches[index]
            x, routing = layer(x, real=real, mask=mask, memory=memory[index], positions=positions, cache=cache)
            routings.append(routing)
        return x, routings

    def routers(self) -> tuple[Router, ...]:
        """The routers, layer by layer."""
        return tuple(layer.experts.router for layer in self._layers())

    def _layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def _embed(self, ids: Int[Tensor, "M L"]) -> Float[Tensor, "M L D"]:
        """Token vectors of unit variance; their table is small because it is the output layer too."""
        vectors: Tensor = self.embedding(ids) * self.width**0.5
        return vectors

    def _logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        return F.linear(self.norm(hidden), self.embedding.weight)

    def _project(self, memory: Tokens, rows: Int[Tensor, " M"] | None) -> tuple[MemoryKeys, ...]:
        return tuple(layer.cross.project(memory, rows) for layer in self._layers())


def _pack(prompt: Padded, target: Padded) -> tuple[Int[Tensor, "M L"], Int[Tensor, " M"]]:
    """Each row's prompt, then its target without the last token (which is only ever predicted), then padding."""
    lengths = (prompt.lengths + target.lengths - 1).clamp(min=0)
    both = torch.cat([prompt.values, target.values], dim=1)
    place = torch.arange(int(lengths.max()), device=both.device)[None]
    start = prompt.lengths[:, None]
    source = torch.where(place < start, place, prompt.values.shape[1] + place - start)
    ids = both.gather(1, source.clamp(max=both.shape[1] - 1))
    return ids.masked_fill(place >= lengths[:, None], SPECIAL_IDS.pad), lengths
