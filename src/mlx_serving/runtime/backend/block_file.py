"""A prefix block as a file: a safetensors file whose metadata says what it is and proves it whole.

    8 bytes   length of the header, little-endian
    header    JSON: `__metadata__` {format, key, checksum}, and each array by layer and part
    data      the arrays, one behind the other

The checksum covers the data and the header but for itself. It finds what a disk or a half-written
file does to a block; it is no defence against somebody who may write into the folder.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

FORMAT = "mlx-serving prefix block 1"
"""With another version's number the block is computed anew."""
MAX_HEADER_BYTES = 1 << 20
MAX_DATA_BYTES = 1 << 32
_METADATA = "__metadata__"
Fields = dict[str, Any]
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1}


class BadBlock(ValueError):
    """The file is not what it should be; the message says why."""


@dataclass(frozen=True, slots=True)
class Array:
    """One array of a block: which layer's, which of its parts, type as safetensors spells it."""

    layer: int
    part: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = _ITEM_BYTES[self.dtype]
        for n in self.shape:
            size *= n
        return size


Layout = tuple[Array, ...]


def data_bytes(layout: Layout) -> int:
    return sum(array.nbytes for array in layout)


def header(key: bytes, layout: Layout, data: memoryview) -> bytes:
    """What stands before the data, the length included."""
    fields = _fields(key, layout)
    fields[_METADATA]["checksum"] = f"{_checksum(fields, data):08x}"
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    return len(text).to_bytes(8, "little") + text


def read_header(file: BinaryIO) -> tuple[Fields, int]:
    """The header's fields, and how many bytes of data must follow. Raises BadBlock."""
    length = int.from_bytes(file.read(8), "little")
    text = file.read(length) if 0 < length <= MAX_HEADER_BYTES else b""
    if not text or len(text) != length:
        raise BadBlock("truncated, or not a safetensors file")
    try:
        fields = json.loads(text)
        size = max(v["data_offsets"][1] for k, v in fields.items() if k != _METADATA)
        fields[_METADATA]["format"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise BadBlock("its header is not a block's") from None
    if not isinstance(size, int) or not 0 < size <= MAX_DATA_BYTES:
        raise BadBlock("its header is not a block's")
    return fields, size


def check(key: bytes, fields: Fields, data: memoryview) -> Layout:
    """What is in the data. Raises BadBlock unless it is this key's block, in this format, and whole."""
    metadata = fields[_METADATA]
    if metadata.get("format") != FORMAT:
        raise BadBlock(f"of another format: {str(metadata.get('format'))[:80]!r}")
    if metadata.get("key") != key.hex():
        raise BadBlock("another block's")
    checksum = metadata.pop("checksum", None)
    if checksum != f"{_checksum(fields, data):08x}":
        raise BadBlock("its checksum does not fit")
    return _layout(fields)


def _fields(key: bytes, layout: Layout) -> Fields:
    fields: Fields = {_METADATA: {"format": FORMAT, "key": key.hex()}}
    at = 0
    for array in layout:
        fields[f"{array.layer}.{array.part}"] = {
            "dtype": array.dtype,
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    return fields


def _layout(fields: Fields) -> Layout:
    names = [name.split(".") for name in fields if name != _METADATA]
    arrays = [fields[f"{layer}.{part}"] for layer, part in names]
    return tuple(
        [
            Array(int(layer), int(part), array["dtype"], tuple(array["shape"]))
            for (layer, part), array in zip(names, arrays, strict=True)
        ]
    )


def _checksum(fields: Fields, data: memoryview) -> int:
    text = json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()
    return zlib.crc32(data, zlib.crc32(text))
