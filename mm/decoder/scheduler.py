"""Who is read and who is continued in the next step of generation (Yu et al. 2022, Orca; Kwon et al. 2023, vLLM)."""

import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

from mm.decoder.blocks import BlockAllocator, BlockTable, OutOfBlocksError, page_digests


@dataclass(eq=False)
class Sequence:
    """One request on its way.

    Attributes:
        index: Its place in the order of arrival; who has come first goes first.
        tokens: Prompt and what was written.
        prompt: How many of them are the prompt.
        content: What tells this prompt from another, one number a token.
        root: What else its keys and values depend on.
        signature: Which inputs its study has; requests are read together with their like.
        table: Its blocks; `table.length` tokens have been read.
    """

    index: int
    tokens: list[int]
    prompt: int
    content: list[int]
    root: bytes = b""
    signature: str = ""
    table: BlockTable = field(default_factory=BlockTable)

    def __post_init__(self) -> None:
        assert len(self.content) == self.prompt <= len(self.tokens), "content must tell every token of the prompt"

    @property
    def unread(self) -> int:
        """Tokens without keys and values."""
        return len(self.tokens) - self.table.length


@dataclass(frozen=True)
class Plan:
    """One step. Tables already have room for what is to be read.

    Attributes:
        read: Sequences whose prompts are read, with the number of tokens to read now.
        width: The most tokens of one of them; reading costs len(read) * width.
        written: Sequences that get one token more; each costs 1.
        copies: Blocks to copy first, (from, to).
        preempted: Sequences that lost their blocks and wait again, what they have written kept.
    """

    read: list[tuple[Sequence, int]]
    written: list[Sequence]
    copies: list[tuple[int, int]]
    preempted: list[Sequence]

    @property
    def width(self) -> int:
        """Of the rows that are read."""
        return max((count for _, count in self.read), default=0)

    @property
    def cost(self) -> int:
        """Tokens that the decoder computes, padding included."""
        return len(self.written) + len(self.read) * self.width


