"""Which prefixes are in which blocks: a tree of blocks, found by hash.

A block holds what the model computed for the next `block_tokens` positions of some prefix. Its key
hashes (salt, parent's key, its tokens), so a key names a whole prefix, and equal prefixes under
different salts share nothing. Only blocks that nobody holds and that have no children are
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
from itertools import islice

MAX_USES = 8
COST_DOUBLES_AT = 4096
"""Position at which a token takes about twice what the first one does, for attention's sake."""
_KEY_BYTES = 16


def extend_keys(
    keys: list[bytes], salt: str | None, tokens: Sequence[int], block_tokens: int
) -> None:
    """Append the keys of those full blocks of `tokens` that `keys` lacks."""
    first, last = len(keys), len(tokens) // block_tokens
    if first >= last:
        return
    parent = keys[-1] if keys else _hash(b"" if salt is None else b"s" + salt.encode())
    for start in range(first * block_tokens, last * block_tokens, block_tokens):
        parent = _hash(parent + array("q", tokens[start : start + block_tokens]).tobytes())
        keys.append(parent)


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=_KEY_BYTES).digest()


@dataclass(slots=True, eq=False)
class Block:
    id: int
    key: bytes
    parent: Block | None
    cost: float
    value: float
    children: int = 0
    holders: int = 0
    uses: int = 0
    offered: bool = False
    """It has an entry in the heap of what may be evicted."""

    @property
    def evictable(self) -> bool:
        return not (self.children or self.holders)


class PrefixIndex:
    """At most `capacity` blocks. Ids are given out from 0 on, so that a pool of them may grow; once
    all are, each new block takes an evicted one's."""

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
        block_id = len(self.blocks)
        if block_id >= self.capacity:
            evicted = self._evict()
            if evicted is None:
                return None
            block_id = evicted
        cost = 1 + position / COST_DOUBLES_AT
        block = Block(block_id, key, parent, cost, self._clock + cost)
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

    def _evict(self) -> int | None:
        """Drop the block of least value, and return its id."""
        while self._heap:
            value, _, block = heapq.heappop(self._heap)
            block.offered = False
            if not block.evictable:
                continue
            if block.value > value:
                self._offer(block)
                continue
            self._clock = value
            self.evictions += 1
            del self.blocks[block.key]
            if block.parent is not None:
                block.parent.children -= 1
                self._offer(block.parent)
            return block.id
        return None

    def _offer(self, block: Block) -> None:
        """Values only grow: an entry that is too low is put right when it comes up."""
        if block.evictable and not block.offered:
            block.offered = True
            heapq.heappush(self._heap, (block.value, block.id, block))
