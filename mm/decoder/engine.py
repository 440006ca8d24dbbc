"""Generation for many requests at once: paged cache, continuous batching, chunked prompts, shared prefixes.

Every request gets the tokens that it would get alone, whoever runs beside it: its draws come from its own seed, and
its rows never see a neighbour's.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.batch import SPECIAL_IDS, Slots, Tokens, Writing
from mm.decoder.blocks import BlockAllocator
from mm.decoder.cache import MemoryKeys
from mm.decoder.generate import GREEDY, Sampling, choose
from mm.decoder.grammar import Matcher, forbidden
from mm.decoder.memory import Memory, MemoryBank, StepMemory, stacked
from mm.decoder.paged import PagedCache, Step
from mm.decoder.request import Completion, Finish, Piece, Request, Slot
from mm.decoder.scheduler import Plan, Scheduler, Sequence


@runtime_checkable
class PagedDecoder(Protocol):
    """What the engine needs of a decoder."""

    vocab_size: int

    def prepared(self) -> "PagedDecoder":
        """The same decoder as generation wants it; weights that change later need not reach it."""
        ...

    def paged_cache(self, *, num_blocks: int, page_size: int | None) -> PagedCache:
        """Room for keys and values of all layers; `page_size` None: what suits the device."""
        ...

    def remember(self, memory: Tokens) -> tuple[MemoryKeys, ...]:
        """Every layer's keys and values of some memories."""
        ...

    def read(
        self,
        ids: Int[Tensor, " T"],
        cache: PagedCache,
        now: Step,
        *,
        slots: Slots | None,
        memory: StepMemory,
    ) -> Float[Tensor, "M V"]:
        """Logits behind each row's last new token."""
        ...


@dataclass(frozen=True)
class _Job:
    request: Request
    sequence: Sequence
    settings: Sampling
    draws: list[float]
    matcher: Matcher | None


