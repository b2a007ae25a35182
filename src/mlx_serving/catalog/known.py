"""What was computed from whole files and need not be computed again while they stay as they are.

A record is valid for the size and the modification time that the file had; one file a record, so
that processes do not wait for each other and a lost race costs one more reading.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import msgspec


class Record(msgspec.Struct, kw_only=True):
    size_bytes: int
    mtime_ns: int
    digest: str | None = None
    """The content's digest, spelt as the expected one is (`digests.Expected`)."""
    vocabulary: str | None = None
    """Of a tokenizer.json: equal for tokenizers with the same ids for the same tokens."""


class Known:
    """Args: home: where models and marks are kept."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "known"

    def get(self, file: Path) -> Record:
        """What is known of the file as it is now; an empty record if nothing is."""
        size, mtime_ns = _stamp(file)
        found = self.last(file)
        if found is not None and (found.size_bytes, found.mtime_ns) == (size, mtime_ns):
            return found
        return Record(size_bytes=size, mtime_ns=mtime_ns)

    def last(self, file: Path) -> Record | None:
        """What was known of the file when it was last looked at, whatever it is now."""
        try:
            return msgspec.json.decode(self._place(file).read_bytes(), type=Record)
        except (OSError, msgspec.DecodeError):
            return None

    def put(self, file: Path, record: Record) -> None:
        """Remember, or forget where the disk refuses: it is a cache."""
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder)
            with os.fdopen(handle, "wb") as out:
                out.write(msgspec.json.encode(record))
            Path(name).replace(self._place(file))

    def forget(self, file: Path) -> None:
        self._place(file).unlink(missing_ok=True)

    def _place(self, file: Path) -> Path:
        path = str(file.resolve())
        return self._folder / hashlib.sha256(path.encode()).hexdigest()[:32]


def _stamp(file: Path) -> tuple[int, int]:
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns
