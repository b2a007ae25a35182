"""How each GGUF architecture becomes an mlx-lm configuration and parameter names.

llama.cpp interleaves the rows of llama's q and k so that rotary pairs are neighbours; they are put
back, because adapters and other tools expect the published order. Gemma's norms are stored with
the 1 that the model adds; it is taken off again.
Sources: llama.cpp gguf-py/gguf/constants.py and tensor_mapping.py, convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.convert.gguf_file import GGUFFile, Tensor, corrupt

Json = dict[str, Any]

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BASE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA = _BASE | {"ffn_norm": "post_attention_layernorm"}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA3 = _BASE | _QK_NORM | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the MLX model and where its values come from.

    `row_order`: the stored row of each wanted row, or None; `offset` is added to every value.
    """

    name: str
    tensor: Tensor
    row_order: npt.NDArray[np.intp] | None = None
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Architecture:
    model_type: str
    class_name: str
    layer_names: Mapping[str, str]
    extra_config: Callable[[GGUFFile, Json], Json]
    interleaved_rope: bool = False
    norm_offset: float = 0.0
    biases: tuple[str, ...] = ()
    """Layer tensors that must have a bias."""


def architecture(gguf: GGUFFile) -> Architecture:
    """Raises ModelBroken (unsupported_architecture) naming it."""
    name = gguf.get("general.architecture", str)
    if name not in ARCHITECTURES:
        raise unsupported(
            gguf, f"GGUF architecture {name!r}; supported: {', '.join(ARCHITECTURES)}"
        )
    if gguf.get(f"{name}.expert_count", int, 0):
        raise unsupported(gguf, f"a mixture of experts in GGUF architecture {name!r}")
    if gguf.get("split.count", int, 1) > 1:
        raise unsupported(gguf, "a GGUF model split over several files; merge them first")
    return ARCHITECTURES[name]


def unsupported(gguf: GGUFFile, what: str) -> ModelBroken:
    return ModelBroken(f"{gguf.path.name}: cannot convert {what}", code="unsupported_architecture")


