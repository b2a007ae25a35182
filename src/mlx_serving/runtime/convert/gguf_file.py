"""Reads a GGUF file's metadata and maps its tensors; every length is checked before it is used.

The `gguf` package's own reader makes a Python object of every array element and trusts lengths,
so a hostile header can exhaust memory; it serves as the oracle in the tests instead. Its tables
of block sizes and its dequantisers are used as they are.
Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mlx_serving.errors import ModelBroken

Value = bool | int | float | str | list[str] | npt.NDArray[np.generic]
T = TypeVar("T")

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_ARRAY = 1 << 24
MAX_ALIGNMENT = 1 << 20
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Tensor:
    """`shape` is outermost first; `rows` maps the stored blocks as uint8 [n_rows, bytes a row]."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    rows: npt.NDArray[np.uint8]


class _Cursor:
    def __init__(self, buffer: memoryview, path: Path) -> None:
        self.buffer, self.path, self.at = buffer, path, 0

    def take(self, count: int) -> memoryview:
        if count > len(self.buffer) - self.at:
            raise corrupt(self.path, f"cut off: the header goes past byte {len(self.buffer)}")
        self.at += count
        return self.buffer[self.at - count : self.at]

    def scalar(self, code: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(
            "<" + code, self.take(struct.calcsize("<" + code))
        )[0]
        return value

    def count(self, code: str, most: int, what: str) -> int:
        value = int(self.scalar(code))
        if value > most:
            raise corrupt(self.path, f"{value} {what}, more than {most}")
        return value

    def string(self) -> str:
        try:
            return bytes(self.take(int(self.scalar("Q")))).decode()
        except UnicodeDecodeError as e:
            raise corrupt(self.path, f"text near byte {self.at} is not UTF-8") from e

    def value(self) -> Value:
        kind = int(self.scalar("I"))
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise corrupt(self.path, f"unknown value type {kind} near byte {self.at}")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[str] | npt.NDArray[np.generic]:
        kind = int(self.scalar("I"))
        length = self.count("Q", MAX_ARRAY, "elements in an array")
        if kind == _STRING:
            return [self.string() for _ in range(length)]
        if kind not in _SCALARS:
            raise corrupt(self.path, f"array of unsupported type {kind} near byte {self.at}")
        dtype = np.dtype("<" + _SCALARS[kind])
        return np.frombuffer(self.take(length * dtype.itemsize), dtype)


@dataclass(frozen=True, slots=True)
class GGUFFile:
    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, Tensor]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The key's value, an int widened to float where a float is wanted.

        Raises ModelBroken when it has another type, or is absent without a default.
        """
        value = self.metadata.get(key)
        if value is None:
            if default is None:
                raise corrupt(self.path, f"no {key!r} in its metadata")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise corrupt(
                self.path, f"{key!r} has type {type(value).__name__}, not {kind.__name__}"
            )
        return value


def corrupt(path: Path, why: str) -> ModelBroken:
    return ModelBroken(f"{path.name} is not a usable GGUF file: {why}", code="corrupt_file")


def read_gguf(path: Path) -> GGUFFile:
    """Raises ModelBroken (corrupt_file) naming what is wrong, OSError when it cannot be opened."""
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise corrupt(path, "shorter than a header")
        buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    cursor = _Cursor(buffer, path)
    if bytes(cursor.take(4)) != b"GGUF":
        raise corrupt(path, "it does not start with GGUF")
    version = int(cursor.scalar("I"))
    if version not in (2, 3):
        raise corrupt(path, f"version {version} (big-endian files and version 1 are not supported)")
    n_tensors = cursor.count("Q", MAX_TENSORS, "tensors")
    n_keys = cursor.count("Q", MAX_KEYS, "metadata keys")
    metadata: dict[str, Value] = {}
    for _ in range(n_keys):
        key = cursor.string()
        metadata[key] = cursor.value()
    return GGUFFile(path, metadata, _map_tensors(cursor, n_tensors, metadata))


def _map_tensors(cursor: _Cursor, count: int, metadata: Mapping[str, Value]) -> dict[str, Tensor]:
    found = [_tensor_info(cursor) for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    if (
        not isinstance(alignment, int)
        or not 0 < alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise corrupt(cursor.path, f"alignment {alignment!r}")
    data = cursor.buffer[min(-(-cursor.at // alignment) * alignment, len(cursor.buffer)) :]
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in found:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise corrupt(
                cursor.path, f"{name}: rows of {shape[-1]} are not whole {kind.name} blocks"
            )
        row_bytes = shape[-1] // block * block_bytes
        n_rows = math.prod(shape[:-1])
        if offset + n_rows * row_bytes > len(data):
            raise corrupt(cursor.path, f"cut off inside tensor {name}")
        if name in tensors:
            raise corrupt(cursor.path, f"two tensors are named {name}")
        stored = np.frombuffer(data, np.uint8, n_rows * row_bytes, offset)
        tensors[name] = Tensor(name, shape, kind, stored.reshape(n_rows, row_bytes))
    return tensors


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = cursor.string()
    n_dims = cursor.count("I", 4, f"dimensions of {name}")
    dims = [int(cursor.scalar("Q")) for _ in range(n_dims)]
    code = int(cursor.scalar("I"))
    offset = int(cursor.scalar("Q"))
    if not dims or 0 in dims:
        raise corrupt(cursor.path, f"tensor {name} is empty")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError as e:
        raise corrupt(cursor.path, f"tensor {name} has unknown type {code}") from e
    return name, tuple(reversed(dims)), kind, offset
