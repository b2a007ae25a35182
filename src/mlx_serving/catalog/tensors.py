"""Safetensors files by their headers: whether a file is whole, and what tensors it holds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MAX_HEADER_BYTES = 100 << 20
"""The bound that the safetensors format sets for its header."""


class NotWhole(Exception):
    """Why a file is not a complete safetensors file."""

    def __init__(self, kind: Literal["missing", "truncated", "bad_file"], detail: str) -> None:
        super().__init__(detail)
        self.kind: Literal["missing", "truncated", "bad_file"] = kind
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Tensor:
    dtype: str
    """As safetensors spells it: F16, BF16, U32, …"""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """The file's tensors by name; the data they describe is exactly what follows the header.

    Raises NotWhole.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise NotWhole("truncated", f"is cut short inside its header ({size} bytes)")
            if length > MAX_HEADER_BYTES:
                raise NotWhole("bad_file", "is not a safetensors file")
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        tensors = {
            name: Tensor(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
            for name, entry in entries.items()
        }
    except FileNotFoundError:
        raise NotWhole("missing", "is missing") from None
    except OSError as e:
        raise NotWhole("bad_file", f"cannot be read ({e.strerror})") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise NotWhole("bad_file", "has no valid safetensors header") from None
    expected = 8 + length + end
    if size < expected:
        raise NotWhole("truncated", f"is cut short: {size} of {expected} bytes")
    if size > expected:
        raise NotWhole("bad_file", f"has {size - expected} bytes too many")
    return tensors


def count_parameters(tensors: Mapping[str, Tensor], group_size: Callable[[str], int]) -> int:
    """Of the model before it was quantised: a packed weight counts the numbers that it stands for.

    Args:
        group_size: of a module that MLX quantised, by its name; each of its scales stands for as many.
    """
    total = 0
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        weight, scales = tensors.get(f"{module}.weight"), tensors.get(f"{module}.scales")
        if weight is None or scales is None or weight.dtype != "U32":
            total += tensor.elements
        elif kind == "weight":
            total += scales.elements * group_size(module)
        elif kind not in ("scales", "biases"):
            total += tensor.elements
    return total
