"""What a prefix block's bits depend on besides its tokens, as one hash."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mlx_serving.runtime.backend.block_file import FORMAT

_SAMPLES = 64
_SAMPLE_BYTES = 4096


def identity(path: Path, config: dict[str, Any], **details: object) -> str:
    """32 hex digits. `config` is the model's; `details` are how it is run (types, kernels, cuts).

    Weights count by name, size, time of change, header and a sample of their bytes: reading all
    of a large model would take longer than loading it. What is copied elsewhere is another model.
    """
    versions = {name: _version(name) for name in ("mlx-serving", "mlx", "mlx-lm")}
    weights = [_file(file) for file in sorted(path.glob("model*.safetensors"))]
    machine = platform.system(), platform.machine()
    facts = [FORMAT, versions, machine, config, details, weights]
    text = json.dumps(facts, sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def adapter_identity(weights: Path, settings: Path) -> str:
    """The same of an adapter's two files."""
    return blake2b(
        settings.read_bytes() + json.dumps(_file(weights)).encode(), digest_size=16
    ).hexdigest()


def _file(path: Path) -> tuple[str, int, int, str]:
    stat = path.stat()
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(length, stat.st_size)))
        for i in range(_SAMPLES):
            file.seek(stat.st_size * i // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return path.name, stat.st_size, stat.st_mtime_ns, digest.hexdigest()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
