"""Answers in one SQLite file, which survives a restart and may be shared by servers on one machine.

One thread of its own talks to it, so that no stream waits for the disk. A file that cannot be read is
put aside and another begun: it is a cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from mlx_serving import clock
from mlx_serving.traffic.stores.port import Bounds, Size, StoreError

log = logging.getLogger(__name__)

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY, value BLOB NOT NULL, tokens INTEGER NOT NULL,
    expires_s REAL NOT NULL, used INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS answers_used ON answers (used);
"""
_SIZE = "SELECT count(*), coalesce(sum(tokens), 0), coalesce(sum(length(value)), 0) FROM answers"
_USED = "(SELECT coalesce(max(used), 0) + 1 FROM answers)"
_BUSY_S = 0.5
"""How long another process may hold the file."""


class DiskStore:
    """`now`: seconds since the epoch, as entries outlive the process."""

    def __init__(self, bounds: Bounds, path: Path, now: clock.Clock = clock.wall) -> None:
        self.bounds = bounds
        self._path = path
        self._now = now
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="response-cache")
        self._file: sqlite3.Connection | None = None
        self._size = Size()

    async def get(self, key: bytes) -> bytes | None:
        return await self._do(lambda file: self._get(file, key))

    async def put(self, key: bytes, value: bytes, tokens: int) -> None:
        await self._do(lambda file: self._put(file, key, value, tokens))

    async def drop(self, key: bytes) -> None:
        await self._do(lambda file: file.execute("DELETE FROM answers WHERE key = ?", (key,)))

    def size(self) -> Size:
        """As of the first use, or the last `put`."""
        return self._size

    async def close(self) -> None:
        def close() -> None:
            if self._file is not None:
                self._file.close()
                self._file = None

        await asyncio.get_running_loop().run_in_executor(self._thread, close)
        self._thread.shutdown(wait=False)

    async def _do(self, act: Callable[[sqlite3.Connection], T]) -> T:
        def run() -> T:
            try:
                with self._opened() as file:  # one transaction
                    return act(file)
            except sqlite3.OperationalError as error:
                raise StoreError(f"{self._path}: {error}") from error
            except sqlite3.DatabaseError as error:
                self._put_aside(error)
                raise StoreError(f"{self._path}: {error}") from error
            except OSError as error:
                raise StoreError(str(error)) from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _opened(self) -> sqlite3.Connection:
        if self._file is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Answers are what people asked: nobody else on the machine may read them.
            self._path.touch(mode=0o600)
            file = sqlite3.connect(self._path, timeout=_BUSY_S)
            try:
                file.execute("PRAGMA journal_mode = WAL")
                file.execute("PRAGMA synchronous = NORMAL")
                file.executescript(_SCHEMA)
                self._size = Size(*file.execute(_SIZE).fetchone())
            except sqlite3.Error:
                file.close()
                raise
            self._file = file
        return self._file

    def _put_aside(self, error: sqlite3.DatabaseError) -> None:
        log.warning("the response cache begins anew: %s: %s", self._path, error)
        if self._file is not None:
            self._file.close()
            self._file = None
        with contextlib.suppress(OSError):
            self._path.replace(self._path.with_suffix(".broken"))
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def _get(self, file: sqlite3.Connection, key: bytes) -> bytes | None:
        query = "SELECT value FROM answers WHERE key = ? AND expires_s > ?"
        found = file.execute(query, (key, self._now())).fetchone()
        if found is None:
            return None
        file.execute(f"UPDATE answers SET used = {_USED} WHERE key = ?", (key,))
        value: bytes = found[0]
        return value

    def _put(self, file: sqlite3.Connection, key: bytes, value: bytes, tokens: int) -> None:
        now_s = self._now()
        file.execute("DELETE FROM answers WHERE key = ? OR expires_s <= ?", (key, now_s))
        if self.bounds.admit(tokens, len(value)):
            row = (key, value, tokens, now_s + self.bounds.ttl_s)
            file.execute(f"INSERT INTO answers VALUES (?, ?, ?, ?, {_USED})", row)
        self._size = Size(*file.execute(_SIZE).fetchone())
        while not self._size.within(self.bounds):
            file.execute(
                "DELETE FROM answers WHERE key = (SELECT key FROM answers ORDER BY used LIMIT 1)"
            )
            self._size = Size(*file.execute(_SIZE).fetchone())
