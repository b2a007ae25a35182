"""Which prefix blocks are on disk, and which should be: the tier below the blocks in memory.

Every published block is written behind, parents first, while there is room for its copy; a waiting
sequence's prefix is read back into memory as far as the disk has it. Orders go out with a plan,
what came of them comes back with results. Nothing here waits for a file: what is slow, lost or
broken is computed instead.

Bytes are bounded by what the folder held when it was last looked through plus what was written
since, files of other models and versions included. Between models the one used longest ago gives
way; within this one the block of least value does, as in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import assert_never

from mlx_serving.runtime.core.prefix import Block, PrefixIndex

STAGED_BYTES = 64 * 1024 * 1024
"""Copies that may wait for the disk to write them."""
MAX_READS = 4096
"""Blocks that may be on their way from disk."""
RETRY_AFTER_S = 30.0
"""How long nothing is written after a write failed, and nothing read after reads came too late."""
STUCK_AFTER_S = 10.0
"""What the disk does not take for so long is not written."""
MIN_PATIENCE_S, MAX_PATIENCE_S = 1.0, 30.0
ORPHAN_S = 60.0
"""A block younger than this may be there before the one in front of it."""
_UNBOUNDED = 1 << 62


@dataclass(frozen=True, slots=True)
class BlockFile:
    """What a block's file is called by."""

    key: bytes
    parent: bytes
    """Empty: it is a prefix's first block."""
    position: int
    """Of its first token."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file that was there: a block of this model, or (`block` is None) another model's."""

    name: str
    bytes: int
    age_s: float
    """Since it was last used."""
    block: BlockFile | None = None


