"""The text sides that were read last, for models that come back.

Reading one takes tenths of a second, and the tokenizers library holds the interpreter meanwhile, which
no running stream gets on without.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from mlx_serving.content.text import AUTO, Reading, TextSide

MOST = 4
"""Tens of megabytes each, besides those of loaded models."""


class TextSides:
    """Thread-safe. A folder of which a file has changed, come or gone is read again."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._kept: OrderedDict[tuple[object, ...], TextSide] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, path: Path, reading: Reading = AUTO) -> TextSide:
        """As `TextSide.load`, which see; two that come at once may both read."""
        key = (path, reading, *_state(path, reading.chat_template))
        with self._lock:
            found = self._kept.get(key)
        if found is None:
            found = TextSide.load(path, reading)
        with self._lock:
            self._kept[key] = found
            self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return found


def _state(path: Path, chat_template: str | None) -> Iterator[tuple[object, ...]]:
    """What tells whether a file is the one that was read, of all that a text side may be read from."""
    files = [entry for pattern in ("*", "*/*.jinja") for entry in sorted(path.glob(pattern))]
    if chat_template is not None:
        files.append(Path(chat_template))
    for file in files:
        if file.suffix != ".safetensors":
            try:
                at = file.stat()
            except OSError:
                continue
            yield file.name, at.st_ino, at.st_size, at.st_mtime_ns
