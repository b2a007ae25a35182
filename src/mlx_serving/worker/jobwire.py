"""What a conversion job prints on stdout: one JSON object a line, told apart by `event`.

Started (Advanced)*  … for each task, then  Finished | Failed

and what it writes into the folder that it made, so that the folder can be checked and made again.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from mlx_serving.types import PrefixReuse


class Started(msgspec.Struct, frozen=True, tag_field="event", tag="start"):
    task: str
    total_bytes: int


class Advanced(msgspec.Struct, frozen=True, tag_field="event", tag="advance"):
    n: int


class Finished(msgspec.Struct, frozen=True, tag_field="event", tag="finish"):
    path: str


class Failed(msgspec.Struct, frozen=True, tag_field="event", tag="fail"):
    code: str
    message: str


JobEvent = Started | Advanced | Finished | Failed

_decoder: msgspec.json.Decoder[JobEvent] = msgspec.json.Decoder(JobEvent)


def encode(event: JobEvent) -> bytes:
    """One line, newline included."""
    return msgspec.json.encode(event) + b"\n"


def decode(line: bytes) -> JobEvent:
    """Raises msgspec.DecodeError on anything else."""
    return _decoder.decode(line)


MANIFEST = "mlx_serving_manifest.json"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """How a folder was made. `job`: the conversion's arguments, less the folder; `sha256` of each file of
    weights."""

    job: tuple[str, ...]
    sha256: dict[str, str]


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """What the describing job prints of a model."""

    prefix_reuse: PrefixReuse
    why: str
    kv_bytes_per_token: int = 0
    """In the type that this machine computes in."""
    kv_bytes_by_bits: Mapping[str, int] = {}
    """The same for each quantised form that can be; others cannot, for `kv_bits_why_not`."""
    kv_bits_why_not: str = ""
    state_bytes_per_row: int = 0
    """Of recurrent layers, whatever the length."""
    batched: bool = True
    """Rows decode in one forward pass; otherwise one after another."""