@dataclass(frozen=True, slots=True)
class Scanned:
    """All files in the folder."""

    files: tuple[Found, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """The block is staged: `fill` or `forget` it."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Lost:
    """The block's file is not there, or not whole."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Written:
    key: bytes
    bytes: int


@dataclass(frozen=True, slots=True)
class NotWritten:
    key: bytes


DiskEvent = Scanned | Read | Lost | Written | NotWritten


@dataclass(frozen=True, slots=True)
class DiskOrders:
    """What a plan asks of the disk. Fills come before the plan's starts, writes after its publications."""

    fill: tuple[tuple[bytes, int], ...] = ()
    """(key, block in memory): put what was read there."""
    forget: tuple[bytes, ...] = ()
    """Staged and not wanted any more."""
    read: tuple[BlockFile, ...] = ()
    write: tuple[tuple[BlockFile, int], ...] = ()
    """(file, block in memory)."""
    drop: tuple[BlockFile | str, ...] = ()
    """Delete the file; other models' by name."""
    wait: bool = False
    """There is nothing else to do: the step ends when the disk has got on, or a moment later."""

    def __bool__(self) -> bool:
        return bool(self.fill or self.forget or self.read or self.write or self.drop or self.wait)


NO_ORDERS = DiskOrders()


@dataclass(slots=True)
class _File:
    bytes: int
    used_s: float


@dataclass(slots=True)
class DiskCounts:
    """Since the model was loaded, in blocks."""

    read: int = 0
    written: int = 0
    lost: int = 0
    """Missing, truncated, corrupt or foreign when they were read."""
    not_written: int = 0
    """The disk was full, gone or too slow."""
    evicted: int = 0
    """Deleted for the bound on bytes."""
    late: int = 0
    """Read, but nobody could wait so long."""


class DiskTier:
    """`max_bytes` 0: there is no disk tier, and nothing is ever ordered."""

    def __init__(self, max_bytes: int, block_bytes: int, block_tokens: int) -> None:
        self.max_bytes = max_bytes
        self.index = PrefixIndex(_UNBOUNDED, block_tokens)
        self.files: dict[bytes, _File] = {}
        """Of this model, by key: those there and those being written."""
        self.others: deque[tuple[float, str, int]] = deque()
        """Other models': (when it was last used, name, bytes), the oldest first."""
        self.bytes = 0
        """Of all files."""
        self.lost: set[bytes] = set()
        """In the index, for the blocks behind them, but not on disk."""
        self.writing: set[bytes] = set()
        self.reading: set[bytes] = set()
        self.arrived: list[bytes] = []
        self.counts = DiskCounts()
        self.now_s = 0.0
        self._block_bytes = block_bytes
        self._unwritten: dict[bytes, Block] = {}
        self._reads: list[BlockFile] = []
        self._drops: list[BlockFile | str] = []
        self._forgets: list[bytes] = []
        self._no_writes_until_s = self._no_reads_until_s = float("-inf")
        self._advanced_s = 0.0

    def __bool__(self) -> bool:
        return self.max_bytes > 0

    # -- what sequences want ------------------------------------------------------------------

    def offer(self, block: Block) -> None:
        """A block was published in memory: write it when there is room."""
        if self and not self._stored(block.key):
            self._unwritten[block.key] = block

    def use(self, keys: Iterable[bytes]) -> None:
        """Blocks were found, wherever: their files are worth more."""
        known = [self.index.blocks[key] for key in keys if self._stored(key)]
        self.index.use(known)
        for block in known:
            self.files[block.key].used_s = self.now_s

    def read_ahead(self, keys: Sequence[bytes], first: int, most: int) -> int:
        """Order the blocks from `first` on that the disk has. Returns how many are on their way."""
        if not self or self.now_s < self._no_reads_until_s:
            return 0
        count = 0
        for key in keys[first:most]:
            if key not in self.reading:
                block = self.index.blocks.get(key)
                if block is None or not self._ready(key) or len(self.reading) >= MAX_READS:
                    break
                self.reading.add(key)
                self.index.hold(block)
                self._reads.append(_file(block))
            count += 1
        return count

    def late(self) -> None:
        """A sequence could not wait any longer."""
        if self.now_s >= self._no_reads_until_s:
            self.counts.late += 1
            self._no_reads_until_s = self.now_s + RETRY_AFTER_S

    # -- the step -------------------------------------------------------------------------------

    def arrivals(self) -> list[bytes]:
        """What was read since the last time, parents first; each must be filled or forgotten."""
        arrived, self.arrived = self.arrived, []
        self.reading.difference_update(arrived)
        return arrived

    def forget(self, keys: Iterable[bytes]) -> None:
        self._forgets += keys

    def orders(self, memory: PrefixIndex, fill: tuple[tuple[bytes, int], ...]) -> DiskOrders:
        """For the step that is being planned."""
        if not self:
            return NO_ORDERS
        orders = DiskOrders(
            fill=fill,
            forget=tuple(self._forgets),
            read=tuple(self._reads),
            write=tuple(self._writes(memory)),
            drop=tuple(self._drops),
        )
        self._reads, self._forgets, self._drops = [], [], []
        return orders

    @property
    def behind(self) -> bool:
        """Blocks wait to be written, or files to be deleted."""
        return bool(self) and bool(self._unwritten or self._drops)

    def tick(self, now_s: float) -> None:
        self.now_s = now_s
        if not (self.writing and self._unwritten):
            self._advanced_s = now_s
        elif now_s > self._advanced_s + STUCK_AFTER_S:
            self._give_up()

    def reset(self) -> None:
        """The runner has forgotten its blocks. It still says what becomes of every write and read."""
        self._give_up()

    def clear(self) -> None:
        """Delete every file of this model that nobody is reading or writing."""
        self._unwritten.clear()
        evicted = self.counts.evicted
        while (victim := self.index.victim()) is not None:
            self._evict(victim)
        self.counts.evicted = evicted

    # -- what came of it ------------------------------------------------------------------------

    def take(self, event: DiskEvent) -> None:
        if not self:
            return
        self._advanced_s = self.now_s
        match event:
            case Scanned(files):
                self._scanned(files)
            case Read(key):
                self.counts.read += 1
                self._release(key)
                self.arrived.append(key)
                self.use((key,))
                self._prune(self.index.blocks[key])
            case Lost(key):
                self.counts.lost += 1
                self.reading.discard(key)
                self._release(key)
                self._missing(key)
            case Written(key, size):
                self.counts.written += 1
                self._written(key, size)
            case NotWritten(key):
                self.counts.not_written += 1
                self._no_writes_until_s = self.now_s + RETRY_AFTER_S
                self._give_up()
                self.writing.discard(key)
                self._release(key)
                self._missing(key)
            case _:
                assert_never(event)

    def _scanned(self, found: Sequence[Found]) -> None:
        """The folder is the truth, but for what is on its way."""
        there = {one.block.key for one in found if one.block is not None}
        known = there | self.writing | self.reading
        for key in [key for key in self.files if key not in known]:
            self._missing(key)
        mine = [one for one in found if one.block is not None]
        rank = {one.name: i / len(mine) for i, one in enumerate(sorted(mine, key=_youth))}
        others = [one for one in found if one.block is None]
        for one in sorted(mine, key=_position):
            assert one.block is not None
            if not self._adopt(one, one.block, rank[one.name]):
                others.append(one)
        self.others = deque(sorted((self.now_s - one.age_s, one.name, one.bytes) for one in others))
        self.bytes = sum(f.bytes for f in self.files.values())
        self.bytes += sum(size for _, _, size in self.others)
        self._make_room(0)

    def _adopt(self, one: Found, file: BlockFile, rank: float) -> bool:
        """A file of an earlier run, or of another server. False: what is before it is not there yet."""
        key = file.key
        if key in self.files:
            self.files[key].bytes = one.bytes
        elif key in self.index.blocks:
            self.lost.discard(key)
            self.files[key] = _File(one.bytes, self.now_s - one.age_s)
        elif file.parent and file.parent not in self.index.blocks:
            if one.age_s <= ORPHAN_S:
                return False
            self._drops.append(file)
        else:
            self._enter(file, one.bytes, self.now_s - one.age_s).value += rank
        return True

    def _enter(self, file: BlockFile, size: int, used_s: float) -> Block:
        parent = self.index.blocks[file.parent] if file.parent else None
        if parent is not None:
            self.index.hold(parent)
        block = self.index.add(parent, file.key, file.position)
        if parent is not None:
            self.index.release(parent)
        assert block is not None
        self.files[file.key] = _File(size, used_s)
        return block

    def _written(self, key: bytes, size: int) -> None:
        self.writing.discard(key)
        self._release(key)
        held = self.files[key]
        self.bytes += size - held.bytes
        held.bytes = size

    def _missing(self, key: bytes) -> None:
        """It is not on disk. Its entry stays while others are behind it."""
        block = self.index.blocks.get(key)
        if block is None:
            return
        file = self.files.pop(key, None)
        if file is not None:
            self.bytes -= file.bytes
        if block.evictable:
            self._remove(block)
        else:
            self.lost.add(key)

    def _remove(self, block: Block) -> None:
        self.lost.discard(block.key)
        self.index.remove(block)
        self._prune(block.parent)

    def _prune(self, block: Block | None) -> None:
        """Drop what was kept only for the blocks behind it."""
        if block is not None and block.key in self.lost and block.evictable:
            self._remove(block)

    def _release(self, key: bytes) -> None:
        self.index.release(self.index.blocks[key])

    # -- writing and room -------------------------------------------------------------------------

    def _writes(self, memory: PrefixIndex) -> Iterable[tuple[BlockFile, int]]:
        if self.now_s < self._no_writes_until_s:
            self._give_up()
        while self._unwritten and self._staged() + self._block_bytes <= STAGED_BYTES:
            key, block = next(iter(self._unwritten.items()))
            if memory.blocks.get(key) is not block or self._stored(key):
                del self._unwritten[key]
                continue
            # What is before it may have been evicted from the disk, or have got lost.
            while block.parent is not None and not self._stored(block.parent.key):
                block = block.parent
            self._unwritten.pop(block.key, None)
            if not self._room_behind(block.parent):
                self._give_up()
                return
            yield self._write(block), block.id

    def _room_behind(self, parent: Block | None) -> bool:
        """Make room for one more block, but not by what comes before it."""
        before = None if parent is None else self.index.blocks[parent.key]
        if before is not None:
            self.index.hold(before)
        room = self._make_room(self._block_bytes)
        if before is not None:
            self.index.release(before)
        return room

    def _write(self, block: Block) -> BlockFile:
        file = _file(block)
        key = block.key
        if key in self.index.blocks:
            self.lost.discard(key)
            self.files[key] = _File(self._block_bytes, self.now_s)
        else:
            self._enter(file, self._block_bytes, self.now_s)
        self.bytes += self._block_bytes
        self.index.hold(self.index.blocks[key])
        self.writing.add(key)
        return file

    def _staged(self) -> int:
        return len(self.writing) * self._block_bytes

    def _give_up(self) -> None:
        self.counts.not_written += len(self._unwritten)
        self._unwritten.clear()

    def _make_room(self, need: int) -> bool:
        while self.bytes + need > self.max_bytes:
            victim = self.index.victim()
            if self.others and (victim is None or self.others[0][0] <= self._used_s(victim)):
                _, name, size = self.others.popleft()
                self.bytes -= size
                self._drops.append(name)
                self.counts.evicted += 1
            elif victim is not None:
                self._evict(victim)
            else:
                return False
        return True

    def _used_s(self, block: Block) -> float:
        file = self.files.get(block.key)
        return float("-inf") if file is None else file.used_s

    def _evict(self, victim: Block) -> None:
        file = self.files.pop(victim.key, None)
        if file is not None:
            self.bytes -= file.bytes
            self._drops.append(_file(victim))
            self.counts.evicted += 1
        self.lost.discard(victim.key)
        self.index.evict()
        self._prune(victim.parent)

    def _stored(self, key: bytes) -> bool:
        """On disk, or on its way there."""
        return key in self.index.blocks and key not in self.lost

    def _ready(self, key: bytes) -> bool:
        return key not in self.lost and key not in self.writing


def patience_s(tokens: int, prefill_s_per_token: float) -> float:
    """How long to wait for so many tokens' blocks: about as long as computing them would take."""
    return min(max(tokens * prefill_s_per_token, MIN_PATIENCE_S), MAX_PATIENCE_S)


def _file(block: Block) -> BlockFile:
    parent = b"" if block.parent is None else block.parent.key
    return BlockFile(block.key, parent, block.position)


def _youth(one: Found) -> float:
    return -one.age_s


def _position(one: Found) -> int:
    assert one.block is not None
    return one.block.position
