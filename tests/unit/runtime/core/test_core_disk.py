"""The disk tier's accounts under any order of wishes and events, and its decisions one by one."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_serving.runtime.core import disk as core_disk
from mlx_serving.runtime.core import invariants
from mlx_serving.runtime.core.disk import (
    BlockFile,
    DiskTier,
    Found,
    Lost,
    NotWritten,
    Read,
    Scanned,
    Written,
    patience_s,
)
from mlx_serving.runtime.core.plan import Limits, Sampled, StepPlan, StepResult
from mlx_serving.runtime.core.prefix import Block, PrefixIndex, extend_keys
from mlx_serving.runtime.core.scheduler import Scheduler
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.types import SamplingParams

SIZE = 10
"""Bytes of a block's file."""


def chain(index: PrefixIndex, tokens: list[int]) -> list[Block]:
    """Blocks of one token each, published one behind the other."""
    keys: list[bytes] = []
    extend_keys(keys, None, tokens, 1)
    found = index.find(keys, len(keys))
    for at in range(len(found), len(keys)):
        if found:
            index.hold(found[-1])
        block = index.add(found[-1] if found else None, keys[at], at)
        if found:
            index.release(found[-1])
        assert block is not None
        found.append(block)
    return found


def written(tier: DiskTier, index: PrefixIndex) -> list[BlockFile]:
    """Let everything be written that is ordered."""
    files = []
    while orders := tier.orders(index, ()):
        for file, _ in orders.write:
            tier.take(Written(file.key, SIZE))
            files.append(file)
    return files


def tier_of(blocks: int) -> tuple[DiskTier, PrefixIndex]:
    tier = DiskTier(blocks * SIZE, SIZE, 1)
    tier.tick(0.0)
    return tier, PrefixIndex(100, 1)


def test_parents_are_written_first_and_nothing_twice() -> None:
    tier, memory = tier_of(10)
    blocks = chain(memory, [1, 2, 3])
    tier.offer(blocks[2])
    assert [file.position for file in written(tier, memory)] == [0, 1, 2]
    for block in blocks:
        tier.offer(block)
    assert not tier.orders(memory, ()) and tier.bytes == 3 * SIZE


def test_what_was_evicted_from_memory_before_its_turn_is_not_written() -> None:
    tier, memory = tier_of(10)
    (block,) = chain(memory, [1])
    tier.offer(block)
    memory.remove(block)
    assert not tier.orders(memory, ()).write


def test_a_prefix_is_read_as_far_as_it_is_there() -> None:
    tier, memory = tier_of(10)
    blocks = chain(memory, [1, 2, 3, 4])
    for block in blocks:
        tier.offer(block)
    written(tier, memory)
    keys = [block.key for block in blocks]
    tier.take(Scanned(tuple(found(block) for block in blocks if block.position != 2)))
    assert tier.read_ahead(keys, 0, 4) == 2
    assert [file.key for file in tier.orders(memory, ()).read] == keys[:2]
    assert tier.read_ahead(keys, 0, 4) == 2, "on their way already"
    assert not tier.orders(memory, ()).read
    tier.take(Read(keys[0]))
    tier.take(Lost(keys[1]))
    assert tier.arrivals() == keys[:1] and not tier.reading
    assert tier.read_ahead(keys, 1, 4) == 0


def test_what_is_gone_while_it_is_read_is_written_only_after_the_answer() -> None:
    tier, memory = tier_of(10)
    (block,) = chain(memory, [1])
    tier.offer(block)
    written(tier, memory)
    assert tier.read_ahead([block.key], 0, 1) == 1 and tier.orders(memory, ()).read
    tier.take(Scanned(()))
    tier.offer(block)
    assert not tier.orders(memory, ()).write
    tier.take(Lost(block.key))
    tier.offer(block)
    assert [file.key for file in written(tier, memory)] == [block.key]


def found(block: Block, age_s: float = 0.0) -> Found:
    parent = b"" if block.parent is None else block.parent.key
    file = BlockFile(block.key, parent, block.position)
    return Found(block.key.hex(), SIZE, age_s, file)


def test_the_least_valuable_leaf_gives_way() -> None:
    tier, memory = tier_of(3)
    used, unused = chain(memory, [1, 2]), chain(memory, [3])
    for block in (*used, *unused):
        tier.offer(block)
    written(tier, memory)
    tier.use([block.key for block in used])
    (third,) = chain(memory, [4])
    tier.offer(third)
    orders = tier.orders(memory, ())
    assert [one.key for one in orders.drop if isinstance(one, BlockFile)] == [unused[0].key]
    assert tier.bytes == 3 * SIZE


def test_between_models_the_one_used_longest_ago_gives_way() -> None:
    tier, memory = tier_of(3)
    mine = chain(memory, [1])[0]
    others = (Found("a", SIZE, 50.0), Found("b", SIZE, 5.0))
    tier.take(Scanned((*others, found(mine, age_s=20.0))))
    blocks = [chain(memory, [token])[0] for token in (2, 3, 4)]
    dropped = []
    for block in blocks:
        tier.tick(tier.now_s + 1)
        tier.offer(block)
        dropped += tier.orders(memory, ()).drop
        tier.take(Written(block.key, SIZE))
    names = [one if isinstance(one, str) else one.key for one in dropped]
    assert names == ["a", mine.key, "b"]


def test_files_of_an_earlier_run_are_cut_to_the_bound_at_once() -> None:
    tier, memory = tier_of(2)
    blocks = chain(memory, [1, 2, 3, 4])
    tier.take(Scanned(tuple(found(block) for block in reversed(blocks))))
    assert tier.behind
    gone = tier.orders(memory, ()).drop
    assert [one.position for one in gone if isinstance(one, BlockFile)] == [3, 2]
    assert tier.bytes == 2 * SIZE


def test_an_old_file_whose_parent_is_not_there_goes() -> None:
    tier, memory = tier_of(9)
    blocks = chain(memory, [1, 2, 3])
    tier.take(Scanned((found(blocks[1], age_s=1.0), found(blocks[2], age_s=1000.0))))
    assert not tier.files and tier.bytes == SIZE
    assert [one.position for one in tier.orders(memory, ()).drop] == [2]  # type: ignore[union-attr]


def test_after_a_failed_write_the_disk_is_left_in_peace() -> None:
    tier, memory = tier_of(9)
    blocks = chain(memory, [1, 2])
    tier.offer(blocks[0])
    assert tier.orders(memory, ()).write
    tier.take(NotWritten(blocks[0].key))
    tier.offer(blocks[1])
    assert not tier.orders(memory, ()) and tier.counts.not_written == 2
    tier.tick(core_disk.RETRY_AFTER_S + 1)
    tier.offer(blocks[1])
    assert [file.position for file in written(tier, memory)] == [0, 1]


def test_copies_for_a_disk_that_stands_still_are_bounded_and_given_up() -> None:
    size = core_disk.STAGED_BYTES // 2
    tier, memory = DiskTier(100 * size, size, 1), PrefixIndex(100, 1)
    for block in chain(memory, list(range(5))):
        tier.offer(block)
    assert len(tier.orders(memory, ()).write) == 2 and tier.behind
    assert not tier.orders(memory, ())
    tier.tick(core_disk.STUCK_AFTER_S + 1)
    assert not tier.behind and tier.counts.not_written == 3


def test_clear_deletes_what_nobody_uses() -> None:
    tier, memory = tier_of(9)
    blocks = chain(memory, [1, 2, 3])
    for block in blocks:
        tier.offer(block)
    written(tier, memory)
    tier.read_ahead([blocks[0].key], 0, 1)
    tier.clear()
    assert len(tier.orders(memory, ()).drop) == 2
    assert list(tier.files) == [blocks[0].key]
    assert tier.counts.evicted == 0, "it was not for room"


@pytest.mark.parametrize(
    ("tokens", "rate", "expected"),
    [
        (0, 1.0, core_disk.MIN_PATIENCE_S),
        (5000, 0.002, 10.0),
        (10**6, 1.0, core_disk.MAX_PATIENCE_S),
    ],
)
def test_nobody_waits_much_longer_than_computing_takes(
    tokens: int, rate: float, expected: float
) -> None:
    assert patience_s(tokens, rate) == expected


