"""Who owns which block of a paged cache; no tensor in sight.

A block holds the keys and values of `page_size` tokens. A sequence owns the blocks of its `BlockTable`, all full but
the last, so it wastes less than one block (Kwon et al. 2023, PagedAttention). Blocks are counted by owner: a fork
shares them all, and whoever writes to a shared one first gets a copy. A full block is known by a digest of its
tokens and of everything before them; once nobody owns it, it stays until its place is needed, so that the next
sequence that begins the same way finds it.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b


class OutOfBlocksError(RuntimeError):
    """More blocks are wanted than are free; nothing was taken."""

    def __init__(self, *, wanted: int, free: int, total: int) -> None:
        super().__init__(f"{wanted} blocks are wanted, {free} of {total} are free")
        self.wanted, self.free, self.total = wanted, free, total


@dataclass
class BlockTable:
    """The blocks of one sequence, in order, and how many tokens lie in them."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0


class BlockAllocator:
    """Gives out blocks 0..num_blocks - 1 and takes them back."""

    def __init__(self, num_blocks: int, *, page_size: int) -> None:
        """Makes an allocator with every block free.

        Raises:
            ValueError: A number below 1.
        """
        for name, value in (("num_blocks", num_blocks), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_blocks, self.page_size = num_blocks, page_size
        self._owners = [0] * num_blocks
        self._empty = deque(range(num_blocks))
        self._digests: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # without owner, but with known content; oldest first

    @property
    def free(self) -> int:
        """Blocks that nobody owns, remembered ones included."""
        return len(self._empty) + len(self._idle)

    def needed(self, table: BlockTable, count: int) -> int:
        """Blocks that `extend` would take."""
        blocks = -(-(table.length + count) // self.page_size) - len(table.blocks)
        return blocks + (count > 0 and self._must_copy(table))

    def extend(self, table: BlockTable, count: int) -> list[tuple[int, int]]:
        """Makes room for `count` more tokens.

        Returns:
            What the owner of the storage must copy before it writes: (from, to) blocks; at most one pair.

        Raises:
            OutOfBlocksError: There aren't enough; the table is as it was.
        """
        wanted = self.needed(table, count)
        if wanted > self.free:
            raise OutOfBlocksError(wanted=wanted, free=self.free, total=self.num_blocks)
        copies = []
        if count > 0 and self._must_copy(table):
            shared, own = table.blocks[-1], self._take()
            self._give_back(shared)
            table.blocks[-1] = own
            copies.append((shared, own))
            wanted -= 1
        table.blocks += [self._take() for _ in range(wanted)]
        table.length += count
        return copies

    def fork(self, table: BlockTable) -> BlockTable:
        """A second sequence with the same past, which both share."""
        for block in table.blocks:
            self._owners[block] += 1
        return BlockTable(list(table.blocks), table.length)

    def release(self, table: BlockTable) -> None:
        """The sequence is done (or makes room for others); its table is empty afterwards."""
        for block in reversed(table.blocks):  # the end of a prefix is forgotten before its beginning
            self._give_back(block)
        table.blocks, table.length = [], 0

    def remember(self, table: BlockTable, digests: Sequence[bytes]) -> None:
        """From now on the table's full blocks can be found by these digests (`page_digests`)."""
        for block, digest in zip(table.blocks[: table.length // self.page_size], digests, strict=False):
            if digest not in self._blocks and block not in self._digests:
                self._blocks[digest] = block
                self._digests[block] = digest

    def known(self, digests: Sequence[bytes]) -> int:
        """How many blocks from the first on are remembered."""
        return next((n for n, digest in enumerate(digests) if digest not in self._blocks), len(digests))

    def match(self, digests: Sequence[bytes]) -> BlockTable:
        """A table of the remembered blocks, from the first to the last that is known."""
        blocks = [self._blocks[digest] for digest in digests[: self.known(digests)]]
        for block in blocks:
            self._idle.pop(block, None)
            self._owners[block] += 1
        return BlockTable(blocks, len(blocks) * self.page_size)

    def _must_copy(self, table: BlockTable) -> bool:
        return table.length % self.page_size > 0 and self._owners[table.blocks[-1]] > 1

    def _take(self) -> int:
        if self._empty:
            block = self._empty.popleft()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._blocks[self._digests.pop(block)]
        assert self._owners[block] == 0, f"block {block} was free and had {self._owners[block]} owners"
        self._owners[block] = 1
        return block

    def _give_back(self, block: int) -> None:
        assert self._owners[block] > 0, f"block {block} was given back and had no owner"
        self._owners[block] -= 1
        if self._owners[block] == 0:
            if block in self._digests:
                self._idle[block] = None
            else:
                self._empty.append(block)


def page_digests(tokens: Sequence[int], *, page_size: int, root: bytes = b"") -> list[bytes]:
    """One digest a full page: of its tokens and of the digest before it.

    Args:
        tokens: Whatever tells one input from another, as 64-bit integers.
        page_size: Tokens a page.
        root: Of what else keys and values depend on, such as the memory that is read.
    """
    digests, last = [], root
    for start in range(0, len(tokens) - page_size + 1, page_size):
        content = b"".join(token.to_bytes(8, "little", signed=True) for token in tokens[start : start + page_size])
        last = blake2b(last + content, digest_size=16).digest()
        digests.append(last)
    return digests
