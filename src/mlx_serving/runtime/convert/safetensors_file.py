"""Writes a safetensors file piece by piece, so that a conversion never holds a whole model."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to come; `dtype` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class SafetensorsWriter:
    """Lays out all tensors first; `append` then fills each from its start, in any order of tensors."""

    def __init__(self, path: Path, entries: list[Entry]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
        self._at: dict[str, int] = {}
        self._end: dict[str, int] = {}
        offset = 0
        for entry in entries:
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.nbytes],
            }
            self._at[entry.name], self._end[entry.name] = offset, offset + entry.nbytes
            offset += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._base + offset)

    def append(self, name: str, values: npt.NDArray[np.generic]) -> None:
        start = self._at[name]
        assert start + values.nbytes <= self._end[name], name
        self._file.seek(self._base + start)
        self._file.write(np.ascontiguousarray(values).data)
        self._at[name] = start + values.nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                assert self._at == self._end, "a tensor was not written whole"
                self._file.flush()
                os.fsync(self._file.fileno())
