"""GGUF → MLX folder: no loss where MLX has the type, a model that mlx-lm loads, nothing half-written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.convert.folder import check_space
from mlx_serving.runtime.convert.gguf import Options, Quantize, convert_gguf
from mlx_serving.runtime.convert.gguf_file import read_gguf
from mlx_serving.runtime.convert.repack import from_float32, repack

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 4, 2, 96, 2
BYTES = sorted(
    {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
)
BYTE_CHARS = [chr(b) for b in BYTES] + [chr(256 + i) for i in range(256 - len(BYTES))]
TOKENS = ["<|end|>", "<|start|>", *BYTE_CHARS, "Ġt", "he", "Ġthe", "<tool>"]
KINDS = [3, 3, *[1] * 256, 1, 1, 1, 4]


def layer_shapes(arch: str, head_dim: int) -> dict[str, tuple[int, ...]]:
    q, kv = HEADS * head_dim, KV_HEADS * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
        "attn_q": (q, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, q),
        "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN),
    }  # fmt: skip
    if arch in ("qwen3", "gemma3"):
        shapes |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
    if arch == "gemma3":
        shapes |= {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
    return shapes


def write_gguf(
    path: Path,
    arch: str = "llama",
    kind: Q = Q.F32,
    *,
    head_dim: int = 16,
    tied: bool = False,
    pre: str = "gpt-2",
    keys: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """A tiny random model; returns the tensors as float32 before quantisation."""
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, arch)
    # mlx-lm's gemma3 needs one layer that attends globally, and every sixth does.
    layers = 6 if arch == "gemma3" else LAYERS
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_key_length(head_dim)
    if arch == "gemma3":
        writer.add_sliding_window(8)
    for key, value in (keys or {}).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32 if isinstance(value, float) else writer.add_string)(key, value)  # fmt: skip
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types(KINDS)
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (len(TOKENS), HIDDEN)
    for layer in range(layers):
        for name, shape in layer_shapes(arch, head_dim).items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
            if arch == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                shapes[f"blk.{layer}.{name}.bias"] = shape[:1]
    tensors = {}
    for name, shape in shapes.items():
        if name in drop:
            continue
        base = 1.0 if name.endswith("norm.weight") else 0.0
        tensors[name] = (base + 0.1 * rng.standard_normal(shape)).astype(np.float32)
    for name, value in (tensors | (extra or {})).items():
        if value.ndim == 2 and kind is not Q.F32:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def convert(source: Path, folder: Path, **options: Any) -> int:
    """Returns the bytes reported as done, having checked them against the total announced."""
    announced: list[int] = []
    done: list[int] = []
    convert_gguf(
        source, folder, Options(**options), lambda _, total: announced.append(total), done.append
    )
    assert announced == [sum(done)]
    return announced[0]


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1, Q.Q8_0])
def test_kept_types_decode_to_the_same_values(kind: Q) -> None:
    values = np.random.default_rng(1).standard_normal((6, 128)).astype(np.float32)
    stored = gguf.quants.quantize(values, kind)
    weight, scales, biases = repack(kind, stored)
    bits = weight.shape[1] * 32 // 128
    ours = mx.dequantize(
        mx.array(weight),
        mx.array(scales.astype(np.float32)),
        mx.array(biases.astype(np.float32)),
        32,
        bits,
    )
    np.testing.assert_array_equal(np.array(ours), gguf.quants.dequantize(stored, kind))


def test_a_scale_too_large_for_its_bias_is_refused() -> None:
    block = np.zeros((1, 34), np.uint8)
    block[0, :2] = np.array([60000], np.float16).view(np.uint8)
    with pytest.raises(OverflowError):
        repack(Q.Q8_0, block)


def test_bfloat16_rounds_as_mlx_does() -> None:
    values = np.random.default_rng(2).standard_normal(1000).astype(np.float32)
    expected = np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16))
    np.testing.assert_array_equal(from_float32(values, "bfloat16"), expected)


@pytest.mark.parametrize("kind", [Q.F32, Q.Q8_0])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
def test_converted_models_load_and_generate(tmp_path: Path, arch: str, kind: Q) -> None:
    from mlx_lm import load, stream_generate

    write_gguf(tmp_path / "m.gguf", arch, kind, head_dim=32 if arch in ("qwen3", "gemma3") else 16)
    convert(tmp_path / "m.gguf", tmp_path / "m")
    model, tokenizer = load(str(tmp_path / "m"))
    assert tokenizer.eos_token_ids == {0}
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "the he"}])
    produced = [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=4)]
    assert 1 <= len(produced) <= 4
    assert all(0 <= token < len(TOKENS) for token in produced)


def reference_llama(tensors: dict[str, np.ndarray], ids: list[int], head_dim: int) -> np.ndarray:
    """Logits of a GGUF llama as llama.cpp defines it (rotary over neighbours), plainly, in float64."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    n = len(ids)

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def rope(x: np.ndarray) -> np.ndarray:
        angle = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    h = w["token_embd.weight"][ids]
    for layer in range(LAYERS):
        p = {k.split(".")[2]: v for k, v in w.items() if k.startswith(f"blk.{layer}.")}
        x = norm(h, p["attn_norm"])
        q = rope((x @ p["attn_q"].T).reshape(n, HEADS, head_dim))
        k = rope((x @ p["attn_k"].T).reshape(n, KV_HEADS, head_dim)).repeat(HEADS // KV_HEADS, 1)
        v = (x @ p["attn_v"].T).reshape(n, KV_HEADS, head_dim).repeat(HEADS // KV_HEADS, 1)
        scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(head_dim)
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        h = h + np.einsum("hij,jhd->ihd", weights, v).reshape(n, -1) @ p["attn_output"].T
        x = norm(h, p["ffn_norm"])
        gate = x @ p["ffn_gate"].T
        h = h + (gate / (1 + np.exp(-gate)) * (x @ p["ffn_up"].T)) @ p["ffn_down"].T
    return norm(h, w["output_norm.weight"]) @ w["output.weight"].T


def test_llama_logits_are_those_of_the_definition(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    tensors = write_gguf(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "m")
    model, _ = load_model(tmp_path / "m")
    ids = [1, 40, 90, 7, 12]
    ours = np.array(model(mx.array([ids])))[0]
    np.testing.assert_allclose(ours, reference_llama(tensors, ids, 16), atol=2e-4)


def test_gemma_norms_lose_the_one_that_the_model_adds(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "m.gguf", "gemma3", head_dim=32)
    convert(tmp_path / "m.gguf", tmp_path / "m", dtype="float32")
    weights = mx.load(str(tmp_path / "m" / "model.safetensors"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for theirs, ours in (("output_norm", "model.norm"), ("blk.1.post_ffw_norm", "model.layers.1.post_feedforward_layernorm")):  # fmt: skip
        np.testing.assert_array_equal(
            np.array(weights[f"{ours}.weight"]), tensors[f"{theirs}.weight"] - np.float32(1)
        )
    assert config["query_pre_attn_scalar"] == 32
    assert (config["sliding_window"], config["sliding_window_pattern"]) == (8, 6)
    assert config["rope_local_base_freq"] == 10000.0


def test_llama3_rope_scaling_is_recovered_from_its_divisors(tmp_path: Path) -> None:
    half = np.arange(0, 16, 2) / 16
    turns = 8192 / (2 * math.pi * 500000.0**half)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    divisors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    keys = {"llama.rope.freq_base": 500000.0}
    path = tmp_path / "m.gguf"
    write_gguf_with_base(path, keys, {"rope_freqs.weight": divisors})
    convert(path, tmp_path / "m")
    scaling = json.loads((tmp_path / "m" / "config.json").read_text())["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    write_gguf_with_base(path, keys, {"rope_freqs.weight": divisors[::-1].copy()})
    with pytest.raises(ModelBroken, match="rope_freqs"):
        convert(path, tmp_path / "n")


def write_gguf_with_base(path: Path, keys: dict[str, Any], extra: dict[str, np.ndarray]) -> None:
    """GGUFWriter refuses a key twice, so the common one is patched in place."""
    write_gguf(path, extra=extra)
    raw = path.read_bytes()
    for key, value in keys.items():
        at = raw.index(key.encode()) + len(key) + 4
        raw = raw[:at] + np.float32(value).tobytes() + raw[at + 4 :]
    path.write_bytes(raw)


def test_other_types_are_floats_unless_quantising_is_asked_for(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", Q.Q5_0)
    convert(tmp_path / "m.gguf", tmp_path / "floats")
    convert(tmp_path / "m.gguf", tmp_path / "four", quantize=Quantize(4, 32))
    assert "quantization" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    source = read_gguf(tmp_path / "m.gguf").tensors["blk.0.ffn_up.weight"]
    exact = gguf.quants.dequantize(source.rows, source.kind)
    floats = mx.load(str(tmp_path / "floats" / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(np.array(floats[name]), exact.astype(np.float16))
    weight, *_ = mx.quantize(mx.array(exact), 32, 4)
    four = mx.load(str(tmp_path / "four" / "model.safetensors"))
    np.testing.assert_array_equal(np.array(four[name]), np.array(weight))


def test_the_reader_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "qwen2", Q.Q4_1)
    ours, theirs = read_gguf(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(mine.rows.reshape(-1), tensor.data.reshape(-1).view(np.uint8))


def test_every_cut_is_a_typed_error_and_leaves_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    raw = (tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 8, 23, 24, 30, *range(40, len(raw) - 1, len(raw) // 60)]:
        cut.write_bytes(raw[:length])
        with pytest.raises(ModelBroken) as caught:
            convert(cut, tmp_path / "out")
        assert caught.value.code == "corrupt_file"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.gguf", "m.gguf"]


def test_flipped_header_bytes_never_escape_as_something_else(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    rng = np.random.default_rng(3)
    bad = tmp_path / "bad.gguf"
    refused = 0
    for at in rng.integers(0, 1200, 150):
        changed = bytearray(raw)
        changed[at] ^= int(rng.integers(1, 256))
        bad.write_bytes(changed)
        try:
            read_gguf(bad)
        except ModelBroken:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ({"arch": "mamba"}, "unsupported_architecture", "mamba"),
        ({"pre": "klingon"}, "unsupported_tokenizer", "klingon"),
        ({"drop": ("blk.1.ffn_up.weight",)}, "corrupt_file", "blk.1.ffn_up.weight"),
        ({"extra": {"blk.0.mystery.weight": np.ones(3, np.float32)}}, "unsupported_architecture", "mystery"),
        ({"keys": {"llama.expert_count": 8}}, "unsupported_architecture", "experts"),
        ({"keys": {"llama.rope.scaling.type": "magic", "llama.rope.scaling.factor": 2.0}}, "unsupported_architecture", "magic"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_named(
    tmp_path: Path, arguments: dict[str, Any], code: str, named: str
) -> None:
    write_gguf(tmp_path / "m.gguf", **arguments)
    with pytest.raises(ModelBroken, match=named) as caught:
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_process_finished_first_is_kept(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("theirs")
    convert(tmp_path / "m.gguf", tmp_path / "m")
    assert (tmp_path / "m" / "config.json").read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.gguf"]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    check_space(tmp_path, 1)
    with pytest.raises(ModelBroken) as caught:
        check_space(tmp_path, 1 << 62)
    assert caught.value.code == "no_space"
