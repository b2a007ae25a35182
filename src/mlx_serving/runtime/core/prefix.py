"""Which prefixes are in which blocks: a tree of blocks, found by hash.

A block holds what the model computed for the next `block_tokens` positions of some prefix. Its key
hashes (salt and adapter, parent's key, its tokens), so a key names a whole prefix, and equal prefixes
under different salts or adapters share nothing. Only blocks that nobody holds and that have no children are
evicted: what is found is always a whole prefix.

Who goes first: the block of least value, `clock + uses × cost`. `uses` counts how often it was
found, up to MAX_USES; `cost` is what its tokens take to compute, relative to the first ones; `clock` is
the value of the last block evicted, so that what is not used again ages (GreedyDual-Size-Frequency).
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count, islice

MAX_USES = 8
COST_DOUBLES_AT = 4096
"""Position at which a token takes about twice what the first one does, for attention's sake."""
_KEY_BYTES = 16


FIRST_BLOCKS = 64
"""A pool of blocks begins with room for as many."""


def pool_blocks(given_out: int, most: int) -> int:
    """Blocks that a pool has room for once ids up to `given_out` were used: it grows by a quarter."""
    return min(most, max(FIRST_BLOCKS, given_out + given_out // 4)) if given_out else 0


def most_blocks(room: int, most: int) -> int:
    """The most ids that may be given out while the pool has at most `room` blocks."""
    if room >= most:
        return most
    if room < FIRST_BLOCKS:
        return 0
    ids = room * 4 // 5
    while ids + 1 + (ids + 1) // 4 <= room:
        ids += 1
    return ids


def extend_keys(
    keys: list[bytes],
    salt: str | None,
    tokens: Sequence[int],
    block_tokens: int,
    adapter: str | None = None,
) -> None:
    """Append the keys of those full blocks of `tokens` that `keys` lacks."""
    first, last = len(keys), len(tokens) // block_tokens
    if first >= last:
        return
    parent = keys[-1] if keys else _root(salt, adapter)
    for start in range(first * block_tokens, last * block_tokens, block_tokens):
        parent = _hash(parent + array("q", tokens[start : start + block_tokens]).tobytes())
        keys.append(parent)


def _root(salt: str | None, adapter: str | None) -> bytes:
    """The parent of first blocks: no two pairs of salt and adapter have the same."""
    root = b"" if salt is None else b"s" + salt.encode()
    if adapter is not None:
        tag = adapter.encode()
        root = b"a%d:%s%s" % (len(tag), tag, root)
    return _hash(root)


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=_KEY_BYTES).digest()


@dataclass(slots=True, eq=False)
class Block:
    id: int
    key: bytes
    parent: Block | None
    position: int
    """Of its first token."""
    cost: float
    value: float
    children: int = 0
    holders: int = 0
    uses: int = 0
    offered: bool = False
    """It has an entry in the heap of what may be evicted."""
    from_disk: bool = False
    """It was read, and nobody has used it since."""
    gone: bool = False
    """It was removed; an entry may be left in the heap."""

    @property
    def evictable(self) -> bool:
        return not (self.children or self.holders)


class PrefixIndex:
    """At most `capacity` blocks. Ids are given out from 0 on, so that a pool of them may grow; those of
    blocks that have gone come first."""

    def __init__(self, capacity: int, block_tokens: int) -> None:
        self.capacity = capacity
        self.block_tokens = block_tokens
        self.clear()

    def clear(self) -> None:
        """Forget every block, held ones too."""
        self.blocks: dict[bytes, Block] = {}
        self.evictions = 0
        self._clock = 0.0
        self._heap: list[tuple[float, int, Block]] = []
        self._entries = count()
        self.spare: list[int] = []
        """Ids below the highest that was given out, which no block has."""

    def __len__(self) -> int:
        return len(self.blocks)

    def find(self, keys: Sequence[bytes], most: int) -> list[Block]:
        """The blocks of the longest known prefix, at most `most` of them."""
        found: list[Block] = []
        for key in islice(keys, most):
            block = self.blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def use(self, chain: Sequence[Block]) -> None:
        """A prefix was found and is being copied: it is worth more."""
        for block in chain:
            block.uses = min(block.uses + 1, MAX_USES)
            block.value = self._clock + block.uses * block.cost

    def add(self, parent: Block | None, key: bytes, position: int) -> Block | None:
        """A new block, whose first token is at `position`; the parent is held. None if every block is
        in use."""
        assert key not in self.blocks and (parent is None or parent.holders)
        if len(self.blocks) >= self.capacity and not self.evict():
            return None
        block_id = self.spare.pop() if self.spare else len(self.blocks)
        cost = 1 + position / COST_DOUBLES_AT
        block = Block(block_id, key, parent, position, cost, self._clock + cost)
        self.blocks[key] = block
        if parent is not None:
            parent.children += 1
        self._offer(block)
        return block

    def hold(self, block: Block) -> None:
        """Keep it, and so every block before it, until `release`."""
        block.holders += 1

    def release(self, block: Block) -> None:
        assert block.holders > 0
        block.holders -= 1
        self._offer(block)

    def evict(self) -> bool:
        """Drop the block of least value. False if every block is in use."""
        block = self.victim()
        if block is None:
            return False
        heapq.heappop(self._heap)
        block.offered = False
        self._clock = block.value
        self.evictions += 1
        self.remove(block)
        return True

    def shrink(self, most: int) -> tuple[int, ...] | None:
        """Keep at most so many blocks, or those in use where they are more, and number them anew from
        0 on. Returns their ids until now, in the new order; None: there are no more already."""
        given_out = len(self.blocks) + len(self.spare)
        while given_out > most and len(self.blocks) > most and self.evict():
            pass
        self.capacity = max(most, len(self.blocks))
        if given_out <= self.capacity:
            return None
        left = sorted(self.blocks.values(), key=lambda block: block.id)
        ids = tuple([block.id for block in left])
        for new_id, block in enumerate(left):
            block.id = new_id
        self.spare.clear()
        return ids

    def bound(self, most: int) -> None:
        """Give out no ids beyond `most`, or beyond those that were given out."""
        self.capacity = min(self.capacity, max(most, len(self.blocks) + len(self.spare)))

    def victim(self) -> Block | None:
        """The block of least value among those that may go."""
        while self._heap:
            value, _, block = self._heap[0]
            if block.evictable and block.value <= value and not block.gone:
                return block
            heapq.heappop(self._heap)
            block.offered = False
            self._offer(block)
        return None

    def remove(self, block: Block) -> None:
        """Drop a block that may go."""
        assert block.evictable and not block.gone
        block.gone = True
        self.spare.append(block.id)
        del self.blocks[block.key]
        if block.parent is not None:
            block.parent.children -= 1
            self._offer(block.parent)

    def _offer(self, block: Block) -> None:
        """Values only grow: an entry that is too low is put right when it comes up."""
        if block.evictable and not (block.offered or block.gone):
            block.offered = True
            heapq.heappush(self._heap, (block.value, next(self._entries), block))
