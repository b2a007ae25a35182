"""Models over quantised KV: reuse, the disk, neighbours, cuts and preemption change no bit, and what
cannot be quantised is refused when it is loaded."""

from __future__ import annotations

import dataclasses
import json
import random
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime import native
from mlx_serving.runtime.backend.kv_layers import MakeKVLayer
from mlx_serving.runtime.backend.loader import load
from mlx_serving.runtime.backend.quantized_kv import FORMATS, KVFormat, QuantizedLayer
from mlx_serving.types import KVBits, SamplingParams
from mlx_serving.worker.wire import ModelOptions
from model import disk_server, zoo
from model.driver import Job, make_runner, run
from model.test_prefix import ANYWHERE, PLAIN, STEP, WHOLE_CHUNKS, Server

HEAD = 32
ARCHITECTURES = ("llama", "llama_sliding", "gemma2", "gpt_oss", "falcon_h1", "qwen3_next")
FUSED = ("llama", "gemma3_text")
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
needs_native = pytest.mark.skipif(not native.available(), reason=native.why())


def _tokens(seed: int, count: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(1, zoo.VOCAB) for _ in range(count))


def _form(bits: KVBits) -> KVFormat:
    form = FORMATS[bits]
    assert form is not None
    return form


def _layer(bits: KVBits) -> MakeKVLayer:
    return partial(QuantizedLayer, form=_form(bits))


def _native_layer(bits: KVBits) -> MakeKVLayer:
    from mlx_serving.runtime.backend.in_place import QuantizedInPlaceLayer

    return partial(QuantizedInPlaceLayer, form=_form(bits))


@lru_cache(maxsize=1)
def _model(name: str) -> Any:
    return zoo.build(name, head_dim=HEAD)


@lru_cache(maxsize=2)
def _native_model(name: str) -> Any:
    from mlx_serving.runtime.native.install import accelerate

    model = zoo.build(name, head_dim=HEAD)
    report = accelerate(model)
    assert report.is_fused and report.every_product
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_hit_gives_the_bits_of_a_miss(name: str) -> None:
    model, layer = _model(name), _layer("4")
    sharing, plain = Server(model, WHOLE_CHUNKS, layer), Server(model, PLAIN, layer)
    trunk = _tokens(0, 3 * STEP)
    for seed in (1, 2):
        prompt = (*trunk, *_tokens(seed, 5))
        (got,), (expected,) = sharing.answer(prompt), plain.answer(prompt)
        assert got[:2] == expected[:2]
    assert got[2] == len(trunk)


@needs_native
@pytest.mark.parametrize("bits", ["8", "k8v4"])
@pytest.mark.parametrize("name", FUSED)
def test_with_native_kernels_a_hit_at_any_block_does(name: str, bits: KVBits) -> None:
    """Blocks that were decoded too."""
    model, layer = _native_model(name), _native_layer(bits)
    sharing, plain = Server(model, ANYWHERE, layer), Server(model, PLAIN, layer)
    prompt = _tokens(3, 37)
    for cut in (37, 22, 37):
        (got,), (expected,) = sharing.answer(prompt[:cut]), plain.answer(prompt[:cut])
        assert got[:2] == expected[:2]
        goes_on = (*prompt[:cut], *got[0], 7)
        (got,), (expected,) = sharing.answer(goes_on), plain.answer(goes_on)
        assert got[:2] == expected[:2]
        assert got[2] >= len(goes_on) - 8


@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_blocks_come_back_from_disk(name: str, tmp_path: Path) -> None:
    model, layer = _model(name), _layer("k8v4")
    limits = dataclasses.replace(WHOLE_CHUNKS, disk_block_bytes=1 << 16, disk_bytes=1 << 30)
    prompt = _tokens(4, 3 * STEP + 3)
    first = disk_server.Server(model, limits, tmp_path, attention=layer)
    (expected,) = first.answer(prompt)
    first.stop()
    second = disk_server.Server(model, limits, tmp_path, attention=layer)
    (got,) = second.answer(prompt)
    assert got[:2] == expected[:2] and (expected[2], got[2]) == (0, 3 * STEP)
    assert second.counts.read == 3
    second.stop()


@needs_native
@pytest.mark.parametrize("bits", ["16", "8", "4", "k8v4"])
@pytest.mark.parametrize("name", FUSED)
def test_bits_do_not_depend_on_neighbours_or_cuts(name: str, bits: KVBits) -> None:
    model = _native_model(name)
    runner = make_runner(model, zoo.VOCAB, attention=_native_layer(bits))
    store, tokens = runner.store, _tokens(5, 48)

    def logits(cuts: list[int], row: int) -> list[np.ndarray]:
        """After each cut; rows before it hold other, longer sequences."""
        out, start = [], 0
        for other in range(row):
            store.start(other, 60)
            runner.forward_row(other, mx.array([_tokens(other, 60)]), 0)
        store.start(row, len(tokens))
        for end in cuts:
            out.append(np.array(runner.forward_row(row, mx.array([tokens[start:end]]), start)))
            start = end
        # The row before it is idle, and longer than what is read for the others.
        positions = {r: store.length(r) for r in range(row + 1) if r != row - 1}
        step = mx.array([[9]] * (row + 1))
        out.append(np.array(model(step, cache=store.batch_view(positions, row + 1))[row, -1:]))
        runner.reset()
        return out

    whole, parts = logits([20, 48], 0), logits([3, 4, 20, 37, 48], 1)
    assert (parts[2] == whole[0]).all()
    assert (parts[4] == whole[1]).all()
    assert (parts[5] == whole[2]).all()


