"""The scheduler, with an engine that is only counted: no request is stranded and no budget broken."""

import random

import pytest

from mm.decoder.blocks import BlockAllocator
from mm.decoder.scheduler import Scheduler, Sequence


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def sequence(index, length, *, signature="", content=None):
    tokens = content or [1000 * index + i for i in range(length)]
    return Sequence(index, list(tokens), len(tokens), list(tokens), signature=signature)


def advance(scheduler, ends):
    """Plans a step, does it, and returns the plan; sequence i ends at length `ends[i]`."""
    plan = scheduler.plan()
    ready = [item for item, _ in plan.read if item.unread == 0] + plan.written
    for item in ready:
        assert item.unread == 0
        item.tokens.append(item.index)
        if len(item.tokens) >= ends[item.index]:
            scheduler.finish(item)
    return plan


def every_request_ends_within_budget(kind, seed):
    rng = random.Random(seed)
    page, blocks = rng.choice([1, 2, 4]), rng.randint(6, 30)
    most = rng.randint(1, 8)
    budget = rng.randint(most + 1, most + 20)
    allocator = BlockAllocator(blocks, page_size=page)
    clock = Clock()
    group = rng.randint(1, most)
    scheduler = kind(
        allocator, max_sequences=most, token_budget=budget, group=group, max_wait=rng.choice([0.0, 5.0]), clock=clock
    )
    ends, arrivals, begun = {}, 40, []
    steps = 0
    while len(ends) < arrivals or scheduler.waiting or scheduler.running:
        if len(ends) < arrivals and rng.random() < 0.5:
            prompt = rng.randint(1, blocks * page - 1)
            item = sequence(len(ends), prompt, signature=rng.choice(["ct", "xray"]))
            ends[item.index] = rng.randint(prompt + 1, blocks * page)
            scheduler.add(item)
        clock.now += 1
        running = {item.index for item in scheduler.running}
        oldest = scheduler.running[0] if scheduler.running else None
        plan = advance(scheduler, ends)
        assert plan.cost <= budget
        assert len(plan.written) + len(plan.read) <= most
        assert oldest not in plan.preempted or oldest is None
        begun += [item.index for item, _ in plan.read if item.index not in running]
        steps += 1
        assert steps < 20_000, "somebody is stranded"
    assert set(begun) == set(range(arrivals))
    assert allocator.free == blocks
    assert not any(allocator._owners)


@pytest.mark.parametrize("seed", range(30))
def test_every_request_ends_within_budget_whatever_arrives(seed):
    every_request_ends_within_budget(Scheduler, seed)


def test_every_request_ends_not_where_only_full_groups_begin():
    """The printed scheduler waited for a full batch: the last requests of a kind were stranded."""

    class Printed(Scheduler):
        def _ready(self):
            alike = sum(item.signature == self.waiting[0].signature for item in self.waiting)
            return len(self.running) < self.max_sequences and alike >= self.group

    with pytest.raises(AssertionError, match="somebody is stranded"):
        every_request_ends_within_budget(Printed, 0)


def test_first_come_first_served_within_a_kind():
    allocator = BlockAllocator(100, page_size=4)
    scheduler = Scheduler(allocator, max_sequences=3, token_budget=16)
    ends = {index: 12 + index % 5 for index in range(12)}
    for index in range(12):
        scheduler.add(sequence(index, 8))
    begun = []
    while scheduler.waiting or scheduler.running:
        plan = advance(scheduler, ends)
        begun += [item.index for item, _ in plan.read if item.index not in begun]
    assert begun == list(range(12))


def test_a_rare_kind_is_not_starved_by_a_stream_of_a_common_one():
    allocator = BlockAllocator(1000, page_size=4)
    scheduler = Scheduler(allocator, max_sequences=2, token_budget=16)
    ends = {0: 10}
    scheduler.add(sequence(0, 4, signature="common"))
    advance(scheduler, ends)
    scheduler.add(sequence(1, 4, signature="rare"))
    ends[1] = 6
    for index in range(2, 60):
        ends[index] = 10
        scheduler.add(sequence(index, 4, signature="common"))
        if any(item.index == 1 for item, _ in advance(scheduler, ends).read):
            return
        assert index < 20
    raise AssertionError("never read")


