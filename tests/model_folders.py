"""Model folders with files of a few bytes, whole or broken in one way each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 512,
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
TOKENIZER = {"model": {"vocab": {"a": 0, "b": 1}}}
WEIGHTS = "model.safetensors"

Damage = Callable[[Path], None]


def safetensors(**tensors: tuple[str, tuple[int, ...]]) -> bytes:
    """A file of zeros: `safetensors(w=("F32", (2, 3)))`."""
    sizes = {"F32": 4, "U32": 4, "F16": 2, "BF16": 2, "U8": 1}
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        count = sizes[dtype]
        for n in shape:
            count *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def files(
    tokenizer: dict[str, Any] | None = None, parameters: int = 8, **config: Any
) -> dict[str, bytes]:
    return {
        "config.json": json.dumps(CONFIG | config).encode(),
        "tokenizer.json": json.dumps(tokenizer or TOKENIZER).encode(),
        WEIGHTS: safetensors(w=("F32", (parameters,))),
    }


def write_folder(path: Path, contents: dict[str, bytes] | None = None) -> Path:
    path.mkdir(parents=True)
    for name, data in (files() if contents is None else contents).items():
        (path / name).write_bytes(data)
    return path


def write_hub(
    cache: Path, repo: str, contents: dict[str, bytes], commit: str = "c" * 40, ref: str = "main"
) -> Path:
    """A snapshot as the hub's clients keep it: links to blobs named by their digests."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    if ref:
        (root / "refs" / ref).write_text(commit)
    for name, data in contents.items():
        large = name.endswith(".safetensors")
        git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        digest = hashlib.sha256(data).hexdigest() if large else git
        (root / "blobs" / digest).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{digest}")
    return snapshot


def flip_last_byte(file: Path) -> None:
    """Another content of the same size, with another modification time."""
    facts = file.stat()
    data = file.read_bytes()
    file.resolve().write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000))


def cut_in_half(file: Path) -> None:
    data = file.read_bytes()
    file.resolve().write_bytes(data[: len(data) // 2])


def link_to_nothing(file: Path) -> None:
    """As when the hub's cache lost the file and kept its name."""
    file.unlink()
    file.symlink_to("nothing")


DAMAGES: dict[str, tuple[Damage, str, str, str]] = {
    "truncated shard": (lambda m: cut_in_half(m / WEIGHTS), "corrupt_file", WEIGHTS, "cut short"),
    "missing shard": (lambda m: (m / WEIGHTS).unlink(), "corrupt_file", WEIGHTS, "missing"),
    "link to nothing": (
        lambda m: link_to_nothing(m / WEIGHTS),
        "corrupt_file",
        WEIGHTS,
        "missing",
    ),
    "wrong hash": (lambda m: flip_last_byte(m / WEIGHTS), "wrong_hash", WEIGHTS, "not what was"),
    "missing tokenizer": (
        lambda m: (m / "tokenizer.json").unlink(),
        "corrupt_file",
        "tokenizer.json",
        "missing",
    ),
    "bad JSON": (
        lambda m: (m / "config.json").resolve().write_bytes(b'{\n"model_type": llama}') and None,
        "corrupt_file",
        "config.json",
        "line 2",
    ),
    "unknown architecture": (
        lambda m: (
            (m / "config.json")
            .resolve()
            .write_bytes(json.dumps(CONFIG | {"model_type": "nobodys"}).encode())
            and None
        ),
        "unsupported_architecture",
        "nobodys",
        "unknown to",
    ),
}
"""(what to do to a folder, the error's code, what is named, how)."""
