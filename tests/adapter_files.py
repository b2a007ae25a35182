"""Adapters of no arithmetic, for scripted models."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

LAYER = "model.layers.0.self_attn.q_proj"


def write_adapter(folder: Path, seed: int = 0, *, elements: int = 8, **config: Any) -> Path:
    """Of mlx-lm's form; `elements`: numbers in each of its two matrices."""
    folder.mkdir(parents=True)
    settings = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"scale": 1.0}}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    write_tensors(
        folder / "adapters.safetensors",
        {f"{LAYER}.lora_a": (elements, 1), f"{LAYER}.lora_b": (1, elements)},
        seed,
    )
    return folder


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> None:
    """Float32; what follows the first bytes are holes in the file."""
    header, end = {}, 0
    for name, (rows, columns) in shapes.items():
        begin, end = end, end + 4 * rows * columns
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + struct.pack("<f", seed))
        file.truncate(8 + len(text) + end)
