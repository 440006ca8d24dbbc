import pytest
import torch

from mm.attention import Causal, attend
from mm.decoder.blocks import BlockAllocator, BlockTable
from mm.decoder.decoder import MoEDecoder
from mm.decoder.engine import Engine
from mm.decoder.paged import PagedCache, checked_page_size, zeros

HEADS, WIDTH = 2, 8


def append(cache, allocator, tables, new):
    """Writes ragged rows of (k, v) and returns the pass and what attention sees of it."""
    counts = [len(k) for k, _ in new]
    cache.copy([pair for table, n in zip(tables, counts, strict=True) for pair in allocator.extend(table, n)])
    now = cache.plan(tables, counts)
    k, v = (torch.nn.utils.rnn.pad_sequence([row[i] for row in new], batch_first=True) for i in (0, 1))
    return now, *cache.bind(now)[0].update(k, v)


def some(count, g):
    return tuple(torch.randn(count, HEADS, WIDTH, generator=g) for _ in range(2))


@pytest.mark.parametrize("page", [1, 3, 8])
def test_ragged_rows_attend_as_if_each_were_alone_and_contiguous(page):
    g = torch.Generator().manual_seed(0)
    allocator = BlockAllocator(64, page_size=page)
    cache, tables = PagedCache(1, num_blocks=64, page_size=page), [BlockTable() for _ in range(3)]
    whole = [some(0, g) for _ in tables]
    for counts in ([5, 1, 9], [1, 1, 1], [2, 7, 1], [1, 1, 1]):
        new = [some(count, g) for count in counts]
        whole = [tuple(torch.cat(both) for both in zip(*rows, strict=True)) for rows in zip(whole, new, strict=True)]
        now, k, v = append(cache, allocator, tables, new)
        q = torch.randn(3, max(counts), HEADS, WIDTH, generator=g)
        mixed = attend(q, k, v, mask=now.mask())
        for row, (count, (own_k, own_v)) in enumerate(zip(counts, whole, strict=True)):
            expected = attend(q[[row], :count], own_k[None], own_v[None], mask=Causal())
            torch.testing.assert_close(mixed[[row], :count], expected, rtol=1e-5, atol=1e-6)
            kept, _ = cache.layers[0].gather(now.tables, now.extent)
            assert torch.equal(kept[row, : len(own_k)], own_k)
    assert now.positions[:, 0].tolist() == [len(k) - 1 for k, _ in whole]


def test_a_fork_goes_its_own_way_and_leaves_the_first_one_alone():
    g = torch.Generator().manual_seed(1)
    allocator, cache, table = BlockAllocator(8, page_size=4), PagedCache(1, num_blocks=8, page_size=4), BlockTable()
    start, left, right = some(6, g), some(3, g), some(3, g)
    append(cache, allocator, [table], [start])
    other = allocator.fork(table)
    append(cache, allocator, [table], [left])
    append(cache, allocator, [other], [right])
    assert table.blocks[0] == other.blocks[0]
    assert set(table.blocks[1:]).isdisjoint(other.blocks[1:])
    for own, end in ((table, left), (other, right)):
        k, v = cache.layers[0].gather(torch.tensor([own.blocks]), own.length)
        assert torch.equal(k[0], torch.cat([start[0], end[0]]))
        assert torch.equal(v[0], torch.cat([start[1], end[1]]))


def test_padding_is_written_to_nobodys_block():
    g = torch.Generator().manual_seed(2)
    allocator, cache = BlockAllocator(2, page_size=2), PagedCache(1, num_blocks=2, page_size=2)
    tables = [BlockTable(), BlockTable()]
    first = some(1, g)
    append(cache, allocator, tables, [first, some(2, g)])
    untouched = cache.layers[0].k[:2].clone()
    now = cache.plan(tables[:1], [1])
    assert now.places.tolist() == [tables[0].blocks[0] * 2]
    assert untouched[tables[0].blocks[0], 1].abs().sum() == 0
    assert cache.layers[0].k[2].abs().sum() >= 0


def test_the_default_page_is_one_that_the_device_can_read():
    for device in ("cpu", "cuda"):
        page = checked_page_size(None, device=torch.device(device))
        assert checked_page_size(page, device=torch.device(device)) == page
    engine = Engine(MoEDecoder(50, width=32, depth=1, heads=2), num_blocks=8)
    assert engine.context == 8 * engine.cache.page_size == 8 * engine.scheduler.blocks.page_size == 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_unused_pool_is_zero_and_lies_on_whole_lines(dtype):
    made = zeros(3, 5, 2, 7, like=torch.ones(1, dtype=dtype))
    assert (made.shape, made.dtype) == ((3, 5, 2, 7), dtype)
    assert made.data_ptr() % 64 == 0
    assert made.is_contiguous()
    assert not made.any()
    made[1] = 1
    assert made.sum() == 70
