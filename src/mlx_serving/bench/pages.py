"""What the system has of a folder's files in its page cache, and having it forget them (Linux)."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path


def drop(folder: Path) -> float:
    """Have the folder's files read from the disk next time. Returns the share of their pages that stayed:
    0 unless the file system keeps them, or some process has them mapped."""
    for path in _files(folder):
        with path.open("rb+") as file:
            os.fsync(file)  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached(folder)


def cached(folder: Path, pattern: str = "*") -> float:
    """The share of the files' pages that is in memory."""
    pages = b"".join(_pages(path) for path in _files(folder, pattern))
    return sum(page & 1 for page in pages) / max(1, len(pages))


def _files(folder: Path, pattern: str = "*") -> list[Path]:
    return [path for path in sorted(folder.rglob(pattern)) if path.is_file()]


def _pages(path: Path) -> bytes:
    """A byte a page, odd where it is in memory."""
    size = path.stat().st_size
    if not size:
        return b""
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    # Writable: of files that one may not write, the system says that all is in memory.
    with path.open("rb+") as file, mmap.mmap(file.fileno(), size) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(first))
        failed = libc.mincore(address, ctypes.c_size_t(size), found)
        del first
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return bytes(found)