class Tiers(RuleBasedStateMachine):
    """A scheduler, and a runner and a disk that do as they please."""

    @initialize(
        memory=st.integers(1, 12),
        disk=st.integers(0, 15),
        rows=st.integers(1, 3),
        depth=st.booleans(),
    )
    def begin(self, memory: int, disk: int, rows: int, depth: bool) -> None:
        self.limits = Limits(
            max_num_seqs=rows,
            prefill_step_size=4,
            context_length=40,
            kv_capacity_tokens=rows * 48,
            kv_bucket_tokens=16,
            prefix_blocks=memory,
            prefix_block_tokens=2,
            disk_block_bytes=SIZE,
            disk_bytes=disk * SIZE,
        )
        self.depth = 1 + depth
        self.files: dict[bytes, BlockFile] = {}
        self.staged: set[bytes] = set()
        self.seq_id = 0
        self.start()

    def start(self) -> None:
        names = [Found(k.hex(), SIZE, 0.0, file) for k, file in self.files.items()]
        self.scheduler = Scheduler(self.limits, Scanned(tuple(names)))
        self.pending: list[StepPlan] = []
        self.orders: list[tuple[str, BlockFile]] = []
        self.events: list[core_disk.DiskEvent] = []
        self.staged.clear()
        self.now_s = 0.0

    @rule(trunk=st.integers(0, 2), cut=st.integers(0, 20), tail=st.integers(1, 3))
    def submit(self, trunk: int, cut: int, tail: int) -> None:
        tokens = [trunk] * cut + [7 + tail] * tail
        sampling = SamplingParams(max_tokens=3, ignore_eos=True)
        self.scheduler.add(
            Sequence(seq_id=self.seq_id, tokens=tokens, prompt_len=len(tokens), sampling=sampling)
        )
        self.seq_id += 1

    @rule(which=st.integers(0, 50))
    def cancel(self, which: int) -> None:
        self.scheduler.cancel(which)

    @rule(passed_s=st.sampled_from([0.1, 2.0, 40.0]))
    def launch(self, passed_s: float) -> None:
        self.now_s += passed_s
        if len(self.pending) >= self.depth:
            return
        plan = self.scheduler.schedule(self.now_s)
        if plan is None:
            return
        self.pending.append(plan)
        self.staged.difference_update(plan.disk.forget)
        for key, _ in plan.disk.fill:
            self.staged.remove(key)
        for one in plan.disk.drop:
            assert isinstance(one, BlockFile)
            self.files.pop(one.key, None)
        self.orders += [("read", file) for file in plan.disk.read]
        self.orders += [("write", file) for file, _ in plan.disk.write]

    @precondition(lambda self: self.pending)
    @rule()
    def deliver(self) -> None:
        plan = self.pending.pop(0)
        ids = [c.seq_id for c in plan.prefill if c.samples] + [d.seq_id for d in plan.decode]
        events, self.events = self.events, []
        result = StepResult(plan.step_id, [Sampled(i, [1]) for i in ids], events)
        self.scheduler.apply(result)

    @precondition(lambda self: not any(what == "write" for what, _ in self.orders))
    @rule(lost=st.booleans())
    def folder_is_looked_through(self, lost: bool) -> None:
        if lost:
            self.files.clear()
        found = [Found(k.hex(), SIZE, 0.0, file) for k, file in self.files.items()]
        self.events.append(Scanned(tuple(found)))

    @precondition(lambda self: self.orders)
    @rule(works=st.booleans())
    def disk_gets_on(self, works: bool) -> None:
        what, file = self.orders.pop(0)
        if what == "write":
            if works:
                self.files[file.key] = file
                held = len(self.files) * SIZE
                assert held <= self.limits.disk_bytes, "more files than may be"
            self.events.append(Written(file.key, SIZE) if works else NotWritten(file.key))
        elif works and file.key in self.files:
            self.staged.add(file.key)
            self.events.append(Read(file.key))
        else:
            self.files.pop(file.key, None)
            self.events.append(Lost(file.key))

    @rule()
    def worker_dies(self) -> None:
        self.start()

    @rule()
    def step_fails(self) -> None:
        self.pending.clear()
        self.scheduler.reset()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "scheduler"):
            invariants.check(self.scheduler)
            assert self.staged <= self.scheduler.sharing.disk.reading


Tiers.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestTiers = Tiers.TestCase
