"""What every decoder of the system does alike: from prompts and a memory to losses, sentences, and pages."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import astuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm.attention import Visible
from mm.batch import SPECIAL_IDS, Slots, Tokens, Writing
from mm.decoder.cache import DecodingState, LayerCache, MemoryKeys, RowMemory
from mm.decoder.generate import GREEDY, Generated, Sampling, write
from mm.decoder.layer import SlotEmbedding
from mm.decoder.memory import StepMemory
from mm.decoder.output import DecoderOutput, pack
from mm.decoder.paged import PagedCache, Step, checked_page_size, visible
from mm.decoder.prepared import Laid, can_lay, prepared
from mm.decoder.router import Router, Routing
from mm.transformer import KeyValueCache, RMSNorm


class SentenceDecoder(nn.Module, ABC):
    """Writes one sentence a row: language, slot and perhaps a question in; sentence and `<end>` out.

    The slot's embedding is added where the prompt has its `<slot>` token. Padding is never routed, never counted and
    never changes a result.

    Example:
        output = decoder(writing, memory, rows=writing.study)
        loss = output.cross_entropy() + 0.01 * output.load_balancing_loss
        texts = [tokenizer.decode(row) for row in decoder.generate(writing, memory, rows=writing.study).rows()]

    Attributes:
        width: Of tokens.
        memory_width: Of the memory's tokens.
        vocab_size: Ids that it knows.
        window: A token sees itself and `window - 1` tokens before it; None: all.
        context: Most tokens of a row; None: any number.
    """

    width: int
    memory_width: int
    vocab_size: int
    slot: SlotEmbedding
    window: int | None = None
    context: int | None = None
    _output: Callable[[Tensor], Tensor] | None = None

    @abstractmethod
    def routers(self) -> tuple[Router, ...]:
        """The routers, layer by layer; none where there are no experts."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Number of layers."""

    @abstractmethod
    def _project(
        self, memory: Tokens, rows: Int[Tensor, " M"] | None
    ) -> tuple[tuple[MemoryKeys, ...], tuple[Routing, ...]]:
        """Keys and values that rows read of their memories, and the memory's own routings where it has some."""

    @abstractmethod
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
    ) -> tuple[Float[Tensor, "M L D"], Sequence[Routing]]:
        """All layers over rows padded on the right.

        Args:
            ids: Tokens.
            lengths: Of the rows; None: all full.
            slots: Of the rows; None where no prompt is among the tokens.
            memory: Of the rows, as `_project` makes it.
            caches: Where earlier keys and values are, layer by layer.
            mask: Over their keys; None: the rows are whole, and causal attention keeps padding out of sight.
            positions: Of the tokens; None: 0, 1, 2...
        """

    @abstractmethod
    def _last(self) -> tuple[RMSNorm, Tensor]:
        """The last norm and the weights of the output layer."""

    def forward(self, writing: Writing, memory: Tokens, *, rows: Int[Tensor, " M"] | None = None) -> DecoderOutput:
        """Reads prompts and targets at once and predicts every target token.

        Args:
            writing: Prompts, slots and targets; `writing.study` is not looked at.
            memory: What the rows may read: one memory a row, or, with `rows`, any number of them.
            rows: Row m reads memory `rows[m]`; None: row m reads memory m. Pass `writing.study` and one memory a
                study: keys and values are then made once a study, not once a row.

        Raises:
            ValueError: There are no targets.
        """
        if writing.target is None:
            raise ValueError("writing.target is needed to train the decoder, got None; `generate` works without")
        prompt, target = writing.prompt, writing.target
        ids, lengths = pack(prompt, target)
        keys, memory_routings = self._project(memory, rows)
        hidden, routings = self._run(ids, lengths, writing.slots, keys)
        row, place = target.mask.nonzero(as_tuple=True)
        behind = row * hidden.shape[1] + prompt.lengths[row] - 1 + place
        norm, weight = self._last()
        return DecoderOutput.of(
            norm(hidden.flatten(0, 1).index_select(0, behind)),
            weight,
            targets=target.values[row, place],
            rows=row,
            routings=routings,
            routed_rows=torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths),
            memory_routings=memory_routings,
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
        logits, state = self.begin(writing, memory, room=sampling.max_new_tokens, rows=rows)
        return write(self, logits, state, sampling=sampling, decode=decode)

    def begin(
        self, writing: Writing, memory: Tokens, *, room: int, rows: Int[Tensor, " M"] | None = None
    ) -> tuple[Float[Tensor, "M V"], DecodingState]:
        """Reads the prompts: logits behind each, and the state for `step`.

        Args:
            writing: Prompts and slots; `target` is not looked at.
            memory: As in `forward`.
            room: Tokens that a row may have behind its prompt.
            rows: As in `forward`.
        """
        prompt = writing.prompt
        keys, _ = self._project(memory, rows)
        state = self._open(keys, prompt.lengths, capacity=prompt.values.shape[1] + room)
        hidden = self._continue(prompt.values, prompt.lengths, writing.slots, state)
        last = hidden[torch.arange(len(hidden), device=hidden.device), prompt.lengths - 1]
        return self._logits(last), state.advance(state.lengths + prompt.lengths)

    def step(self, ids: Int[Tensor, " M"], state: DecodingState) -> tuple[Float[Tensor, "M V"], DecodingState]:
        """Logits behind one more token a row, and the state after it."""
        hidden = self._continue(ids[:, None], None, None, state)
        return self._logits(hidden[:, 0]), state.advance(state.lengths + 1)

    def _open(self, memory: tuple[MemoryKeys, ...], lengths: Int[Tensor, " M"], *, capacity: int) -> DecodingState:
        """A state before the first token of rows, with room for `capacity` of them."""
        start = torch.zeros_like(lengths)
        return DecodingState(tuple(LayerCache(start, capacity=capacity) for _ in range(self.depth)), memory, start)

    def _continue(
        self, ids: Int[Tensor, "M L"], lengths: Int[Tensor, " M"] | None, slots: Slots | None, state: DecodingState
    ) -> Float[Tensor, "M L D"]:
        """All layers over more tokens behind a state."""
        mask, positions, past = None, None, state.layers[0].extent
        if past:
            positions = state.lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)
            mask = visible(positions, past + ids.shape[1], window=self.window)
        hidden, _ = self._run(ids, lengths, slots, state.memory, caches=state.layers, mask=mask, positions=positions)
        return hidden

    def paged_cache(self, *, num_blocks: int, page_size: int | None) -> PagedCache:
        """Room for keys and values of all layers; for the engine. `page_size` None: what suits the device.

        Raises:
            ValueError: The paged kernel on CUDA can't read pages of this size, or a window of them.
        """
        device = next(self.parameters()).device
        page = checked_page_size(page_size, device=device, window=self.window)
        return PagedCache(self.depth, num_blocks=num_blocks, page_size=page, device=device, context=self.context)

    @torch.no_grad()
    def remember(self, memory: Tokens) -> tuple[MemoryKeys, ...]:
        """Every layer's keys and values of some memories; for the engine."""
        return self._project(memory, None)[0]

    @torch.no_grad()
    def read(
        self, ids: Int[Tensor, " T"], cache: PagedCache, now: Step, *, slots: Slots | None, memory: StepMemory
    ) -> Float[Tensor, "M V"]:
        """Some more tokens of some rows, their past in pages; for the engine.

        Args:
            ids: New tokens, without padding.
            cache: Gets their keys and values.
            now: Where they belong.
            slots: Of the rows of which more is read; None where there are none.
            memory: Of the rows.

        Returns:
            Logits behind each row's last new token.
        """
        if slots is not None and now.reads is not None:
            # A row's slot for each of its tokens; no token that was written is a `<slot>`, so theirs don't matter.
            counts = now.reads.counts.clone()
            counts[0] += now.writing
            row = torch.arange(len(counts), device=ids.device).repeat_interleave(counts, output_size=len(ids))
            slots = Slots(*(part.index_select(0, row) for part in astuple(slots)))
        mask, positions = now.mask(window=self.window), now.positions[:, None]
        caches, keys = cache.bind(now), memory.bind(now)
        hidden, _ = self._run(ids[:, None], None, slots, keys, caches=caches, mask=mask, positions=positions)
        return self._logits(hidden[:, 0].index_select(0, now.last))

    def prepared(self) -> "SentenceDecoder":
        """A twin for generation, see `mm.decoder.prepared`; for the engine."""
        twin, weight = prepared(self), self._last()[1]
        twin._output = Laid(weight) if can_lay(weight) else None  # noqa: SLF001
        return twin

    def _logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        norm, weight = self._last()
        out: Tensor = F.linear(norm(hidden), weight) if self._output is None else self._output(norm(hidden))
        return out

    def _mark(self, x: Float[Tensor, "M L D"], ids: Int[Tensor, "M L"], slots: Slots | None) -> Float[Tensor, "M L D"]:
        """Token vectors, with what the rows are about added at their `<slot>`."""
        return x if slots is None else x + (ids == SPECIAL_IDS.slot)[:, :, None] * self.slot(slots)[:, None]


def places_of(ids: Int[Tensor, "M L"], lengths: Int[Tensor, " M"]) -> Int[Tensor, " T"]:
    """Where real tokens lie in the flattened rows."""
    return (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).flatten().nonzero()[:, 0]
