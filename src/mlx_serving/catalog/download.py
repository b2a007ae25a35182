"""Large files over HTTP: continued where they were cut, whatever cut them, and hashed on the way.

huggingface_hub continues a file within one process only (it deletes what it has when it leaves),
and pip not at all. Here the bytes so far lie beside the target under a name with the wanted hash,
and the target appears by a rename, whole and right.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import httpx

from mlx_serving.errors import ModelBroken

AT_ONCE = 4
"""Files fetched at the same time."""
RETRY_S = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Before each attempt that follows one which brought nothing."""
TIMEOUT_S = 30.0
"""Without a byte."""
_CHUNK = 1 << 20
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Download:
    name: str
    """What messages call it."""
    url: str
    target: Path
    sha256: str
    size_bytes: int
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def part(self) -> Path:
        """What there is so far; of this very content, so that another version is not continued."""
        return self.target.with_name(f"{self.target.name}.{self.sha256[:16]}.part")

    def missing_bytes(self) -> int:
        """What is still to come."""
        have = self.target if self.target.exists() else self.part
        return self.size_bytes - (have.stat().st_size if have.exists() else 0)


class Refused(Exception):
    """The server answered with a status that no second attempt changes."""

    def __init__(self, status: int, url: str) -> None:
        super().__init__(f"{url} answered {status}")
        self.status = status


class _Stopped(Exception):
    """Another file failed; what came of this one is kept."""


def download_all(files: Sequence[Download], advance: Callable[[int], None]) -> None:
    """Fetch what is not there, `AT_ONCE` at a time; `advance` is told of bytes, a thread at a time.
    The caller holds whatever lock there is.

    Raises the first failure: Refused, httpx.TransportError, ModelBroken (wrong_hash, no_space,
    io_error). What came is kept and continued by the next call, but for a wrong hash.
    """
    lock = threading.Lock()

    def advance_alone(n: int) -> None:
        with lock:
            advance(n)

    fetch = _Fetch(advance_alone, threading.Event())
    with (
        httpx.Client(follow_redirects=True, timeout=TIMEOUT_S) as client,
        ThreadPoolExecutor(AT_ONCE, thread_name_prefix="download") as pool,
    ):
        tasks = [pool.submit(fetch.file, client, f) for f in files if not f.target.exists()]
        try:
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            fetch.stop.set()
    failures = [error for task in tasks if (error := task.exception()) is not None]
    for error in sorted(failures, key=lambda error: isinstance(error, _Stopped)):
        raise error


class _Part:
    """The bytes so far, and their hash."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        left = os.fstat(file.fileno()).st_size
        while left and (block := file.read(min(left, _CHUNK))):
            self._digest.update(block)
            left -= len(block)

    @property
    def size_bytes(self) -> int:
        return self._file.tell()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def append(self, block: bytes) -> None:
        self._file.write(block)
        self._digest.update(block)

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._digest = hashlib.sha256()


@dataclass(frozen=True, slots=True)
class _Fetch:
    advance: Callable[[int], None]
    stop: threading.Event

    def file(self, client: httpx.Client, file: Download) -> None:
        file.target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # What an earlier process left may itself be wrong: then once more from the start.
            for _ in range(2 if file.part.exists() else 1):
                if self._complete(client, file):
                    return
        except OSError as e:
            full = e.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full; what came is kept" if full else str(e)
            code = "no_space" if full else "io_error"
            raise ModelBroken(f"{file.name}, in {file.target.parent}: {what}", code=code) from e
        raise ModelBroken(
            f"{file.name} did not arrive as published (its hash); deleted, fetch it again",
            code="wrong_hash",
        )

    def _complete(self, client: httpx.Client, file: Download) -> bool:
        """Receive what is missing. True: the target is there; False: it was not the wanted content."""
        failed = 0
        # Unbuffered: what came is on disk when the process is killed.
        with file.part.open("r+b" if file.part.exists() else "w+b", buffering=0) as handle:
            part = _Part(handle)
            while (at := part.size_bytes) < file.size_bytes:
                try:
                    self._receive(client, file, part)
                except httpx.TransportError:
                    failed = 1 if part.size_bytes > at else failed + 1
                    if failed > len(RETRY_S):
                        raise
                    if self.stop.wait(RETRY_S[failed - 1]):
                        raise _Stopped from None
            os.fsync(handle.fileno())
        if part.sha256 == file.sha256:
            file.part.replace(file.target)
            return True
        self.advance(-file.part.stat().st_size)
        file.part.unlink()
        return False

    def _receive(self, client: httpx.Client, file: Download, part: _Part) -> None:
        """One request's bytes. Raises httpx.TransportError where another request may bring more."""
        at = part.size_bytes
        headers = {**file.headers, "Accept-Encoding": "identity"}
        if at:
            headers["Range"] = f"bytes={at}-"
        with client.stream("GET", file.url, headers=headers) as response:
            if response.status_code in _BUSY:
                raise httpx.ReadError(f"{file.url} answered {response.status_code}")
            if response.status_code not in (200, 206):
                raise Refused(response.status_code, file.url)
            if at and response.status_code == 200:  # it does not do ranges
                self.advance(-at)
                part.restart()
            for block in response.iter_bytes(_CHUNK):
                if self.stop.is_set():
                    raise _Stopped
                part.append(block)
                self.advance(len(block))
                if part.size_bytes > file.size_bytes:
                    return  # another content than was asked for: its hash will say so
        if part.size_bytes < file.size_bytes:
            raise httpx.ReadError(f"{file.url} ended early")
