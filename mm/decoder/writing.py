"""An open language model as the decoder of the system: it reads our tokens by cross-attention or as a prefix."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm.attention import Causal, Mask, Visible, Window
from mm.batch import Slots, Tokens
from mm.decoder.cache import DecodingState, MemoryKeys, RowMemory
from mm.decoder.experts import MixtureOfExperts
from mm.decoder.language import LanguageModel
from mm.decoder.language_config import LanguageConfig
from mm.decoder.layer import GatedMemoryAttention, SlotEmbedding
from mm.decoder.memory import StepMemory
from mm.decoder.paged import LayerPass, PagedCache, Pass, Step
from mm.decoder.prefix import Prefixed, Recorder, behind, gathered
from mm.decoder.router import Router, Routing
from mm.decoder.sentences import SentenceDecoder, places_of
from mm.transformer import KeyValueCache, RMSNorm

Reads = Literal["cross_attention", "prefix"]


class WritingModel(SentenceDecoder):
    """A `LanguageModel` that writes about what it reads; its own weights are `language`.

    *Cross-attention* (Alayrac et al. 2022, Flamingo): one before every layer, or every few, behind a gate that starts
    at 0. *Prefix* (Liu et al. 2023, LLaVA): the memory's tokens, projected to the model's width, stand before the
    prompt in the same causal sequence, and positions count on; they run through the layers once a study. A prefix of
    a model with experts is routed like text: it weighs in the losses and in the load, and belongs to no row.

    The slot's embedding starts at 0 as well: with cross-attention the fresh decoder is its language model, bit by bit.

    Attributes:
        vocabulary: File for `mm.data.tokenizer.Tokenizer.load` that came with the imported weights; None without.
    """

    language: LanguageModel
    config: LanguageConfig

    def __init__(
        self,
        config: LanguageConfig | None = None,
        *,
        folder: str | None = None,
        memory_width: int,
        reads: Reads = "cross_attention",
        every: int = 1,
    ) -> None:
        """Makes a decoder.

        Args:
            config: What the language model is made of; it starts from fresh weights. None: see `folder`.
            folder: Of an imported model (`mm import-decoder`) to start from, with its sizes and weights. A
                checkpoint keeps `config` in its place, and so opens without the folder.
            memory_width: Width of the memory.
            reads: How it reads the memory.
            every: Cross-attention stands before layers 0, every, 2 * every...; of no meaning for a prefix.

        Raises:
            ValueError: Neither or both of `config` and `folder`, or numbers that don't fit together, or see
                `mm.decoder.folder.read_decoder`.
        """
        super().__init__()
        if (config is None) == (folder is None):
            raise ValueError(f"give either config or folder, got {'neither' if config is None else 'both'}")
        if memory_width < 1:
            raise ValueError(f"memory_width must be at least 1, got {memory_width}")
        self.vocabulary: str | None = None
        if folder is not None:
            from mm.decoder.folder import read_decoder

            self.language, vocabulary = read_decoder(folder)
            self.language, self.vocabulary = self.language.float(), str(vocabulary)
        else:
            assert config is not None
            self.language = LanguageModel(config)
            self.language.init_weights()
        self.config = config = self.language.config
        if not 1 <= every <= config.depth:
            raise ValueError(f"every must be 1..{config.depth} (depth), got {every}")
        self.width, self.vocab_size, self.memory_width = config.width, config.vocab_size, memory_width
        self.window, self.context = config.window, config.context
        self.reads, self.every = reads, every
        self.slot = SlotEmbedding(config.width)
        self.cross: nn.ModuleList | None = None
        self.projection: nn.Linear | None = None
        if reads == "prefix":
            self.projection = nn.Linear(memory_width, config.width, bias=False)
        else:
            self.cross = nn.ModuleList(
                GatedMemoryAttention(config.width, config.heads, memory_width=memory_width, norm_eps=config.norm_eps)
                for _ in range(0, config.depth, every)
            )
        self.init_reading()

    @torch.no_grad()
    def init_reading(self) -> None:
        """Fresh weights for all that isn't the language model's own, which stays as it is."""
        for embedding in self.slot.children():
            assert isinstance(embedding, nn.Embedding)
            nn.init.zeros_(embedding.weight)
        for reading in (*self._crosses(), *([] if self.projection is None else [self.projection])):
            for module in reading.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
                elif isinstance(module, RMSNorm):
                    nn.init.ones_(module.weight)
        for reading in self._crosses():
            nn.init.zeros_(reading.gate)
        if self.projection is not None:
            # Tokens of unit variance become as large as words are.
            self.projection.weight.mul_(self.language.embedding.weight.float().square().mean().sqrt())

    def sealed(self) -> dict[str, Any]:
        """Arguments that make the same decoder without the folder."""
        return {"folder": None, "config": asdict(self.config)}

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.config.depth

    def routers(self) -> tuple[Router, ...]:
        """The routers, layer by layer; none of a dense model."""
        return tuple(part.router for part in self.language.modules() if isinstance(part, MixtureOfExperts))

    def _project(
        self, memory: Tokens, rows: Int[Tensor, " M"] | None
    ) -> tuple[tuple[MemoryKeys, ...], tuple[Routing, ...]]:
        if self.projection is None:
            return tuple(cross.attention.project(memory, rows) for cross in self._crosses()), ()
        memory = gathered(memory)
        self._check(memory.mask.shape[1])
        recorders = [Recorder() for _ in range(self.depth)]
        _, routings = self.language._run(  # noqa: SLF001  # as below: the one other place that runs these layers
            self.projection(memory.values),
            mask=self._causal(memory.mask.shape[1]),
            positions=torch.arange(memory.mask.shape[1], device=memory.mask.device)[None],
            real=memory.mask.flatten().nonzero()[:, 0],
            caches=recorders,
        )
        return tuple(recorder.deal(memory, rows) for recorder in recorders), routings

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
    ) -> tuple[Float[Tensor, "M L D"], tuple[Routing, ...]]:
        """See `SentenceDecoder`; without `memory` rows are plain text."""
        pages = [cache for cache in caches or () if isinstance(cache, LayerPass)]
        extent = pages[0].now.extent if pages and isinstance(pages[0].now, Pass) else ids.shape[1]
        positions = torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions
        mask = mask or self._causal(extent)
        if memory and self.reads == "prefix":
            before = [layer for layer in memory if isinstance(layer, MemoryKeys)]
            mask = behind(before[0], positions, extent, window=self.window)
            positions = positions + before[0].mask.sum(1)[:, None]
            caches = [Prefixed(layer, pages[index] if pages else None) for index, layer in enumerate(before)]
        if lengths is not None and len(lengths):  # single steps have been checked when their caches were opened
            self._check(int((positions[:, 0] + lengths).max()))
        crosses = self._crosses() if memory else []

        def read(index: int, x: Tensor) -> Tensor:
            if not crosses or index % self.every:
                return x
            out: Tensor = crosses[index // self.every](x, memory[index // self.every])
            return out

        return self.language._run(  # noqa: SLF001
            self._mark(self.language.embedding(ids), ids, slots),
            mask=mask,
            positions=positions,
            real=None if lengths is None else places_of(ids, lengths),
            caches=caches,
            between=read,
        )

    @torch.no_grad()
    def read(
        self, ids: Int[Tensor, " T"], cache: PagedCache, now: Step, *, slots: Slots | None, memory: StepMemory
    ) -> Float[Tensor, "M V"]:
        """See `SentenceDecoder`."""
        if self.reads != "prefix" or not (memory.writes or memory.reads):
            return super().read(ids, cache, now, slots=slots, memory=memory)
        # A row's keys are its memory's and its own, side by side: rows that go on and the others are padded apart.
        logits, first = [], now.writing
        for part, some, keys, about in (
            (now.writes, ids[:first], memory.writes, None),
            (now.reads, ids[first:], memory.reads, slots),
        ):
            if part is not None:
                padded = some.new_zeros(part.positions.numel()).index_copy_(0, part.real, some).view_as(part.positions)
                hidden, _ = self._run(
                    padded, part.counts, about, keys, caches=cache.bind(part), positions=part.positions
                )
                logits.append(self._logits(hidden[torch.arange(len(padded), device=ids.device), part.counts - 1]))
        return torch.cat(logits)

    def _open(self, memory: tuple[MemoryKeys, ...], lengths: Int[Tensor, " M"], *, capacity: int) -> DecodingState:
        if not memory or self.reads != "prefix":
            self._check(capacity)
            return super()._open(memory, lengths, capacity=capacity)
        room = memory[0].mask.shape[1]
        self._check(room + capacity)
        state = super()._open((), lengths, capacity=room + capacity)
        for cache, layer in zip(state.layers, memory, strict=True):
            cache.update(layer.k, layer.v)  # from here on they are a row's first tokens like any others
        return state.advance(memory[0].mask.sum(1))

    def _last(self) -> tuple[RMSNorm, Tensor]:
        output = self.language.output
        return self.language.norm, self.language.embedding.weight if output is None else output.weight

    def _causal(self, count: int) -> Mask:
        return Causal() if self.window is None or self.window >= count else Window(self.window - 1)

    def _crosses(self) -> list[GatedMemoryAttention]:
        return [cross for cross in self.cross or () if isinstance(cross, GatedMemoryAttention)]

    def _check(self, tokens: int) -> None:
        if tokens > self.config.context:
            reading = ", its memory included," if self.reads == "prefix" else ""
            raise ValueError(f"at most {self.config.context} tokens (context) fit in a row{reading} got {tokens}")
