"""What sequences do with the prefix index: copy what is known, publish what they compute.

Nothing here waits for the device. It executes plans in the order of launching, so a block may be
copied from as soon as the plan that publishes it is launched, and may be given to another prefix
while an earlier plan still copies from it.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from mlx_serving.runtime.core.disk import DiskOrders, DiskTier, patience_s
from mlx_serving.runtime.core.plan import Limits, Publish
from mlx_serving.runtime.core.prefix import (
    Block,
    PrefixIndex,
    extend_keys,
    most_blocks,
    pool_blocks,
)
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.types import CacheStats


class Sharing:
    """A running sequence holds the last block of its own prefix (`tip`), and promises the blocks that
    its prefill will publish: who needs the next of those waits for it instead of computing it too."""

    def __init__(self, limits: Limits) -> None:
        self.index = PrefixIndex(limits.prefix_blocks, limits.prefix_block_tokens)
        self.disk = DiskTier(
            limits.disk_bytes if limits.prefix_blocks else 0,
            limits.disk_block_bytes,
            limits.prefix_block_tokens,
        )
        self.promised: dict[bytes, Sequence] = {}
        self.memory_hit_tokens = self.disk_hit_tokens = self.miss_tokens = 0
        self._block_bytes = limits.prefix_block_bytes
        self._most_blocks = limits.prefix_blocks
        self._newcomers: list[Sequence] = []
        self._fills: dict[int, bytes] = {}
        """By block."""
        self._enabled = limits.prefix_blocks > 0
        self._whole_chunks = limits.prefix_whole_chunks
        assert not self._whole_chunks or self.block_tokens == limits.prefill_step_size

    @property
    def block_tokens(self) -> int:
        return self.index.block_tokens

    def find(self, seq: Sequence) -> list[Block] | None:
        """The blocks to begin with; at least one token is left to compute. None: wait, for the block that
        comes next is being computed by a sequence before it in order, or is on its way from disk."""
        if not self._serves(seq):
            return []
        most = self._most(seq)
        found = self.index.find(seq.keys, most)
        if len(found) < most:
            key = seq.keys[len(found)]
            owner = self.promised.get(key)
            if owner is not None and not owner.paused and owner.order < seq.order:
                return None
            if key in self.disk.reading:
                if self.disk.now_s < seq.reads_until_s:
                    if seq.disk_since_s is None:
                        seq.disk_since_s = self.disk.now_s
                    return None
                self.disk.late()
        return found

    def _most(self, seq: Sequence) -> int:
        """Blocks that it may begin with."""
        extend_keys(seq.keys, seq.salt, seq.tokens, self.block_tokens, seq.adapter)
        return (len(seq.tokens) - 1) // self.block_tokens

    def hash(self, seq: Sequence) -> None:
        """The keys of a prompt's blocks, ahead of when they are needed."""
        if self._serves(seq):
            self._most(seq)

    def expect(self, seq: Sequence) -> None:
        """It waits for a row: have read what memory lacks of its prefix."""
        if self.disk and self._serves(seq):
            self._newcomers.append(seq)

    def orders(self) -> DiskOrders:
        """Of the step being planned, once everything else of it is decided."""
        fills, self._fills = self._fills, {}
        return self.disk.orders(self.index, tuple((key, block) for block, key in fills.items()))

    @property
    def held_bytes(self) -> int:
        """What the pool of blocks takes."""
        index = self.index
        given_out = len(index) + len(index.spare)
        return pool_blocks(given_out, self._most_blocks) * self._block_bytes

    def fit(self, prefix_bytes: int) -> tuple[int, ...] | None:
        """Keep to so many bytes: the blocks that stay, by their ids until now; None: all do."""
        if not self._enabled or not self._block_bytes:
            return None
        return self.index.shrink(most_blocks(prefix_bytes // self._block_bytes, self._most_blocks))

    def bound(self, prefix_bytes: int) -> None:
        """Grow to so many bytes at most, until the next `fit`; what is held stays."""
        if self._enabled and self._block_bytes:
            most = most_blocks(max(0, prefix_bytes) // self._block_bytes, self._most_blocks)
            self.index.bound(most)

    def prepare(self, now_s: float, prefill_s_per_token: float) -> None:
        """Before a step is planned: take in what was read, order what newcomers lack."""
        if not self.disk:
            return
        self.disk.tick(now_s)
        for key in self.disk.arrivals():
            self._fill(key)
        newcomers, self._newcomers = self._newcomers, []
        for seq in newcomers:
            most = min(self._most(seq), self.index.capacity)
            first = len(self.index.find(seq.keys, most))
            ordered = self.disk.read_ahead(seq.keys, first, most)
            tokens = ordered * self.block_tokens
            seq.reads_until_s = now_s + patience_s(tokens, prefill_s_per_token)

    def _fill(self, key: bytes) -> None:
        """Give a block that was read a place in memory, behind the one before it."""
        on_disk = self.disk.index.blocks.get(key)
        parent = None
        if on_disk is not None and on_disk.parent is not None:
            parent = self.index.blocks.get(on_disk.parent.key)
        orphan = on_disk is None or (parent is None and on_disk.parent is not None)
        if orphan or key in self.index.blocks:
            self.disk.forget((key,))
            return
        assert on_disk is not None
        if parent is not None:
            self.index.hold(parent)
        block = self.index.add(parent, key, on_disk.position)
        if parent is not None:
            self.index.release(parent)
        if block is None:
            self.disk.forget((key,))
            return
        block.from_disk = True
        if block.id in self._fills:
            # Of a block that was evicted in the same step.
            self.disk.forget((self._fills.pop(block.id),))
        self._fills[block.id] = key

    def begin(self, seq: Sequence, found: Items[Block]) -> None:
        """It takes a row, and `found` is copied into it."""
        if not self._serves(seq):
            return
        assert seq.tip is None and seq.computed == 0
        seq.shared = len(found)
        seq.computed = seq.reused = len(found) * self.block_tokens
        if found:
            seq.tip = found[-1]
            self.index.hold(seq.tip)
            self.index.use(found)
            self.disk.use(seq.keys[: len(found)])
            for block in found:
                # It may have been evicted there, or never got so far.
                self.disk.offer(block)
        self._count(seq, found)
        for key in seq.keys[len(found) :]:
            self.promised.setdefault(key, seq)
        seq.promises = True

    def _count(self, seq: Sequence, found: Items[Block]) -> None:
        """What a sequence's first row begins with, by tier."""
        if seq.admitted_s is None:
            read = sum(block.from_disk for block in found)
            self.disk_hit_tokens += read * self.block_tokens
            self.memory_hit_tokens += (len(found) - read) * self.block_tokens
            self.miss_tokens += max(0, seq.prompt_len - seq.reused)
        for block in found:
            block.from_disk = False

    def forget_unused(self) -> None:
        """Drop every block that no sequence uses, and its file."""
        while (block := self.index.victim()) is not None:
            self.index.remove(block)
        self.disk.clear()

    def stats(self) -> CacheStats:
        disk, counts = self.disk, self.disk.counts
        return CacheStats(
            memory_blocks=len(self.index),
            memory_bytes=len(self.index) * self._block_bytes,
            memory_limit_bytes=self.index.capacity * self._block_bytes,
            disk_blocks=len(disk.files),
            disk_bytes=disk.bytes,
            disk_limit_bytes=disk.max_bytes,
            memory_hit_tokens=self.memory_hit_tokens,
            disk_hit_tokens=self.disk_hit_tokens,
            miss_tokens=self.miss_tokens,
            memory_evictions=self.index.evictions,
            disk_evictions=counts.evicted,
            disk_reads=counts.read,
            disk_writes=counts.written,
            disk_lost=counts.lost,
            disk_not_written=counts.not_written,
            disk_late=counts.late,
        )

    def advance(self, seq: Sequence, chunk: int = 0) -> Publish | None:
        """Its computed positions have advanced, by a prefill chunk of so many tokens if any."""
        size = self.block_tokens
        published = None
        done = min(seq.computed, len(seq.tokens)) // size
        if self._whole_chunks and not (chunk == size and done == seq.shared + 1):
            # What is there was computed otherwise than a prompt's own chunk would be.
            done = 0
        if done > seq.shared and self._serves(seq):
            published = self._publish(seq, done)
        if seq.promises and seq.wanted - seq.computed <= 1:
            self._withdraw(seq)
        return published

    def end(self, seq: Sequence) -> None:
        """It leaves its row; its blocks stay."""
        self._withdraw(seq)
        if seq.tip is not None:
            self.index.release(seq.tip)
        seq.tip = None
        seq.shared = seq.reused = 0

    def clear(self) -> None:
        """The runner has forgotten every block. No sequence has a row any more."""
        assert not self.promised
        self.index.clear()
        self._fills.clear()
        self.disk.reset()

    def _serves(self, seq: Sequence) -> bool:
        return self._enabled and not seq.pooled

    def _publish(self, seq: Sequence, done: int) -> Publish | None:
        """Blocks that are known already come first: a child never outlives its parent."""
        size, index = self.block_tokens, self.index
        extend_keys(seq.keys, seq.salt, seq.tokens, size, seq.adapter)
        new: list[int] = []
        for at in range(seq.shared, done):
            key = seq.keys[at]
            block = index.blocks.get(key)
            if block is None:
                block = index.add(seq.tip, key, at * size)
                if block is None:
                    self._withdraw(seq)
                    break
                new.append(block.id)
                self.disk.offer(block)
            else:
                assert not new
            index.hold(block)
            if seq.tip is not None:
                index.release(seq.tip)
            seq.tip, seq.shared = block, at + 1
            if self.promised.get(key) is seq:
                del self.promised[key]
        seq.kept = max(seq.kept, min(seq.shared * size, seq.prompt_len))
        if not new:
            return None
        assert seq.row is not None
        return Publish(seq.row, seq.seq_id, (seq.shared - len(new)) * size, tuple(new))

    def _withdraw(self, seq: Sequence) -> None:
        if seq.promises:
            seq.promises = False
            for key in seq.keys[seq.shared :]:
                if self.promised.get(key) is seq:
                    del self.promised[key]
