"""What outlives the server in a JSON file: written whole or not at all, and no reason to stop."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import TypeVar

import msgspec

log = logging.getLogger(__name__)

T = TypeVar("T")


def write(file: Path | None, value: object) -> None:
    """A file that cannot be written costs a line in the log. None: nothing is kept."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        part.write_bytes(msgspec.json.encode(value))
        part.replace(file)
    except OSError as error:
        log.error("%s cannot be written: %s", file, error)


def read(file: Path | None, kind: type[T], default: T) -> T:
    """What was written, or `default`. A file that cannot be read is set aside."""
    if file is None or not file.exists():
        return default
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        aside = file.with_name(file.name + ".unreadable")
        log.error("%s cannot be read (%s); it is now %s", file, error, aside.name)
        with contextlib.suppress(OSError):
            file.replace(aside)
        return default