class Engine:
    """Runs requests on one decoder in evaluation mode.

    Example:
        engine = Engine(decoder, max_sequences=16)
        studies = engine.remember(memory)
        completions = engine.run([Request((2, 4), memory=study) for study in studies])
    """

    def __init__(
        self,
        decoder: PagedDecoder,
        *,
        max_sequences: int = 16,
        token_budget: int = 512,
        num_blocks: int = 1024,
        page_size: int | None = None,
        context: int | None = None,
        group: int = 1,
        max_wait: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        """Makes an engine without work; the cache is made when the first prompt is read.

        Args:
            decoder: To run, with the weights that it has now.
            max_sequences: That run at a time.
            token_budget: Tokens a step, padding included; longer prompts are read in several steps.
            num_blocks: Of the cache, for all sequences together.
            page_size: Tokens a block; on CUDA a multiple of 64. None: 64 there and 16 elsewhere.
            context: Most tokens of a prompt and what is written behind it; None: what all blocks hold, or
                the decoder is made for.
            group: See `Scheduler`.
            max_wait: See `Scheduler`.
            clock: See `Scheduler`.
            decode: The tokenizer's; needed for stop strings.

        Raises:
            ValueError: Numbers that don't fit together.
        """
        self.cache = decoder.paged_cache(num_blocks=num_blocks, page_size=page_size)
        blocks = BlockAllocator(num_blocks, page_size=self.cache.page_size)
        slots = num_blocks * self.cache.page_size
        room = min(slots, self.cache.context or slots)
        if context is not None and not 1 <= context <= room:
            raise ValueError(f"context must be 1..{room} (num_blocks * page_size, and the decoder's), got {context}")
        self.context = room if context is None else context
        self.decoder, self.decode = decoder.prepared(), decode
        self.scheduler = Scheduler(
            blocks, max_sequences=max_sequences, token_budget=token_budget, group=group, max_wait=max_wait, clock=clock
        )
        self._bank = MemoryBank(max_sequences)
        self._jobs: dict[int, _Job] = {}
        self._submitted = self._remembered = 0

    def remember(self, memory: Tokens) -> list[Memory]:
        """One memory a study, projected once however many requests read it."""
        layers = self.decoder.remember(memory)
        made = []
        for row in range(len(memory.values)):
            self._remembered += 1
            one = torch.tensor([row], device=memory.values.device)
            name = self._remembered.to_bytes(8, "little")
            made.append(Memory(tuple(layer.select(one) for layer in layers), name))
        return made

    def requests(
        self,
        writing: Writing,
        memory: Tokens,
        *,
        sampling: Sampling = GREEDY,
        rows: Int[Tensor, " M"] | None = None,
    ) -> list[Request]:
        """What `MoEDecoder.generate` takes, as requests; a seed a row where `sampling` has them.

        Raises:
            ValueError: There is not one seed a row.
        """
        studies = self.remember(memory)
        prompt, slots = writing.prompt, writing.slots
        count = len(prompt.values)
        belongs = list(range(count)) if rows is None else rows.tolist()
        about = torch.stack([slots.kind, slots.code, slots.side, slots.change, slots.grade], dim=-1).tolist()
        made = []
        for row, seed in enumerate(sampling.seeds(count)):
            ids = prompt.values[row, : int(prompt.lengths[row])].tolist()
            own = replace(sampling, seed=seed)
            made.append(Request(tuple(ids), studies[belongs[row]], tuple(about[row]), own))
        return made

    def submit(self, request: Request) -> int:
        """Takes a request in and returns its index.

        Raises:
            ValueError: It can't be run; nothing was taken in.
        """
        self._check(request)
        index = self._submitted
        code = _code(request.slot)
        sequence = Sequence(
            index=index,
            tokens=list(request.prompt),
            prompt=len(request.prompt),
            content=[code if token == SPECIAL_IDS.slot else token for token in request.prompt],
            root=request.memory.name,
            signature=request.signature,
        )
        sampling = request.sampling
        draws = sampling.draws(1)[0].tolist() if sampling.temperature > 0 else [0.0] * sampling.max_new_tokens
        # Alike for all whose tokens are chosen alike.
        settings = replace(sampling, max_new_tokens=1, seed=0, stop=(), grammar=None)
        self._submitted += 1
        matcher = None if sampling.grammar is None else sampling.grammar.begin()
        self._jobs[index] = _Job(request, sequence, settings, draws, matcher)
        self.scheduler.add(sequence)
        return index

    def cancel(self, index: int) -> bool:
        """Gives up a request; no token of it comes any more, its blocks are free, and the others go on as they would.

        Args:
            index: From `submit`.

        Returns:
            Whether it was still on its way.
        """
        job = self._jobs.pop(index, None)
        if job is not None:
            self.scheduler.cancel(job.sequence)
        return job is not None

    def step(self) -> list[Piece]:
        """Goes one step on: at most one token more for each request that runs."""
        with torch.inference_mode():
            plan = self.scheduler.plan()
            self.cache.copy(plan.copies)
            if not plan.read and not plan.written:
                return []
            logits, sequences = self._compute(plan)
            done = [row for row, sequence in enumerate(sequences) if sequence.unread == 0]
            if len(done) < len(sequences):
                logits, sequences = logits[done], [sequences[row] for row in done]
            return self._choose(logits, sequences)

    def stream(self, requests: Iterable[Request] = ()) -> Iterator[Piece]:
        """Submits requests, then gives every token as soon as it is there, until nothing is left to do."""
        for request in [self._check(request) for request in requests]:
            self.submit(request)
        while self._jobs:
            yield from self.step()

    def run(self, requests: Iterable[Request]) -> list[Completion]:
        """Completes requests, in their order; all of them are checked before the first is begun."""
        assert not self._jobs, "other requests are on their way: take their pieces with `step` or `stream`"
        first, pieces = self._submitted, list[list[Piece]]()
        for piece in self.stream(requests):
            pieces += [[] for _ in range(self._submitted - first - len(pieces))]
            pieces[piece.request - first].append(piece)
        return [_complete(each) for each in pieces]

    def _check(self, request: Request) -> Request:
        prompt, sampling = request.prompt, request.sampling
        if not prompt:
            raise ValueError("prompt must have at least 1 token, got 0")
        wrong = [token for token in prompt if not 0 <= token < self.decoder.vocab_size]
        if wrong:
            raise ValueError(f"prompt must hold ids 0..{self.decoder.vocab_size - 1}, got {wrong[0]}")
        total = len(prompt) + sampling.max_new_tokens
        if total > self.context:
            raise ValueError(
                f"prompt and max_new_tokens must be at most {self.context} together (context), "
                f"got {len(prompt)} + {sampling.max_new_tokens} = {total}"
            )
        if not isinstance(sampling.seed, int):
            raise ValueError(f"seed of a request must be one number, got {len(sampling.seed)}")
        if sampling.samples > 1:
            raise ValueError(f"samples of a request must be 1 (submit it once a sample), got {sampling.samples}")
        if sampling.stop and self.decode is None:
            raise ValueError(f"stop {sampling.stop!r} needs `decode`, the tokenizer's, got None")
        sampling.check_vocabulary(self.decoder.vocab_size)
        return request

    def _compute(self, plan: Plan) -> tuple[Float[Tensor, "M V"], list[Sequence]]:
        """The newest token of those that write, in the order in which their memories lie, and more of some prompts."""
        rows = {sequence.index: sequence for sequence in plan.written}
        memories: dict[Hashable, Memory] = {index: self._jobs[index].request.memory for index in rows}
        order = [rows[index] for index in self._bank.arrange(memories) if isinstance(index, int)]
        writes = self.cache.plan([sequence.table for sequence in order], [1] * len(order)) if order else None
        tokens, slots, reads = [sequence.tokens[-1] for sequence in order], None, None
        requests = [self._jobs[sequence.index].request for sequence, _ in plan.read]
        if requests:
            reads = self.cache.plan([sequence.table for sequence, _ in plan.read], [count for _, count in plan.read])
            slots = Slots(*torch.tensor([request.slot for request in requests]).unbind(-1)).to(self.cache.device)
        for sequence, count in plan.read:
            tokens += sequence.tokens[sequence.table.length - count : sequence.table.length]
        memory = StepMemory(self._bank.rows() if order else (), stacked([request.memory for request in requests]))
        ids, now = torch.tensor(tokens).to(self.cache.device), Step(writes, reads)
        logits = self.decoder.read(ids, self.cache, now, slots=slots, memory=memory)
        return logits, [*order, *(sequence for sequence, _ in plan.read)]

    def _choose(self, logits: Float[Tensor, "M V"], sequences: list[Sequence]) -> list[Piece]:
        """The next token of each, alike settings together."""
        alike: dict[Sampling, list[int]] = {}
        for row, sequence in enumerate(sequences):
            alike.setdefault(self._jobs[sequence.index].settings, []).append(row)
        pieces = []
        for settings, rows in alike.items():
            some, written = [sequences[row] for row in rows], None
            if settings.repetition_penalty != 1:
                written = _padded([item.tokens[item.prompt :] for item in some]).to(logits.device)
            draws = [self._jobs[item.index].draws[len(item.tokens) - item.prompt] for item in some]
            ids, scores = choose(
                logits if len(rows) == len(sequences) else logits[rows],
                sampling=settings,
                draw=torch.tensor(draws, device=logits.device),
                written=written,
                forbidden=forbidden([self._jobs[item.index].matcher for item in some], logits.shape[1]),
            )
            for item, token, score in zip(some, ids.tolist(), scores.tolist(), strict=True):
                pieces.append(self._take(item, token, score))
        return pieces

    def _take(self, sequence: Sequence, token: int, score: float) -> Piece:
        job = self._jobs[sequence.index]
        sampling = job.request.sampling
        if job.matcher is not None:
            job.matcher.accept(token)
        sequence.tokens.append(token)
        written = sequence.tokens[sequence.prompt :]
        finish: Finish | None = None
        if token == SPECIAL_IDS.end:
            finish = "end"
        elif sampling.stop and self.decode is not None and _any_in(sampling.stop, self.decode(written)):
            finish = "stop"
        elif len(written) == sampling.max_new_tokens:
            finish = "length"
        if finish is not None:
            self.scheduler.finish(sequence)
            del self._jobs[sequence.index]
        return Piece(sequence.index, token, score, finish)


def _complete(pieces: list[Piece]) -> Completion:
    finish = pieces[-1].finish
    assert finish is not None, "a request has no end"
    return Completion(tuple(piece.id for piece in pieces), tuple(piece.log_probability for piece in pieces), finish)


def _any_in(stops: tuple[str, ...], text: str) -> bool:
    return any(stop in text for stop in stops)


def _padded(rows: list[list[int]]) -> Int[Tensor, "M W"]:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [SPECIAL_IDS.pad] * (width - len(row)) for row in rows], dtype=torch.long)


def _code(slot: Slot) -> int:
    """A number below 0, and so no token, that tells slots apart."""
    code = 0
    for part in slot:
        code = code * 1000 + part
    return -1 - code
