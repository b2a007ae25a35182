"""Prefix blocks on disk: a thread that reads, writes, deletes and looks through one folder.

    <folder>/kv-<what computed them>/<key>-<parent's key>-<position>.safetensors

The folder's name hashes all that a block's bits depend on besides its tokens (`identity`), so that
another model, version or precision never meets our files. Files appear whole, by renaming, so that
several servers may share a folder; each deletes by its own count, and counts anew after a share of
the bound was written. A file that is not there, not whole or not ours is reported as lost.

What to write, read and delete is decided by `core.disk`; here it is done, reads first.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mlx_serving.runtime.backend import block_file
from mlx_serving.runtime.backend.block_file import BadBlock, Fields, Layout
from mlx_serving.runtime.core.disk import (
    BlockFile,
    DiskEvent,
    Found,
    Lost,
    NotWritten,
    Read,
    Scanned,
    Written,
)

log = logging.getLogger(__name__)

RUN_BYTES = 16 * 1024 * 1024
"""Neighbouring blocks are staged together, up to so many bytes."""
STAGED_RUNS = 8
"""Reading waits while so many are staged and not yet taken."""
WAIT_S = 0.01
"""A step that waits for the disk ends after this at the latest: other models' steps wait behind it."""
RESCAN_SHARE = 16
"""The folder is looked through again once a bound's share of this was written."""
CLOSE_S = 0.5
STALE_S = 3600.0
"""What a server that died left half written is deleted after this."""
LOG_EVERY_S = 30.0
_FOLDER = "kv-"
_NAME = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32}|0)-(\d+)\.safetensors")
_PART = ".part"

Bytes = npt.NDArray[np.uint8]


class Files:
    """What is done to files; a test's may be slow, full or broken."""

    def open(self, path: Path) -> BinaryIO:
        return path.open("rb", buffering=0)

    def touch(self, path: Path) -> None:
        """The folder's memory of what was used."""
        with contextlib.suppress(OSError):
            os.utime(path)

    def write(self, path: Path, parts: Sequence[bytes | memoryview]) -> None:
        """Whole or not at all. Makes the folder where somebody deleted it."""
        part = path.with_name(f"{secrets.token_hex(8)}{_PART}")
        try:
            try:
                out = part.open("xb")
            except FileNotFoundError:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                out = part.open("xb")
            with out:
                for data in parts:
                    out.write(data)
            part.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise

    def delete(self, path: Path) -> None:
        path.unlink(missing_ok=True)


@dataclass(slots=True)
class Run:
    """Neighbouring blocks that were read together: `data` is `[blocks, bytes of a block]`."""

    layout: Layout
    data: Any
    untaken: int


@dataclass(slots=True)
class _Work:
    reads: deque[BlockFile] = field(default_factory=deque)
    writes: deque[tuple[Sequence[BlockFile], Layout, Bytes]] = field(default_factory=deque)
    drops: deque[BlockFile | str] = field(default_factory=deque)
    rescan: bool = False


