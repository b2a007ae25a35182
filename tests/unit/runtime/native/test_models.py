"""Whole models, small and random: moved to the kernels, fused or not, against mlx-lm's own forward."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_serving.runtime.native import ops, slab
from mlx_serving.runtime.native.slab import RowMask

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
    "head_dim": 16,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
GEMMA = {"sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}
MODELS = {
    "llama": COMMON,
    "llama-3": COMMON
    | {
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0},
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "qwen2": {k: v for k, v in COMMON.items() if k != "head_dim"},
    "qwen3": COMMON,
    "gemma3_text": COMMON | GEMMA,
    "gemma2": COMMON
    | {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 16,
    },
    "phi3": {k: v for k, v in COMMON.items() if k != "head_dim"},
    "starcoder2": {"norm_epsilon": 1e-5} | COMMON,
}
FUSED = {"llama", "llama-3", "qwen2", "qwen3", "gemma3_text"}


class Shared:
    """What one forward pass's layers share."""

    def __init__(self, rows: list[int], offsets: list[int], fused: bool) -> None:
        self.rows, self.offsets = mx.array(rows), mx.array(offsets)
        self.fused = fused


class Slab:
    """A minimal SlabCache, which also serves the layers one by one."""

    codes = slab.PLAIN

    def __init__(self, window: int = 0) -> None:
        self.window = window
        self.shared = Shared([], [], True)
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> mx.array:
        return self.shared.offsets

    def native_view(self) -> tuple[mx.array, mx.array] | None:
        return (self.shared.rows, self.shared.offsets) if self.shared.fused else None

    def native_slabs(
        self, kv_heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype
    ) -> tuple[mx.array, mx.array]:
        if self.keys is None or self.values is None:
            shape = (4, kv_heads, 64)
            return mx.zeros((*shape, key_dim), dtype), mx.zeros((*shape, value_dim), dtype)
        return self.keys, self.values

    def native_store(self, keys: mx.array, values: mx.array) -> None:
        self.keys, self.values = keys, values

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> RowMask:
        window = window_size or self.window
        return RowMask(self.shared.rows, self.shared.offsets, window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        slabs = self.native_slabs(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        rows, offsets = self.shared.rows, self.shared.offsets
        self.keys, self.values = ops.kv_write(*slabs, keys, values, rows, offsets)
        return self.keys, self.values


def build(name: str, quantised: bool = True) -> nn.Module:
    module = importlib.import_module(f"mlx_lm.models.{name.partition('-')[0]}")
    mx.random.seed(3)
    args = module.ModelArgs.from_dict({"model_type": name.partition("-")[0]} | MODELS[name])
    model = module.Model(args)
    if hasattr(model, "sanitize"):
        model.sanitize({})
    if quantised:
        nn.quantize(model, group_size=32, bits=4)
    mx.eval(model.parameters())
    return model


def slabs_of(model: nn.Module) -> list[Slab]:
    from mlx_lm.models.cache import make_prompt_cache

    return [Slab(getattr(c, "max_size", 0)) for c in make_prompt_cache(model)]


def forward(
    model: nn.Module,
    caches: list[Slab],
    tokens: list[list[int]],
    rows: list[int],
    offsets: list[int],
    fused: bool,
) -> np.ndarray:
    shared = Shared(rows, offsets, fused)
    for cache in caches:
        cache.shared = shared
    return np.array(model(mx.array(tokens), cache=caches).astype(mx.float32))


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_mlx_lm(name: str, quantised: bool) -> None:
    from mlx_serving.runtime.native.install import accelerate

    tokens = [[5, 17, 99, 3, 42, 8, 61, 0, 77, 23, 11]]
    expected = np.array(build(name, quantised)(mx.array(tokens)))
    model = build(name, quantised)
    report = accelerate(model, "f32")
    assert not report.left
    assert report.fused.startswith("not fused") != (name in FUSED), report.fused
    assert report.row_mask == (name != "gemma2")
    ways = (True, False) if name in FUSED else (False,) if report.row_mask else ()
    for fused in ways:
        got = forward(model, slabs_of(model), tokens, [1], [0], fused)
        assert np.abs(got - expected).max() < 2e-4, (fused, np.abs(got - expected).max())
    # mlx-lm's own caches still work, over the same layers.
    assert np.abs(np.array(model(mx.array(tokens))) - expected).max() < 2e-4


@pytest.mark.parametrize("mode", ["exact", "fast", "f32"])
@pytest.mark.parametrize("name", sorted(FUSED))
def test_bits_do_not_depend_on_chunks_neighbours_or_fusing(name: str, mode: ops.Mode) -> None:
    from mlx_serving.runtime.native.install import accelerate

    model = build(name)
    accelerate(model, mode)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 100, 40).tolist()
    wholes = [forward(model, slabs_of(model), [tokens], [2], [0], f)[0] for f in (True, False)]
    if name != "gemma3_text":  # its unfused GeGLU is MLX's own
        assert (wholes[0] == wholes[1]).all()

    for whole, fused in zip(wholes, (True, False), strict=True):
        caches = slabs_of(model)
        start = 0
        for count in (1, 9, 20, 3):
            part = forward(model, caches, [tokens[start : start + count]], [3], [start], fused)
            assert (part[0] == whole[start : start + count]).all(), (fused, start)
            start += count
        other = rng.integers(0, 100, 12).tolist()
        forward(model, caches, [other], [0], [0], fused)
        for i in range(start, 40):
            step = [[int(rng.integers(0, 100))], [tokens[i]]]
            got = forward(model, caches, step, [0, 3], [i - start + 12, i], fused)
            assert (got[1, 0] == whole[i]).all(), (fused, i)


def test_classes_are_not_patched() -> None:
    from mlx_lm.models import base, llama

    from mlx_serving.runtime.native.install import accelerate

    before = (nn.QuantizedLinear.__call__, nn.RMSNorm.__call__, llama.Attention.__call__)
    model = build("llama")
    report = accelerate(model)
    assert before == (nn.QuantizedLinear.__call__, nn.RMSNorm.__call__, llama.Attention.__call__)
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention
    assert isinstance(model.layers[0].self_attn.q_proj, nn.QuantizedLinear)
    assert report.packed_bytes > 0
    other = build("llama")
    assert type(other.layers[0].self_attn) is llama.Attention


def test_what_models_share_stays_as_it_was() -> None:
    """mlx-lm's experts share one activation object."""
    from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU

    from mlx_serving.runtime.native.install import accelerate

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = SwitchGLU(32, 32, 2)

    first, second = Experts(), Experts()
    assert first.experts.activation is second.experts.activation
    x, chosen = mx.random.normal((3, 32)), mx.array([[0], [1], [0]])
    want = np.array(first.experts(x, chosen))
    report = accelerate(first, "f32")
    assert report.replaced["SwiGLU"] == 1
    assert np.abs(np.array(first.experts(x, chosen)) - want).max() < 1e-5
    assert type(second.experts.activation) is SwiGLU
    assert accelerate(second, "f32").replaced == report.replaced


def test_bfloat16_model_keeps_its_cache_type() -> None:
    from mlx_serving.runtime.native.install import accelerate

    model = build("llama")
    model.set_dtype(mx.bfloat16)
    accelerate(model)
    caches = slabs_of(model)
    got = forward(model, caches, [[1, 2, 3]], [0], [0], True)
    assert caches[0].keys is not None and caches[0].keys.dtype == mx.bfloat16
    assert np.isfinite(got).all()


def test_slabs_of_a_chosen_type() -> None:
    from mlx_serving.runtime.native.install import accelerate

    full, half = build("qwen3"), build("qwen3")
    accelerate(full)
    accelerate(half, kv_dtype=mx.float16)
    caches = slabs_of(half)
    tokens = [[4, 9, 2, 77, 31]]
    got = forward(half, caches, tokens, [0], [0], True)
    assert caches[0].keys is not None and caches[0].keys.dtype == mx.float16
    assert np.abs(got - forward(full, slabs_of(full), tokens, [0], [0], True)).max() < 0.02


FORMS = [None, (32, 4, "affine"), (32, 4, "mxfp4"), (16, 4, "nvfp4"), (32, 8, "mxfp8")]


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_a_head_from_both_sides(form: tuple[int, int, str] | None) -> None:
    """As latent attention multiplies them: to its queries, or to what all heads share."""
    from mlx_lm.models.mla import MultiLinear

    from mlx_serving.runtime.native.install import accelerate

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = MultiLinear(32, 48, 3)

    model = Heads()
    if form is not None:
        group, bits, mode = form
        nn.quantize(model, group, bits, mode=mode)
    x = [mx.random.normal((2, heads, 5, 32), key=mx.random.key(heads)) for heads in (3, 1)]
    back = [mx.random.normal((2, heads, 5, 48), key=mx.random.key(heads)) for heads in (3, 1)]

    def results() -> list[np.ndarray]:
        out = [model.heads(a) for a in x] + [model.heads(a, transpose=False) for a in back]
        return [np.array(a) for a in out]

    want = results()
    report = accelerate(model, "f32")
    assert not report.left and report.every_product and report.packed_bytes
    got = results()
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and np.abs(a - b).max() < 1e-5 * max(1, np.abs(b).max())
    for i in range(5):  # the same bits alone
        alone = model.heads(x[0][:, :, i : i + 1]), model.heads(back[1][:, :, i : i + 1], False)
        assert (np.array(alone[0]) == got[0][:, :, i : i + 1]).all()
        assert (np.array(alone[1]) == got[3][:, :, i : i + 1]).all()


def test_heads_of_other_widths_are_left() -> None:
    from mlx_lm.models.mla import MultiLinear

    from mlx_serving.runtime.native.install import accelerate

    model = nn.Module()
    model.heads = MultiLinear(24, 48, 3)
    before = model.heads(mx.ones((1, 3, 1, 24)))
    report = accelerate(model)
    assert report.left == ["heads"]
    assert mx.array_equal(model.heads(mx.ones((1, 3, 1, 24))), before)
