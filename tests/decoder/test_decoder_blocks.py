"""The page allocator: whatever is done to it, blocks come back, and nobody writes to another's."""

import random
from collections import Counter

import pytest

from mm.decoder.blocks import BlockAllocator, BlockTable, OutOfBlocksError, page_digests


def check(allocator, tables):
    """Every block is owned as often as tables name it, and is either owned or free, once."""
    named = Counter(block for table in tables for block in table.blocks)
    assert [named[block] for block in range(allocator.num_blocks)] == allocator._owners
    free = [*allocator._empty, *allocator._idle]
    assert sorted([*free, *named]) == list(range(allocator.num_blocks))
    assert allocator.free == len(free)
    assert {block: digest for digest, block in allocator._blocks.items()} == allocator._digests
    for table in tables:
        assert len(table.blocks) == -(-table.length // allocator.page_size)
        assert len(table.blocks) * allocator.page_size - table.length < allocator.page_size


def test_ten_thousand_random_moves_lose_no_block_and_share_none_wrongly():
    """The storage is played by a dictionary: each sequence must always read back what it wrote."""
    rng = random.Random(0)
    for _ in range(20):
        page = rng.choice([1, 2, 3, 4])
        allocator = BlockAllocator(rng.randint(4, 24), page_size=page)
        storage, sequences, seen = {}, [], Counter()
        for _ in range(500):
            move = rng.choice(["new", "extend", "extend", "extend", "fork", "free", "evict"])
            seen[move] += 1
            if move == "new":
                tokens = [rng.randint(0, 1) for _ in range(rng.randint(1, 9))]
                table = allocator.match(page_digests(tokens[:-1], page_size=page))
                sequences.append((table, tokens[: table.length]))
            elif not sequences:
                continue
            elif move == "extend":
                table, tokens = rng.choice(sequences)
                new = [rng.randint(0, 1) for _ in range(rng.randint(0, 5))]
                wanted, free, before = allocator.needed(table, len(new)), allocator.free, list(table.blocks)
                if wanted > free:
                    with pytest.raises(OutOfBlocksError):
                        allocator.extend(table, len(new))
                    assert (allocator.free, table.blocks, table.length) == (free, before, len(tokens))
                else:
                    copies = allocator.extend(table, len(new))
                    assert allocator.free == free - wanted
                    for source, target in copies:
                        storage.update({(target, i): storage.get((source, i)) for i in range(page)})
                    for place, token in enumerate(new, start=len(tokens)):
                        assert allocator._owners[table.blocks[place // page]] == 1
                        storage[table.blocks[place // page], place % page] = token
                    tokens += new
            elif move == "fork":
                table, tokens = rng.choice(sequences)
                sequences.append((allocator.fork(table), list(tokens)))
            else:
                table, tokens = sequences.pop(rng.randrange(len(sequences)))
                if move == "evict":  # its pages may be found again
                    allocator.remember(table, page_digests(tokens, page_size=page))
                allocator.release(table)
            check(allocator, [table for table, _ in sequences])
            for table, tokens in sequences:
                assert [storage[table.blocks[i // page], i % page] for i in range(len(tokens))] == tokens
        for table, _ in sequences:
            allocator.release(table)
        assert allocator.free == allocator.num_blocks
        assert min(seen.values()) > 20


def a_freed_page_is_given_out_again(allocator):
    for _ in range(50):
        table = BlockTable()
        allocator.extend(table, 8)
        allocator.release(table)
    assert allocator.free == 2


def test_a_freed_page_is_given_out_again():
    a_freed_page_is_given_out_again(BlockAllocator(2, page_size=4))


def test_a_freed_page_is_given_out_again_not_where_there_is_no_free():
    """The printed allocator only ever gave out: a sequence that ended took its pages along."""

    class Printed(BlockAllocator):
        def release(self, table):
            table.blocks, table.length = [], 0

    with pytest.raises(OutOfBlocksError):
        a_freed_page_is_given_out_again(Printed(2, page_size=4))


def test_out_of_blocks_names_the_numbers_and_takes_nothing():
    allocator, table = BlockAllocator(3, page_size=2), BlockTable()
    allocator.extend(table, 3)
    with pytest.raises(OutOfBlocksError, match="2 blocks are wanted, 1 of 3 are free"):
        allocator.extend(BlockTable(), 3)
    assert allocator.free == 1


def test_a_prefix_is_found_only_behind_the_same_beginning_and_root():
    allocator, table = BlockAllocator(8, page_size=2), BlockTable()
    allocator.extend(table, 5)
    allocator.remember(table, page_digests([1, 2, 3, 4, 5], page_size=2, root=b"a"))

    def found(tokens, root=b"a"):
        return allocator.known(page_digests(tokens, page_size=2, root=root))

    assert found([1, 2, 3, 4, 5]) == 2
    assert found([1, 2, 9, 9]) == 1
    assert found([9, 9, 3, 4]) == 0
    assert found([1, 2, 3, 4], root=b"b") == 0
    assert page_digests([1], page_size=2) == []


def test_forgotten_pages_are_the_least_recently_used_and_ends_go_before_beginnings():
    allocator = BlockAllocator(4, page_size=1)
    first, second = BlockTable(), BlockTable()
    for table, tokens in ((first, [1, 2]), (second, [3, 4])):
        allocator.extend(table, 2)
        allocator.remember(table, page_digests(tokens, page_size=1))
        allocator.release(table)
    allocator.extend(BlockTable(), 1)
    assert allocator.known(page_digests([1, 2], page_size=1)) == 1
    assert allocator.known(page_digests([3, 4], page_size=1)) == 2


@pytest.mark.parametrize("name", ["num_blocks", "page_size"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        BlockAllocator(**{"num_blocks": 1, "page_size": 1} | {name: 0})
