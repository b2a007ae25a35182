"""What a store of answers does, and how large it may become."""

from __future__ import annotations

from typing import Protocol

import msgspec


class StoreError(Exception):
    """The store cannot be used at present. Who asked goes on without it."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """Least recently used entries leave over any of the first three, every entry after the last."""

    entries: int
    tokens: int
    bytes: int
    ttl_s: float

    def admit(self, tokens: int, size: int) -> bool:
        """Whether one entry fits at all."""
        return self.entries >= 1 and tokens <= self.tokens and size <= self.bytes


class Size(msgspec.Struct, frozen=True):
    """What a store holds now."""

    entries: int = 0
    tokens: int = 0
    bytes: int = 0

    def within(self, bounds: Bounds) -> bool:
        return (
            self.entries <= bounds.entries
            and self.tokens <= bounds.tokens
            and self.bytes <= bounds.bytes
        )


class Store(Protocol):
    """Values by key. Every call may raise StoreError, and may be cancelled at any time."""

    bounds: Bounds
    """May be replaced; entries over it leave with the next `put`."""

    async def get(self, key: bytes) -> bytes | None: ...

    async def put(self, key: bytes, value: bytes, tokens: int) -> None: ...

    async def drop(self, key: bytes) -> None: ...

    def size(self) -> Size | None:
        """None where it is not known: others write there too."""
        ...

    async def close(self) -> None: ...
