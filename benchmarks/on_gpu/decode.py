"""A decoding step on the paged cache against the time that reading weights, keys and values takes by itself."""

from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch

import torch
from on_gpu.bench import Bench, assert_near, last_line, three
from torch import Tensor, nn

import mm.attention
from mm.attention import Paged
from mm.batch import Tokens
from mm.decoder.blocks import BlockAllocator, BlockTable
from mm.decoder.cache import MemoryKeys
from mm.decoder.decoder import MoEDecoder
from mm.decoder.experts import MixtureOfExperts
from mm.decoder.language_config import LanguageConfig
from mm.decoder.layer import MemoryAttention
from mm.decoder.paged import PagedCache, Pass
from mm.decoder.router import Routing
from mm.decoder.sentences import SentenceDecoder
from mm.decoder.writing import WritingModel

SECTION, PAGE = "decode step", 64


def makers(tiny: bool) -> dict[str, Callable[[], SentenceDecoder]]:
    """A dense and a mixed language model of the open kind, and our own decoder with a memory."""
    if tiny:
        plain = {"vocab_size": 64, "width": 32, "depth": 2, "heads": 4, "head_width": 16, "context": 4096}
        dense = LanguageConfig(**plain, key_heads=2, hidden=64)
        mixed = LanguageConfig(**plain, key_heads=4, hidden=0, num_experts=8, expert_width=16, gates="softmax")
        own = {"vocab_size": 64, "width": 32, "depth": 2, "heads": 2, "expert_width": 16, "shared_expert_width": 16}
    else:
        plain = {"vocab_size": 32000, "width": 2048, "depth": 16, "heads": 16, "head_width": 128, "context": 4096}
        dense = LanguageConfig(**plain, key_heads=4, hidden=5632)
        olmoe = {"num_experts": 64, "experts_per_token": 8, "expert_width": 1024, "gates": "softmax", "norm": "all"}
        mixed = LanguageConfig(**plain | {"depth": 8}, key_heads=16, hidden=0, **olmoe)
        own = {"vocab_size": 32000, "width": 1024, "depth": 12, "heads": 16}
        own |= {"expert_width": 1024, "shared_expert_width": 1024}
    return {
        "dense, GQA": lambda: WritingModel(dense, memory_width=8, every=dense.depth),
        "OLMoE shape, half its depth": lambda: WritingModel(mixed, memory_width=8, every=mixed.depth),
        "MoEDecoder with a memory": lambda: MoEDecoder(**own),
    }


@torch.no_grad()
def run(bench: Bench) -> None:
    speed = bench.bandwidth()
    bench.row(SECTION, "copy of 1 GiB", gigabytes_per_s=three(speed / 1e9))
    for name, make in makers(bench.tiny).items():
        bench.attempt(SECTION, name, partial(all_batches, bench, name, make, speed))


def all_batches(bench: Bench, name: str, make: Callable[[], SentenceDecoder], speed: float) -> None:
    longest, batches = (100, (2,)) if bench.tiny else (2048, (1, 16, 64))
    torch.manual_seed(0)
    with torch.device(bench.device):
        decoder = make().to(torch.bfloat16).eval()
    for batch in batches:
        case = f"{name}, {batch} rows"
        bench.attempt(SECTION, case, partial(measure, bench, decoder, case, batch, longest, speed))


