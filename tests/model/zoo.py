"""Tiny models with random weights, one for each kind of architecture the runner must carry."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

VOCAB = 256
WINDOW = 16

_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_local_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}

_SPECIFIC: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "llama_sliding": {"model_type": "llama", **_SLIDING},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "gemma2": {"query_pre_attn_scalar": 16.0},
    "gemma3_text": {
        "query_pre_attn_scalar": 16.0,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
    },
    "gpt_oss": {**_EXPERTS, **_SLIDING},
    "deepseek_v3": {
        **_EXPERTS,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "topk_method": "noaux_tc",
    },
    "qwen3_next": {
        **_EXPERTS,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": 128,
        "full_attn_idxs": [1, 3],
    },
    "granitemoehybrid": {
        **_EXPERTS,
        **_MAMBA,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.25,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "mamba2": {
        "num_heads": 4,
        "head_dim": 32,
        "state_size": 16,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": (0.0, 100.0),
        "time_step_rank": "auto",
    },
    "rwkv7": {
        "norm_eps": 1e-5,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "hybrid_override_pattern": ["M", "*", "M", "-"],
    },
}

ARCHITECTURES = tuple(_SPECIFIC)
KINDS = ("llama", "gemma3_text", "deepseek_v3", "falcon_h1", "qwen3_next")
"""One of each way to keep a sequence's state: slabs, windows, latents, two kinds of recurrence."""
RECURRENT = (
    "qwen3_next",
    "falcon_h1",
    "lfm2",
    "granitemoehybrid",
    "mamba2",
    "rwkv7",
    "nemotron_h",
)


def each_kind() -> list[Any]:
    """For parametrize: KINDS at once, the other architectures in the slow stage."""
    return [
        name if name in KINDS else pytest.param(name, marks=pytest.mark.slow)
        for name in ARCHITECTURES
    ]


def config(name: str) -> dict[str, Any]:
    """What the model's config.json would hold."""
    return {"model_type": name, **_BASE, **_SPECIFIC[name]}


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """An f32 model whose weights are large enough that its tokens vary with its context; `changes` are
    to its config."""
    settings = config(name) | changes
    module = importlib.import_module(f"mlx_lm.models.{settings['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(settings))
    mx.random.seed(seed)
    weights = [(k, _weight(k, v)) for k, v in tree_flatten(model.parameters())]
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    model.eval()
    return model


def write(name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """`build`, as a folder that the loader takes; without a tokenizer."""
    weights = dict(tree_flatten(build(name, seed, **changes).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config(name) | changes))
    return folder


def _weight(name: str, value: mx.array) -> mx.array:
    if not mx.issubdtype(value.dtype, mx.floating):
        return value
    if "A_log" in name:
        return mx.log(mx.random.uniform(0.3, 2.0, value.shape))
    if value.ndim < 2:
        return value + 0.2 * mx.random.normal(value.shape)
    if "conv" in name:
        return mx.random.normal(value.shape) * 0.5
    # Small embeddings: where they are tied to the head, a token would else only repeat itself.
    scale = 0.15 if "embed" in name else 1.2 / math.sqrt(value.shape[-1])
    return mx.random.normal(value.shape) * scale
