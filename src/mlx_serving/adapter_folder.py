"""An adapter's folder as mlx-lm and PEFT write it: what it says, and which tensor belongs where.

    mlx-lm  adapter_config.json {fine_tune_type, lora_parameters}, adapters.safetensors:
            LAYER.lora_a [in, rank], LAYER.lora_b [rank, out], with DoRA LAYER.m [out]
    PEFT    adapter_config.json {peft_type, r, lora_alpha}, adapter_model.safetensors:
            base_model.model.LAYER.lora_A.weight [rank, in], ….lora_B.weight [out, rank], with DoRA
            ….lora_magnitude_vector.weight [out]

Pure but for reading the settings: the gateway looks at headers with it, the worker loads by it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

CONFIG_FILE = "adapter_config.json"
MLX_LM_FILE, PEFT_FILE = "adapters.safetensors", "adapter_model.safetensors"

Wrong = Literal["missing", "truncated", "bad_json", "bad_file", "mismatch", "unsupported"]


class BadAdapter(Exception):
    """Why a folder cannot be served as an adapter. `unsupported`: its files are whole, but it is of a kind
    that nobody here runs."""

    def __init__(self, file: str, kind: Wrong, detail: str) -> None:
        super().__init__(f"{file}: {detail}")
        self.file = file
        self.kind: Wrong = kind
        self.detail = detail


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    peft: bool
    """PEFT wrote it: its matrices are transposed."""
    dora: bool
    config: Mapping[str, Any]

    @property
    def file(self) -> str:
        """The name of its weights' file."""
        return PEFT_FILE if self.peft else MLX_LM_FILE

    def scale(self, layer: str, rank: int) -> float:
        """What the layer's low-rank product is multiplied by."""
        if not self.peft:
            return float(self.config["lora_parameters"]["scale"])
        rank = int(_pattern(self.config.get("rank_pattern"), layer, rank))
        alpha = float(_pattern(self.config.get("alpha_pattern"), layer, self.config["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """The names of one layer's tensors. `m`: DoRA's magnitudes."""

    a: str
    b: str
    m: str | None = None


def is_adapter(folder: Path) -> bool:
    """It holds an adapter and no model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def read_settings(folder: Path) -> AdapterSettings:
    """Raises BadAdapter."""
    config = _read_json(folder / CONFIG_FILE)
    if "peft_type" in config:
        return _of_peft(config)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise _unsupported(f"fine_tune_type is {kind!r}: only lora and dora run beside a model")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or not _is_number(parameters.get("scale")):
        raise BadAdapter(CONFIG_FILE, "bad_json", "has no lora_parameters with a scale")
    return AdapterSettings(peft=False, dora=kind == "dora", config=config)


def _of_peft(config: dict[str, Any]) -> AdapterSettings:
    if config["peft_type"] != "LORA":
        raise _unsupported(f"peft_type is {config['peft_type']!r}: only LORA runs beside a model")
    if config.get("bias", "none") != "none":
        raise _unsupported("it changes biases (bias), which its base keeps")
    if config.get("modules_to_save"):
        raise _unsupported("it replaces whole layers (modules_to_save), which its base keeps")
    if not _is_number(config.get("lora_alpha")):
        raise BadAdapter(CONFIG_FILE, "bad_json", "has no lora_alpha")
    return AdapterSettings(peft=True, dora=bool(config.get("use_dora")), config=config)


_PEFT_PART = re.compile(
    r"(?:base_model\.model\.)?(?P<layer>.+)\."
    r"lora_(?P<part>A|B|magnitude_vector)(?:\.\w+?)??(?:\.weight)?"
)
_MLX_LM_PART = re.compile(r"(?P<layer>.+)\.(?P<part>lora_a|lora_b|m)")
_PARTS = {"A": "a", "B": "b", "magnitude_vector": "m", "lora_a": "a", "lora_b": "b", "m": "m"}


def layers(settings: AdapterSettings, names: Iterable[str]) -> dict[str, LayerTensors]:
    """Each layer's tensors among those of the weights' file, by the layer's path in the model. Raises
    BadAdapter."""
    pattern = _PEFT_PART if settings.peft else _MLX_LM_PART
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        match = pattern.fullmatch(name)
        if match is None:
            raise BadAdapter(
                settings.file, "unsupported", f"{name} is not of a linear layer's LoRA"
            )
        found.setdefault(match["layer"], {})[_PARTS[match["part"]]] = name
    wanted = {"a", "b", "m"} if settings.dora else {"a", "b"}
    for layer, parts in found.items():
        if parts.keys() != wanted:
            odd = ", ".join(sorted(parts.keys() ^ wanted))
            raise BadAdapter(settings.file, "mismatch", f"{layer} has too many or too few of {odd}")
    if not found:
        raise BadAdapter(settings.file, "mismatch", "holds no layer's tensors")
    return {layer: LayerTensors(**parts) for layer, parts in found.items()}


def _pattern(patterns: object, layer: str, otherwise: float) -> float:
    """PEFT's `rank_pattern`, `alpha_pattern`: a number by the end of a layer's path."""
    for key, value in (patterns if isinstance(patterns, dict) else {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", layer):
            return float(value)
    return otherwise


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadAdapter(path.name, "missing", "is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadAdapter(path.name, "bad_json", f"cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise BadAdapter(path.name, "bad_json", "is not a JSON object")
    return value


def _unsupported(detail: str) -> BadAdapter:
    return BadAdapter(CONFIG_FILE, "unsupported", detail)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