class DiskFolder:
    """`to_device` turns `[blocks, bytes]` of host memory into an array of the runner's; it is called
    on this folder's thread. Everything else is called on the runner's."""

    def __init__(
        self,
        root: Path,
        identity: str,
        max_bytes: int,
        *,
        to_device: Callable[[Bytes], Any],
        files: Files | None = None,
    ) -> None:
        self.root = root
        self._files = files or Files()
        self.folder = root / (_FOLDER + identity)
        self._max_bytes = max_bytes
        self._to_device = to_device
        self._lock = threading.Condition()
        self._work = _Work()
        self._events: list[DiskEvent] = []
        self._staged: dict[bytes, tuple[Run, int]] = {}
        self._runs = 0
        self._closed = False
        self._layout: Layout | None = None
        self._since_scan = 0
        self._logged: dict[str, float] = {}
        self._thread: threading.Thread | None = None

    def open(self) -> Scanned:
        """What is there; then the thread starts. Raises OSError if the folder cannot be made."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self._scan()
        self._thread = threading.Thread(target=self._run, name="kv-disk", daemon=True)
        self._thread.start()
        return found

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Lets the disk finish, but not for longer; what is not yet written then is lost."""
        with self._lock:
            self._closed = True
            self._work.reads.clear()
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    # -- the runner's side ------------------------------------------------------------------

    def read(self, files: Sequence[BlockFile]) -> None:
        with self._lock:
            self._work.reads.extend(files)
            self._lock.notify_all()

    def write(self, files: Sequence[BlockFile], layout: Layout, data: Bytes) -> None:
        """`data` is `[files, bytes of a block]`, which nobody writes any more."""
        with self._lock:
            self._work.writes.append((files, layout, data))
            self._lock.notify_all()

    def drop(self, files: Sequence[BlockFile | str]) -> None:
        with self._lock:
            self._work.drops.extend(files)
            self._lock.notify_all()

    def report(self, events: Sequence[DiskEvent]) -> None:
        """What became of orders that did not get so far."""
        with self._lock:
            self._events.extend(events)

    def take(self, keys: Sequence[bytes]) -> list[tuple[Run, list[int]]]:
        """Staged blocks, in order: runs, and which of their lines."""
        taken: list[tuple[Run, list[int]]] = []
        with self._lock:
            for key in keys:
                run, line = self._staged.pop(key)
                if not taken or taken[-1][0] is not run:
                    taken.append((run, []))
                taken[-1][1].append(line)
                run.untaken -= 1
                self._runs -= run.untaken == 0
            self._lock.notify_all()
        return taken

    def events(self, *, wait: bool = False) -> list[DiskEvent]:
        """What has come of orders since the last call; `wait` a moment for something to."""
        with self._lock:
            if wait and not self._events:
                self._lock.wait_for(lambda: bool(self._events) or self._closed, WAIT_S)
            events, self._events = self._events, []
        return events

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                self._emit(work())
            except Exception:
                log.exception("the disk cache's thread failed")

    def _next(self) -> Callable[[], Iterator[DiskEvent]] | None:
        """Deletions first, for they make room; then what somebody waits for. None: closed, and done."""
        work = self._work
        with self._lock:
            self._lock.wait_for(self._busy)
            if work.drops:
                dropped = work.drops.popleft()
                return lambda: self._delete(dropped)
            if work.reads and self._runs < STAGED_RUNS:
                return self._read_run
            if work.writes:
                batch = work.writes.popleft()
                return lambda: self._write_all(*batch)
            if self._closed:
                return None
            work.rescan = False
            return lambda: iter([self._scan()])

    def _busy(self) -> bool:
        work = self._work
        reads = bool(work.reads) and self._runs < STAGED_RUNS
        return bool(self._closed or work.drops or reads or work.writes or work.rescan)

    def _emit(self, events: Iterator[DiskEvent]) -> None:
        for event in events:
            with self._lock:
                self._events.append(event)
                self._lock.notify_all()

    def _path(self, file: BlockFile) -> Path:
        parent = file.parent.hex() or "0"
        return self.folder / f"{file.key.hex()}-{parent}-{file.position}.safetensors"

    def _delete(self, file: BlockFile | str) -> Iterator[DiskEvent]:
        path = self.root / file if isinstance(file, str) else self._path(file)
        try:
            self._files.delete(path)
        except OSError as error:
            self._say("delete", "cannot delete %s: %s", path, error)
        yield from ()

    def _read_run(self) -> Iterator[DiskEvent]:
        """Read neighbours together: as many as fit, up to the first that is not whole."""
        keys: list[bytes] = []
        lost: list[bytes] = []
        data: Bytes | None = None
        while not lost and (data is None or len(keys) < len(data)):
            with self._lock:
                if not self._work.reads:
                    break
                file = self._work.reads.popleft()
                more = len(self._work.reads)
            try:
                with self._files.open(self._path(file)) as opened:
                    fields, size = block_file.read_header(opened)
                    if data is None:
                        data = np.empty((min(max(RUN_BYTES // size, 1), more + 1), size), np.uint8)
                    self._load(file, opened, fields, data[len(keys)])
                keys.append(file.key)
            except Exception as error:
                self._reject(file, error)
                lost.append(file.key)
        if keys:
            assert data is not None and self._layout is not None
            run = Run(self._layout, self._to_device(data[: len(keys)]), len(keys))
            with self._lock:
                self._runs += 1
                self._staged |= {key: (run, line) for line, key in enumerate(keys)}
        yield from [Read(key) for key in keys]
        yield from [Lost(key) for key in lost]

    def _load(self, file: BlockFile, opened: BinaryIO, fields: Fields, line: Bytes) -> None:
        """A whole block into `line`. Raises OSError, or BadBlock with the reason."""
        if opened.readinto(line.data) != len(line) or opened.read(1):  # type: ignore[attr-defined]
            raise BadBlock("of another size than it says")
        layout = block_file.check(file.key, fields, line.data)
        if self._layout is None:
            self._layout = layout
        if layout != self._layout:
            raise BadBlock("of another shape")
        self._files.touch(self._path(file))

    def _reject(self, file: BlockFile, error: Exception) -> None:
        path = self._path(file)
        self._say("read", "dropped cache block %s: %s", path.name, error)
        if isinstance(error, BadBlock):
            with contextlib.suppress(OSError):
                self._files.delete(path)

    def _write_all(
        self, files: Sequence[BlockFile], layout: Layout, data: Bytes
    ) -> Iterator[DiskEvent]:
        self._layout = layout
        failed = False
        for file, line in zip(files, data, strict=True):
            try:
                if not failed:
                    head = block_file.header(file.key, layout, line.data)
                    self._files.write(self._path(file), (head, line.data))
                    size = len(head) + len(line)
                    self._since_scan += size
                    yield Written(file.key, size)
                    continue
            except Exception as error:
                failed = True
                self._say("write", "%s; nothing is cached on disk for a while", _why(error))
            yield NotWritten(file.key)
        if self._since_scan * RESCAN_SHARE > self._max_bytes:
            self._work.rescan = True

    def _scan(self) -> Scanned:
        self._since_scan = 0
        now_s = time.time()
        found: list[Found] = []
        for folder in self._folders():
            mine = folder == self.folder
            for entry in _entries(folder):
                with contextlib.suppress(OSError):
                    stat = entry.stat(follow_symlinks=False)
                    age_s = max(0.0, now_s - stat.st_mtime)
                    if entry.name.endswith(_PART) and age_s > STALE_S:
                        Path(entry.path).unlink()
                        continue
                    name = f"{folder.name}/{entry.name}"
                    block = _parse(entry.name) if mine else None
                    found.append(Found(name, stat.st_size, age_s, block))
        return Scanned(tuple(found))

    def _folders(self) -> Iterator[Path]:
        for entry in _entries(self.root):
            if entry.name.startswith(_FOLDER) and entry.is_dir(follow_symlinks=False):
                yield self.root / entry.name

    def _say(self, kind: str, message: str, *args: object) -> None:
        """A line now and then: a broken disk says the same of every block."""
        now_s = time.monotonic()
        if now_s - self._logged.get(kind, float("-inf")) >= LOG_EVERY_S:
            self._logged[kind] = now_s
            log.warning(message, *args)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _parse(name: str) -> BlockFile | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    key, parent, position = match.groups()
    return BlockFile(
        bytes.fromhex(key), b"" if parent == "0" else bytes.fromhex(parent), int(position)
    )


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no room is left for cache blocks"
    return f"cannot write a cache block: {error}"
