"""Adapters with random weights, as mlx-lm and PEFT write them, and the tokens that mlx-lm gives with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model

ATTENTION = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj")


def write(
    folder: Path,
    base: Path,
    seed: int,
    *,
    keys: Sequence[str] = (*ATTENTION, "mlp.gate_proj", "mlp.down_proj"),
    rank: int = 4,
    size: float = 0.3,
    dora: bool = False,
    num_layers: int = 64,
) -> Path:
    """An adapter of `mlx_lm.lora`'s form for the model in `base`; `size`: how much it changes."""
    folder.mkdir(parents=True)
    parameters = {"rank": rank, "scale": 2.0, "dropout": 0.0, "keys": list(keys)}
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": parameters,
    }
    model, _ = load_model(base)
    model.freeze()
    linear_to_lora_layers(model, num_layers, parameters, use_dora=dora)
    mx.random.seed(seed)
    weights = {
        name: _random(name, value, rank, size)
        for name, value in tree_flatten(model.trainable_parameters())
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _random(name: str, value: mx.array, rank: int, size: float) -> mx.array:
    noise = mx.random.normal(value.shape)
    if name.endswith(".m"):
        return value * (1 + 0.2 * noise)
    return noise * (value.shape[0] ** -0.5 if name.endswith("lora_a") else size / rank)


def to_peft(adapter: Path, folder: Path) -> Path:
    """The same adapter as PEFT has it."""
    folder.mkdir(parents=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    parameters = config["lora_parameters"]
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
    weights = {}
    loaded: Any = mx.load(str(adapter / "adapters.safetensors"))
    for name, value in loaded.items():
        layer, _, part = name.rpartition(".")
        weights[f"base_model.model.{layer}.{names[part]}"] = mx.contiguous(value.T)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), weights)
    settings = {
        "peft_type": "LORA",
        "r": parameters["rank"],
        "lora_alpha": parameters["scale"] * parameters["rank"],
        "use_dora": config["fine_tune_type"] == "dora",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def expected(
    base: Path, adapter: Path | None, prompts: Sequence[Sequence[int]], count: int
) -> list[list[int]]:
    """mlx-lm's own greedy tokens, each prompt alone."""
    model, _ = load_model(base)
    model.update(_wide(model.parameters()))
    if adapter is not None:
        load_adapters(model, str(adapter))
        model.eval()
    return [
        [token for token, _ in generate_step(mx.array(list(prompt)), model, max_tokens=count)]
        for prompt in prompts
    ]


def _wide(tree: Any) -> Any:
    """Half types as float32, as the loader has them on a CPU."""
    from mlx.utils import tree_map

    return tree_map(
        lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, tree
    )