class Step:
    """One step of some rows, all of its inputs in buffers that stay."""

    def __init__(self, bench: Bench, decoder: SentenceDecoder, batch: int, longest: int) -> None:
        g = torch.Generator().manual_seed(0)
        # Half to whole of the longest, with room for two more tokens in the last page.
        lengths = (longest * (0.5 + 0.5 * torch.rand(batch, generator=g))).long() // PAGE * PAGE + 10
        blocks = int((lengths // PAGE + 1).sum())
        self.decoder, self.device = decoder, bench.device
        self.allocator = BlockAllocator(blocks, page_size=PAGE)
        self.cache: PagedCache = decoder.paged_cache(num_blocks=blocks, page_size=PAGE)
        self.tables = [BlockTable() for _ in range(batch)]
        for table, length in zip(self.tables, lengths.tolist(), strict=True):
            self.allocator.extend(table, length)
        self.ids = torch.randint(10, decoder.vocab_size, (batch, 1), generator=g).to(bench.device)
        self.memory: tuple[MemoryKeys, ...] = ()
        if isinstance(decoder, MoEDecoder):
            values = torch.randn(batch, 16 if bench.tiny else 256, decoder.memory_width, generator=g)
            seen = torch.ones(values.shape[:2], dtype=torch.bool, device=bench.device)
            self.memory = decoder.remember(Tokens(values.to(bench.device, torch.bfloat16), seen))
        self.now = self.next()
        self.mask = self.now.mask()
        self()
        torch.manual_seed(1)
        for layer in self.cache.layers:
            assert layer.k is not None
            assert layer.v is not None
            layer.k.normal_()
            layer.v.normal_()

    def next(self) -> Pass:
        """One more token a row."""
        for table in self.tables:
            assert not self.allocator.extend(table, 1)
        return self.cache.plan(self.tables, [1] * len(self.tables))

    def __call__(self) -> Tensor:
        return self.routed()[0]

    def routed(self) -> tuple[Tensor, Sequence[Routing]]:
        hidden, routings = self.decoder._run(  # noqa: SLF001  # `read` waits for the device, which a graph can't
            self.ids,
            None,
            None,
            self.memory,
            caches=self.cache.bind(self.now),
            mask=self.mask,
            positions=self.now.positions,
        )
        return self.decoder._logits(hidden[:, 0]), routings  # noqa: SLF001

    def advance(self) -> None:
        """The same buffers, one token on; it stays within the last page."""
        assert isinstance(self.mask, Paged)
        bias = self.mask.bias(1, 0)
        for buffer in (self.now.positions, self.now.places, bias.k_seqinfo.seqlen):  # type: ignore[attr-defined]
            buffer.add_(1)

    def floor_bytes(self) -> int:
        """Of the weights that this step's tokens meet, and of the keys and values of its rows."""
        total = bytes_of(self.decoder)
        unread: list[nn.Module] = [self.decoder.slot]  # and a table of words, of which a row is read; and the memory's
        if isinstance(self.decoder, WritingModel):
            unread += self.decoder.cross or ()
            unread += [] if self.decoder.language.output is None else [self.decoder.language.embedding]
        elif isinstance(self.decoder, MoEDecoder):
            unread += [module.kv for module in self.decoder.modules() if isinstance(module, MemoryAttention)]
        total -= sum(bytes_of(module) for module in unread)
        _, routings = self.routed()
        layers = [module for module in self.decoder.modules() if isinstance(module, MixtureOfExperts)]
        for layer, routing in zip(layers, routings, strict=True):
            idle = layer.experts.num_experts - len(routing.experts.unique())
            total -= idle * sum(item[0].numel() * item.element_size() for item in layer.experts.parameters())
        for paged in self.cache.layers:
            for pool in (paged.k, paged.v):
                assert pool is not None
                token = pool[0, 0].numel() * pool.element_size()
                total += token * sum(table.length for table in self.tables)
        for keys in self.memory:
            total += sum(part.numel() * part.element_size() for part in (keys.k, keys.v))
        return total


def bytes_of(module: nn.Module) -> int:
    return sum(item.numel() * item.element_size() for item in module.parameters())


def measure(bench: Bench, decoder: SentenceDecoder, name: str, batch: int, longest: int, speed: float) -> None:
    step = Step(bench, decoder, batch, longest)
    expected = step()
    with patch.object(mm.attention, "_ops", lambda: None):  # the same pages, read by PyTorch's own attention
        # A token on the border between two experts may fall either way in bfloat16.
        allowed = 5e-2 if not decoder.routers() else 3e-1
        difference = assert_near(expected, step(), within=allowed, what="logits by the paged kernel and by SDPA")
    floor = step.floor_bytes() / speed * 1e3
    eager = bench.times({"eager": step})["eager"]
    figures: dict[str, object] = {
        "floor_ms": three(floor),
        "eager_ms": three(eager),
        "eager_of_floor": three(floor / eager),
        "difference_to_sdpa": three(difference),
    }
    try:
        graph_ms = graphed(bench, step)
        figures |= {"graph_ms": three(graph_ms), "graph_of_floor": three(floor / graph_ms)}
    except Exception as error:  # noqa: BLE001
        figures["graph"] = f"not measured: {last_line(error)}"
    bench.row(SECTION, name, **figures)


def graphed(bench: Bench, step: Step) -> float:
    """Milliseconds of a replay; a replay a token on is asserted to be that step made anew."""
    if bench.device.type != "cuda":
        raise RuntimeError("CUDA graphs need CUDA")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    allowed = 2e-2 if not step.decoder.routers() else 3e-1
    graph.replay()
    assert_near(logits, step(), within=allowed, what="logits of the graph and of the step")
    ms = bench.times({"graph": graph.replay})["graph"]
    step.advance()
    graph.replay()
    got = logits.clone()
    step.now = step.next()
    step.mask = step.now.mask()
    assert_near(got, step(), within=allowed, what="logits of the graph and of the step, a token on")
    return ms