def test_prompts_read_together_are_of_one_kind():
    scheduler = Scheduler(BlockAllocator(100, page_size=4), max_sequences=8, token_budget=64)
    for index in range(8):
        scheduler.add(sequence(index, 4, signature="ct" if index % 2 else "xray"))
    plans = [advance(scheduler, dict.fromkeys(range(8), 20)) for _ in range(2)]
    assert [[item.index for item, _ in plan.read] for plan in plans] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_group_is_waited_for_until_the_deadline():
    clock = Clock()
    allocator = BlockAllocator(100, page_size=4)
    scheduler = Scheduler(allocator, max_sequences=8, token_budget=64, group=3, max_wait=10.0, clock=clock)
    ends = dict.fromkeys(range(8), 30)
    scheduler.add(sequence(0, 4))
    assert len(advance(scheduler, ends).read) == 1  # nothing else is to be done: no waiting
    scheduler.add(sequence(1, 4))
    for clock.now in (1.0, 5.0, 10.9):
        assert not advance(scheduler, ends).read
    clock.now = 11.0
    assert len(advance(scheduler, ends).read) == 1  # the deadline: 10 seconds after it could have begun
    scheduler.add(sequence(2, 4))
    scheduler.add(sequence(3, 4))
    assert not advance(scheduler, ends).read
    scheduler.add(sequence(4, 4))
    assert len(advance(scheduler, ends).read) == 3  # the group is full


def test_a_group_also_waits_for_room_to_be_read_together():
    clock = Clock()
    scheduler = Scheduler(
        BlockAllocator(100, page_size=4), max_sequences=4, token_budget=64, group=2, max_wait=10.0, clock=clock
    )
    ends = {index: 8 + index for index in range(8)}
    for index in range(8):
        scheduler.add(sequence(index, 4))
    begun = []
    while scheduler.waiting or scheduler.running:
        begun.append(len(advance(scheduler, ends).read))
    assert set(begun) == {0, 2, 4}
    assert sum(begun) == 8


def test_a_long_prompt_is_read_in_pieces_while_others_write():
    scheduler = Scheduler(BlockAllocator(100, page_size=4), max_sequences=2, token_budget=10)
    ends = {0: 40, 1: 60}
    scheduler.add(sequence(0, 4))
    advance(scheduler, ends)
    scheduler.add(sequence(1, 30))
    for _ in range(4):
        plan = advance(scheduler, ends)
        assert [item.index for item in plan.written] == [0]
        assert plan.read[0][1] <= 9
    assert plan.read[0][0].unread == 1


def test_the_same_beginning_is_read_once_even_when_asked_for_at_once():
    scheduler = Scheduler(BlockAllocator(100, page_size=4), max_sequences=8, token_budget=256)
    common = list(range(500, 516))
    for index in range(4):
        scheduler.add(sequence(index, 0, content=[*common, 600 + index, 700 + index]))
    ends = dict.fromkeys(range(4), 30)
    counts = [[count for _, count in advance(scheduler, ends).read] for _ in range(2)]
    assert counts == [[18], [2, 2, 2]]


def test_preempted_ones_keep_their_words_and_take_turns_by_age():
    allocator = BlockAllocator(6, page_size=2)
    scheduler = Scheduler(allocator, max_sequences=3, token_budget=20)
    ends, lost = dict.fromkeys(range(3), 12), []
    for index in range(3):
        scheduler.add(sequence(index, 2))
    finished = []
    while scheduler.waiting or scheduler.running:
        before = {item.index: list(item.tokens) for item in scheduler.running}
        plan = advance(scheduler, ends)
        lost += [item.index for item in plan.preempted]
        assert all(item.tokens == before[item.index] for item in plan.preempted)
        finished += [i for i in before if i not in {s.index for s in [*scheduler.running, *scheduler.waiting]}]
    assert lost
    assert 0 not in lost
    assert finished == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sequences": 0}, "max_sequences must be at least 1, got 0"),
        ({"token_budget": 4}, r"token_budget must be above max_sequences \(4\).*got 4"),
        ({"group": 5}, r"group must be 1\.\.4 \(max_sequences\), got 5"),
        ({"max_wait": -1.0}, "max_wait must be 0 or more seconds, got -1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Scheduler(BlockAllocator(4, page_size=4), **{"max_sequences": 4, "token_budget": 64} | options)


def test_an_empty_prompt_is_refused():
    scheduler = Scheduler(BlockAllocator(4, page_size=4), max_sequences=4, token_budget=64)
    with pytest.raises(ValueError, match="a prompt must have at least 1 token, got 0"):
        scheduler.add(Sequence(0, [], 0, []))