class Scheduler:
    """Continuous batching: every step, those that write go on, and what is left of the budget reads prompts.

    First come, first served: nobody begins while somebody who came earlier waits, except to be read together with
    the first one waiting (same signature) in room that would else be padding or idle. When blocks run out, the
    youngest gives its own back and waits again in its old place; the oldest always goes on, so everybody ends.
    """

    def __init__(
        self,
        blocks: BlockAllocator,
        *,
        max_sequences: int,
        token_budget: int,
        group: int = 1,
        max_wait: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes a scheduler without work.

        Args:
            blocks: Of the cache.
            max_sequences: That run at a time.
            token_budget: Tokens a step, padding included.
            group: Wait until the prompts of so many requests of a kind can be read together...
            max_wait: ...but hold back nobody who could begin for more than this many seconds, and nobody at all
                while nothing else is to be done.
            clock: Seconds.

        Raises:
            ValueError: Numbers that don't fit together.
        """
        if max_sequences < 1:
            raise ValueError(f"max_sequences must be at least 1, got {max_sequences}")
        if token_budget <= max_sequences:
            raise ValueError(
                f"token_budget must be above max_sequences ({max_sequences}), or prompts are never read, "
                f"got {token_budget}"
            )
        if not 1 <= group <= max_sequences:
            raise ValueError(f"group must be 1..{max_sequences} (max_sequences), got {group}")
        if max_wait < 0:
            raise ValueError(f"max_wait must be 0 or more seconds, got {max_wait}")
        self.blocks, self.max_sequences, self.token_budget = blocks, max_sequences, token_budget
        self.group, self.max_wait, self.clock = group, max_wait, clock
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._read_last: list[Sequence] = []
        self._held_since: float | None = None

    def add(self, sequence: Sequence) -> None:
        """A new request.

        Raises:
            ValueError: It has no token.
        """
        if not sequence.tokens:
            raise ValueError("a prompt must have at least 1 token, got 0")
        insort(self.waiting, sequence, key=_age)

    def finish(self, sequence: Sequence) -> None:
        """A request is done; its blocks are free, what they hold is remembered."""
        self.running.remove(sequence)
        self._let_go(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """A request is wanted no longer, whether it runs or waits."""
        if sequence in self.running:
            self.finish(sequence)
            return
        self.waiting.remove(sequence)
        if not self.waiting:
            self._held_since = None

    def plan(self) -> Plan:
        """The next step; empty where there is nothing to do, or only to wait for."""
        self._remember()
        copies: list[tuple[int, int]] = []
        preempted: list[Sequence] = []
        written: list[Sequence] = []
        reading: list[tuple[Sequence, int]] = []
        left = self.token_budget - sum(not _reads(sequence) for sequence in self.running)
        # By age: whoever gives up blocks is younger than all that are already in the plan.
        for sequence in list(self.running):
            if sequence not in self.running:
                continue
            if _reads(sequence):
                self._read(sequence, reading, left, preempted, copies)
            else:
                taken = self._grow(sequence, 1, preempted)
                if taken is not None:
                    written.append(sequence)
                    copies += taken
        if not preempted:
            self._begin(reading, left, copies)
        self._read_last = [sequence for sequence, _ in reading]
        return Plan(reading, written, copies, preempted)

    def _begin(self, reading: list[tuple[Sequence, int]], left: int, copies: list[tuple[int, int]]) -> None:
        """Lets waiting requests in: the first one, and behind it those of its kind."""
        if not self.waiting or not self._ready():
            return
        signature = reading[0][0].signature if reading else self.waiting[0].signature
        if self.waiting[0].signature != signature:
            return
        soon = {digest for sequence, _ in reading for digest in self._digests(sequence, len(sequence.tokens))}
        for sequence in [item for item in self.waiting if item.signature == signature]:
            if len(self.running) == self.max_sequences:
                return
            digests = self._digests(sequence, len(sequence.tokens) - 1)
            known = self.blocks.known(digests)
            if digests[known : known + 1] and digests[known] in soon:
                continue  # somebody reads the same just now: take it over in the next step
            sequence.table = self.blocks.match(digests)
            if not self._read(sequence, reading, left, None, copies):
                self.blocks.release(sequence.table)
                return
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_age)
            soon.update(digests[known:])

    def _ready(self) -> bool:
        """Whether the first one waiting begins now, or is held back for company."""
        room = self.max_sequences - len(self.running)
        if room == 0:
            return False
        alike = sum(sequence.signature == self.waiting[0].signature for sequence in self.waiting)
        if self.running and min(alike, room) < self.group:
            now = self.clock()
            self._held_since = now if self._held_since is None else self._held_since
            if now - self._held_since < self.max_wait:
                return False
        self._held_since = None
        return True

    def _read(
        self,
        sequence: Sequence,
        reading: list[tuple[Sequence, int]],
        left: int,
        preempted: list[Sequence] | None,
        copies: list[tuple[int, int]],
    ) -> bool:
        """Adds some of a prompt to the step, if it still pays to."""
        width = max((count for _, count in reading), default=0)
        count = min(sequence.unread, left // (len(reading) + 1))
        if count < 1 or (len(reading) + 1) * width > left:
            return False
        if preempted is None:
            # Newcomers take nothing from those who run: room for all of the prompt, and a block for each runner.
            wanted = self.blocks.needed(sequence.table, sequence.unread) + len(self.running)
            if self.running and wanted > self.blocks.free:
                return False
            taken: list[tuple[int, int]] | None = self.blocks.extend(sequence.table, count)
        else:
            taken = self._grow(sequence, count, preempted)
        if taken is None:
            return False
        copies += taken
        reading.append((sequence, count))
        return True

    def _grow(self, sequence: Sequence, count: int, preempted: list[Sequence]) -> list[tuple[int, int]] | None:
        """Room for more tokens, at the cost of the youngest; None where that was the sequence itself."""
        while True:
            try:
                return self.blocks.extend(sequence.table, count)
            except OutOfBlocksError:
                victim = self.running[-1]
                if victim is sequence and len(self.running) == 1:
                    raise  # it will never fit; whoever adds requests makes sure that each alone does
                self.running.remove(victim)
                self._let_go(victim)
                insort(self.waiting, victim, key=_age)
                preempted.append(victim)
                if victim is sequence:
                    return None

    def _remember(self) -> None:
        """What the last step has read can be found from now on."""
        for sequence in self._read_last:
            self.blocks.remember(sequence.table, self._digests(sequence, sequence.table.length))
        self._read_last = []

    def _let_go(self, sequence: Sequence) -> None:
        self.blocks.remember(sequence.table, self._digests(sequence, sequence.table.length))
        self.blocks.release(sequence.table)

    def _digests(self, sequence: Sequence, count: int) -> list[bytes]:
        content = sequence.content + sequence.tokens[sequence.prompt :]
        return page_digests(content[:count], page_size=self.blocks.page_size, root=sequence.root)


def _reads(sequence: Sequence) -> bool:
    """Whether it isn't yet at the point where one more token is all there is to read."""
    return sequence.table.length < sequence.prompt or sequence.unread > 1


def _age(sequence: Sequence) -> int:
    return sequence.index
