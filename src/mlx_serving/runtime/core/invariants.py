"""What holds for a scheduler between any two calls. O(sequences): for simulation and tests."""

from __future__ import annotations

from collections import Counter

from mlx_serving.runtime.core.memory import Room
from mlx_serving.runtime.core.plan import MAX_FORCED
from mlx_serving.runtime.core.scheduler import Scheduler
from mlx_serving.runtime.core.sequence import Sequence, Status


def check(scheduler: Scheduler) -> None:
    """Raises AssertionError naming the first relation that does not hold."""
    _check_rows(scheduler)
    _check_queue(scheduler)
    _check_prefix(scheduler)
    _check_disk(scheduler)
    for seq_id, seq in scheduler.sequences.items():
        assert seq.seq_id == seq_id
        _check_quantity(seq, scheduler)
    inflight = sum(seq.inflight + seq.foreseen for seq in scheduler.sequences.values())
    sampled = sum(samples for _, samples in scheduler.launched)
    assert inflight <= sampled, "more tokens in flight than launched steps sample"


def check_room(scheduler: Scheduler, room: Room, pool_bytes: int) -> None:
    """After a plan in this room, before which the pool of blocks took so much."""
    sharing, limits = scheduler.sharing, scheduler.limits
    kv_bytes = scheduler.kv_tokens * limits.kv_bytes_per_token
    assert kv_bytes <= room.kv_bytes, "more is held than was granted"
    most = room.prefix_bytes // max(1, limits.prefix_block_bytes)
    assert sharing.index.capacity <= max(most, len(sharing.index))
    left = room.total_bytes - kv_bytes
    assert sharing.held_bytes <= max(pool_bytes, left), "the pool outgrew its room"


def _check_rows(scheduler: Scheduler) -> None:
    rows, limits = scheduler.rows, scheduler.limits
    holes = 0
    for index, seq in enumerate(rows.slots):
        if seq is None:
            holes += 1
            continue
        assert seq.row == index, f"row {index} holds {seq.seq_id}, which says {seq.row}"
        assert scheduler.sequences.get(seq.seq_id) is seq, f"row {index} leaked"
    running = sum(seq.status is Status.RUNNING for seq in scheduler.sequences.values())
    assert running == len(rows) == len(rows.slots) - holes, "rows are not conserved"
    assert len(rows.slots) <= limits.max_num_seqs
    assert holes == 0 or rows.unsettled, "a hole that no plan will report"
    assert scheduler.kv_tokens <= limits.kv_capacity_tokens, "KV memory overdrawn"


def _check_queue(scheduler: Scheduler) -> None:
    queue = scheduler.queue
    live = [seq for seq in scheduler.sequences.values() if seq.status is Status.WAITING]
    assert scheduler.waiting == len(live)
    assert all(seq.queued or seq.held for seq in live), "a waiting sequence is in no queue"
    assert sum(seq.queued for seq in scheduler.sequences.values()) <= len(queue) <= queue.bound
    assert scheduler.held == sum(seq.held for seq in scheduler.sequences.values())
    compiling = [seq for seq in scheduler.sequences.values() if seq.compiling]
    early = [seq for seq in compiling if seq.queued or seq.row is not None]
    assert not early, "a sequence whose grammar is not there could begin"


def _check_prefix(scheduler: Scheduler) -> None:
    """Every block that was ever given out is known, once; none in use was freed."""
    sharing, index = scheduler.sharing, scheduler.sharing.index
    ids = sorted([block.id for block in index.blocks.values()] + index.spare)
    assert ids == list(range(len(ids))), "a block was leaked or is used twice"
    assert len(index) <= len(ids) <= index.capacity
    children = Counter(b.parent.key for b in index.blocks.values() if b.parent is not None)
    holders = Counter(s.tip.key for s in scheduler.sequences.values() if s.tip is not None)
    for key, block in index.blocks.items():
        assert block.key == key and block.children == children.pop(key, 0)
        assert block.holders == holders.pop(key, 0)
        assert block.offered or not block.evictable, "a block can never be evicted"
    assert not children and not holders, "a block in use was freed"
    for key, seq in sharing.promised.items():
        assert seq.promises and key in seq.keys[seq.shared :]
        assert seq.status is Status.RUNNING and seq.wanted - seq.computed > 1
    for seq in scheduler.sequences.values():
        assert (seq.tip is None) == (seq.shared == 0), f"sequence {seq.seq_id}"
        assert seq.tip is None or seq.keys[seq.shared - 1] == seq.tip.key


def _check_disk(scheduler: Scheduler) -> None:
    """Every file is counted once, and stays while it is read or written."""
    disk = scheduler.sharing.disk
    blocks = disk.index.blocks
    children = Counter(b.parent.key for b in blocks.values() if b.parent is not None)
    assert disk.files.keys() | disk.lost == blocks.keys()
    assert not disk.files.keys() & disk.lost
    total = sum(file.bytes for file in disk.files.values())
    assert disk.bytes == total + sum(size for _, _, size in disk.others)
    waiting = disk.reading.difference(disk.arrived)
    assert disk.writing <= disk.files.keys() and not disk.writing & disk.reading
    for key, block in blocks.items():
        assert block.holders == (key in disk.writing) + (key in waiting), (
            "a file may be deleted in use"
        )
        assert block.children == children[key]
        assert block.parent is None or blocks[block.parent.key] is block.parent
        assert key not in disk.lost or not block.evictable, "kept for nothing"


def _check_quantity(seq: Sequence, scheduler: Scheduler) -> None:
    name = f"sequence {seq.seq_id}"
    behind = seq.wanted - seq.computed
    assert seq.status is not Status.FINISHED, f"{name} has ended and is kept"
    assert (seq.status is Status.RUNNING) == (seq.row is not None), f"{name} runs without a row"
    assert 0 < seq.prompt_len <= len(seq.tokens) < seq.limit <= scheduler.context_length, name
    inflight = seq.inflight + seq.foreseen
    assert min(seq.inflight, seq.foreseen) >= 0 and inflight <= len(scheduler.launched), name
    assert behind >= 1 and seq.wanted <= seq.limit, f"{name} computed more than is wanted"
    if seq.row is None:
        assert seq.computed == 0 and seq.status is not Status.RUNNING, name
    elif behind > 1 and not seq.prefills:
        assert seq.inflight == 0 and behind <= MAX_FORCED, f"{name} was forced too far ahead"
    elif behind > 1:
        assert seq.inflight == 0, f"{name} samples before its prefill is complete"
        limits = scheduler.limits
        cut = seq.computed % (limits.prefill_grain or limits.prefill_step_size) == 0
        assert cut or seq.computed == seq.reused, f"{name} cut elsewhere"