@needs_native
@pytest.mark.parametrize("bits", ["16", "8", "k8v4"])
def test_fused_layers_give_the_bits_of_single_ones(bits: KVBits) -> None:
    """And keep the same words."""
    from mlx_serving.runtime.native.install import accelerate

    single = zoo.build("llama", head_dim=HEAD)
    assert not accelerate(single, fused=False).is_fused
    kept, logits = [], []
    for model in (_native_model("llama"), single):
        runner = make_runner(model, zoo.VOCAB, attention=_native_layer(bits))
        runner.store.start(0, 30)
        chunk = runner.forward_row(0, mx.array([_tokens(7, 29)]), 0)
        step = model(mx.array([[9]]), cache=runner.store.batch_view({0: 29}, 1))[0, -1:]
        logits.append([np.array(chunk), np.array(step)])
        slabs = runner.store.arrays()
        assert {a.dtype for a in slabs} == {mx.bfloat16 if bits == "16" else mx.uint32}
        kept.append([np.array(a[:, :, :30].view(mx.uint16)) for a in slabs])
    for ours, theirs in zip((logits[0], kept[0]), (logits[1], kept[1]), strict=True):
        assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))


@needs_native
@pytest.mark.parametrize("name", FUSED)
def test_positions_computed_at_once_have_their_bits(name: str) -> None:
    model = _native_model(name)
    runner = make_runner(model, zoo.VOCAB, attention=_native_layer("k8v4"), in_place=True)
    store = runner.store

    def after(*passes: tuple[list[int], dict[int, int]]) -> np.ndarray:
        store.start(0, 40)
        runner.forward_row(0, mx.array([_tokens(8, 29)]), 0)
        for tokens, ahead in passes:
            cache = store.batch_view({0: store.length(0)}, 1, ahead)
            last = np.array(model(mx.array([[t] for t in tokens]), cache=cache)[0, -1])
        runner.reset()
        return last

    singly = after(([9], {}), ([11], {}), ([13], {}))
    assert (after(([13, 9, 11], {0: 2})) == singly).all()


@needs_native
def test_preempted_sequences_give_the_same_tokens() -> None:
    model, layer = _native_model("llama"), _native_layer("4")
    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    jobs = [Job(_tokens(i, 17 + i), sampling, joins=i) for i in range(3)]
    plenty = run(make_runner(model, zoo.VOCAB, attention=layer), jobs, depth=2)
    scarce = run(make_runner(model, zoo.VOCAB, attention=layer), jobs, depth=2, capacity_tokens=112)
    assert sum(len(plan.starts) for plan in scarce.plans) > len(jobs), "one was preempted"
    for i in range(len(jobs)):
        assert scarce.outcomes[i].tokens == plenty.outcomes[i].tokens
        assert len(plenty.outcomes[i].tokens) == 40


def _folder(path: Path, name: str, **changes: Any) -> Path:
    path.mkdir()
    model = zoo.build(name, **changes)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (path / "config.json").write_text(json.dumps(zoo.config(name) | changes))
    return path


def _load(path: Path, **options: Any) -> Any:
    return load("m", path, ModelOptions(**options), lambda phase, detail: None)


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_less_of_the_budget_holds_more_tokens(tmp_path: Path, kernels: str) -> None:
    folder = _folder(tmp_path / "m", "llama", head_dim=HEAD)
    each: dict[str, int] = {}
    for bits in ("off", "16", "8", "k8v4", "4"):
        loaded = _load(folder, kv_bits=bits, kernels=kernels)
        assert loaded.info.kv_bits == bits
        each[bits] = loaded.info.kv_bytes_per_token
        limits = loaded.limits
        assert limits.prefix_block_bytes == limits.prefix_block_tokens * each[bits]
        assert limits.kv_bytes_per_token >= each[bits]
        assert limits.prefix_whole_chunks == (loaded.info.kernels == "mlx")
        (outcome,) = run(loaded.runner, [Job(_tokens(6, 20), GREEDY)], rows=16).outcomes.values()
        assert len(outcome.tokens) == 10
    vectors = 4 * 2 * 2  # layers, keys and values, heads
    width = each["off"] // (vectors * HEAD)
    assert each["16"] == vectors * HEAD * 2
    assert each["8"] == vectors * (HEAD + 2 * width)
    assert each["4"] == vectors * (HEAD // 2 + 2 * width)
    assert each["k8v4"] == (each["8"] + each["4"]) // 2


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("deepseek_v3", "latent"),
        ("mamba2", "no attention"),
        ("llama", "heads of 16 numbers"),
    ],
)
def test_what_cannot_be_quantised_is_refused(tmp_path: Path, name: str, why: str) -> None:
    folder = _folder(tmp_path / "m", name)
    with pytest.raises(ModelBroken, match=rf"kv_bits.*{why}"):
        _load(folder, kv_bits="8")