def model_config(gguf: GGUFFile) -> Json:
    """config.json without its quantisation."""
    arch, name = architecture(gguf), gguf.get("general.architecture", str)
    hidden = gguf.get(f"{name}.embedding_length", int)
    heads = gguf.get(f"{name}.attention.head_count", int)
    if heads <= 0 or hidden <= 0:
        raise corrupt(gguf.path, f"{heads} attention heads of a hidden size of {hidden}")
    head_dim = gguf.get(f"{name}.attention.key_length", int, hidden // heads)
    if gguf.get(f"{name}.rope.dimension_count", int, head_dim) != head_dim:
        raise unsupported(gguf, "rotary embeddings over a part of each head")
    if "token_embd.weight" not in gguf.tensors:
        raise corrupt(gguf.path, "tensor token_embd.weight is missing")
    config: Json = {
        "model_type": arch.model_type,
        "architectures": [arch.class_name],
        "hidden_size": hidden,
        "num_hidden_layers": gguf.get(f"{name}.block_count", int),
        "intermediate_size": gguf.get(f"{name}.feed_forward_length", int),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.get(f"{name}.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "rms_norm_eps": _decimal(gguf.get(f"{name}.attention.layer_norm_rms_epsilon", float)),
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": gguf.get(f"{name}.context_length", int),
        "rope_theta": _decimal(gguf.get(f"{name}.rope.freq_base", float, 10000.0)),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }
    if scaling := _rope_scaling(gguf, name, config):
        config["rope_scaling"] = scaling
    return config | arch.extra_config(gguf, config)


def parameters(gguf: GGUFFile, config: Json) -> list[Parameter]:
    """Every parameter, in the file's order. Raises ModelBroken when a tensor is missing or unknown."""
    arch = architecture(gguf)
    n_layers = int(config["num_hidden_layers"])
    wanted = {f"{short}.weight": f"{long}.weight" for short, long in _TOP.items()}
    if config["tie_word_embeddings"]:
        del wanted["output.weight"]
    optional: dict[str, str] = {}
    for layer in range(n_layers):
        for short, long in arch.layer_names.items():
            source, target = f"blk.{layer}.{short}", f"model.layers.{layer}.{long}"
            wanted[f"{source}.weight"] = f"{target}.weight"
            (wanted if short in arch.biases else optional)[f"{source}.bias"] = f"{target}.bias"
    if missing := sorted(wanted.keys() - gguf.tensors.keys()):
        raise corrupt(gguf.path, f"tensor {missing[0]} is missing ({len(missing)} in all)")
    names = wanted | optional
    if unknown := sorted(gguf.tensors.keys() - names.keys() - {_ROPE_FACTORS}):
        raise unsupported(gguf, f"tensor {unknown[0]} ({len(unknown)} unknown in all)")
    tensors = (tensor for tensor in gguf.tensors.values() if tensor.name != _ROPE_FACTORS)
    return [_parameter(gguf, arch, config, names[tensor.name], tensor) for tensor in tensors]


def _parameter(
    gguf: GGUFFile, arch: Architecture, config: Json, name: str, tensor: Tensor
) -> Parameter:
    if len(tensor.shape) > 2:
        raise corrupt(gguf.path, f"tensor {tensor.name} has {len(tensor.shape)} dimensions")
    order = None
    if arch.interleaved_rope and ".self_attn.q_proj." in name:
        order = _published_order(gguf, tensor, int(config["num_attention_heads"]))
    elif arch.interleaved_rope and ".self_attn.k_proj." in name:
        order = _published_order(gguf, tensor, int(config["num_key_value_heads"]))
    return Parameter(name, tensor, order, arch.norm_offset if name.endswith("norm.weight") else 0.0)


def _published_order(gguf: GGUFFile, tensor: Tensor, heads: int) -> npt.NDArray[np.intp]:
    """Rows (h, pair, half) as stored → (h, half, pair)."""
    rows = tensor.shape[0]
    if heads <= 0 or rows % (2 * heads):
        raise corrupt(gguf.path, f"{tensor.name} has {rows} rows for {heads} heads")
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _decimal(value: float) -> float:
    """A float32's value as the shortest decimal that means it (1e-5, not 9.99999974e-06)."""
    return float(str(np.float32(value)))


def _rope_scaling(gguf: GGUFFile, name: str, config: Json) -> Json | None:
    if _ROPE_FACTORS in gguf.tensors:
        return _llama3_scaling(gguf, name, config)
    kind = gguf.get(f"{name}.rope.scaling.type", str, "none")
    factor = gguf.get(f"{name}.rope.scaling.factor", float, 1.0)
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = gguf.get(f"{name}.rope.scaling.original_context_length", int)
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise unsupported(gguf, f"rope scaling of type {kind!r}")


def _llama3_scaling(gguf: GGUFFile, name: str, config: Json) -> Json | None:
    """llama3's scaling from the divisors that llama.cpp computed from it; checked by redoing them."""
    tensor = gguf.tensors[_ROPE_FACTORS]
    half = int(config["head_dim"]) // 2
    if tensor.kind.name != "F32" or tensor.shape != (half,):
        raise corrupt(gguf.path, f"{_ROPE_FACTORS} is not {half} float32 values")
    stored = tensor.rows.view(np.float32)[0]
    if np.all(stored == 1.0):
        return None
    original = gguf.get(f"{name}.rope.scaling.original_context_length", int, 8192)
    scaling = {
        "rope_type": "llama3",
        "factor": float(stored.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    if not np.allclose(_llama3_divisors(config, scaling), stored, rtol=1e-3):
        raise unsupported(gguf, f"the frequencies of {_ROPE_FACTORS}")
    return scaling


def _llama3_divisors(config: Json, scaling: Json) -> npt.NDArray[np.float64]:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    dims = int(config["head_dim"])
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(0, dims, 2) / dims)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divisors: npt.NDArray[np.float64] = 1.0 / ((1.0 - smooth) / factor + smooth)
    return divisors


def _llama(gguf: GGUFFile, _: Json) -> Json:
    return {
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "rope_traditional": False,
    }


def _qwen2(gguf: GGUFFile, config: Json) -> Json:
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise unsupported(gguf, "qwen2 heads that do not add up to the hidden size")
    return {}


def _qwen3(_gguf: GGUFFile, _: Json) -> Json:
    return {}


_GEMMA3_27B_LAYERS = 62


def _gemma3(gguf: GGUFFile, config: Json) -> Json:
    """Only the 27B model scales queries by hidden size / heads; the file does not say (nor how
    often a layer attends globally, unless it is new enough)."""
    if config["num_hidden_layers"] == _GEMMA3_27B_LAYERS:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    else:
        scalar = config["head_dim"]
    pattern = gguf.metadata.get("gemma3.attention.sliding_window_pattern", 6)
    if not isinstance(pattern, int):
        raise unsupported(gguf, "a sliding window pattern that is not periodic")
    return {
        "sliding_window": gguf.get("gemma3.attention.sliding_window", int),
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": _decimal(gguf.get("gemma3.rope.freq_base_swa", float, 10000.0)),
        "query_pre_attn_scalar": scalar,
    }


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", _LLAMA, _llama, interleaved_rope=True),
    "qwen2": Architecture(
        "qwen2", "Qwen2ForCausalLM", _LLAMA, _qwen2, biases=("attn_q", "attn_k", "attn_v")
    ),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _LLAMA | _QK_NORM, _qwen3),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _GEMMA3, _gemma3, norm_offset=-1.0
    ),
}  # fmt: skip
