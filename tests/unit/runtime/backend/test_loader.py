"""From a folder to a running model, and what is said when the folder is not right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime import native
from mlx_serving.runtime.backend.loader import check_weights, load
from mlx_serving.runtime.backend.memory import device_memory_bytes
from mlx_serving.runtime.backend.mlx_model import context_length, eos_token_ids
from mlx_serving.runtime.backend.model import LoadedModel
from mlx_serving.types import SamplingParams
from mlx_serving.worker.wire import ModelOptions
from model import zoo
from model.driver import Job, run


def save(path: Path, name: str = "qwen3", dtype: mx.Dtype = mx.bfloat16, **extra: Any) -> Any:
    """Write a zoo model as an MLX folder; the model."""
    model = zoo.build(name)
    model.set_dtype(dtype)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    (path / "config.json").write_text(json.dumps({**zoo.config(name), **extra}))
    return model


def loaded(path: Path, **options: Any) -> tuple[LoadedModel, list[str]]:
    phases: list[str] = []
    model = load("m", path, ModelOptions(**options), lambda phase, detail: phases.append(phase))
    return model, phases


def test_a_folder_becomes_a_runner(tmp_path: Path) -> None:
    original = save(tmp_path, eos_token_id=[3, 4])
    model, phases = loaded(tmp_path, max_num_seqs=3, context_length=100, kernels="off")
    assert phases[0] == "loading" and phases[-1] == "compiling"
    info, limits = model.info, model.limits
    assert (info.architecture, info.vocab_size, info.kernels) == ("qwen3", zoo.VOCAB, "mlx")
    assert info.eos_token_ids == limits.eos_token_ids == (3, 4)
    assert info.context_length == limits.context_length == 100
    # 4 layers × keys and values × 2 heads × 16 dimensions.
    element = 4 if info.dtype == "float32" else 2
    assert info.kv_bytes_per_token == 4 * 2 * 2 * 16 * element
    assert limits.max_num_seqs == 3 and limits.kv_capacity_tokens == 3 * 256
    if mx.default_device().type == mx.cpu:
        assert info.dtype == "float32" and limits.prefill_step_size == 8
        original.set_dtype(mx.float32)
    prompt = (9, 8, 7, 6, 5)
    job = Job(prompt, SamplingParams(temperature=0.0, max_tokens=6))
    expected = [t for t, _ in generate_step(mx.array(prompt), original, max_tokens=6)]
    assert run(model.runner, [job], rows=3).outcomes[0].tokens == expected


def test_dtype_and_exactness_are_options(tmp_path: Path) -> None:
    save(tmp_path, dtype=mx.float32)
    model, _ = loaded(tmp_path, dtype="bfloat16", kernels="off", prefill_step_size=7)
    assert model.info.dtype == "bfloat16" and model.limits.prefill_step_size == 7
    assert not model.info.batch_invariant
    exact, _ = loaded(tmp_path, exact_batch=True, kernels="off", max_num_seqs=2)
    assert exact.info.batch_invariant


def _nothing(path: Path) -> None:
    pass


def _no_type(path: Path) -> None:
    save(path)
    (path / "config.json").write_text("{}")


def _bad_json(path: Path) -> None:
    (path / "config.json").write_text("{oops")


def _unknown(path: Path) -> None:
    save(path, model_type="warp_drive")


def _no_weights(path: Path) -> None:
    save(path)
    (path / "model.safetensors").unlink()


def _truncated(path: Path) -> None:
    save(path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _not_tensors(path: Path) -> None:
    save(path)
    (path / "model.safetensors").write_bytes(b"<html>not found</html>")


def _missing_shard(path: Path) -> None:
    save(path)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _wrong_shape(path: Path) -> None:
    save(path, intermediate_size=96)


def _own_code(path: Path) -> None:
    save(path, model_file="mine.py")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_nothing, r"config\.json is missing"),
        (_no_type, "no model_type"),
        (_bad_json, "cannot be read"),
        (_unknown, "warp_drive not supported"),
        (_no_weights, r"has no model\*\.safetensors"),
        (_truncated, r"model\.safetensors is truncated: \d+ of \d+ bytes"),
        (_not_tensors, "not safetensors"),
        (_missing_shard, r"lacks model-00002\.safetensors"),
        (_wrong_shape, "shape"),
        (_own_code, r"mine\.py"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, spoil: Any, message: str) -> None:
    spoil(tmp_path)
    with pytest.raises(ModelBroken, match=message):
        loaded(tmp_path, kernels="off")


def test_whole_weights_are_counted(tmp_path: Path) -> None:
    model = save(tmp_path, dtype=mx.float32)
    assert check_weights(tmp_path) == sum(a.nbytes for _, a in tree_flatten(model.parameters()))


def test_every_end_of_sequence_is_found(tmp_path: Path) -> None:
    write = lambda name, value: (tmp_path / name).write_text(json.dumps(value))  # noqa: E731
    assert eos_token_ids(tmp_path, {}) == ()
    write("generation_config.json", {"eos_token_id": [7, 8]})
    write("tokenizer_config.json", {"eos_token": {"content": "<end>"}})
    write("tokenizer.json", {"added_tokens": [{"id": 11, "content": "<end>"}]})
    config = {"eos_token_id": 8, "text_config": {"eos_token_id": 9}}
    assert eos_token_ids(tmp_path, config) == (7, 8, 9, 11)
    write("tokenizer.json", {"model": {"vocab": {"<end>": 12}}})
    assert eos_token_ids(tmp_path, {}) == (7, 8, 12)
    write(
        "tokenizer_config.json", {"eos_token": "x", "added_tokens_decoder": {"5": {"content": "x"}}}
    )
    assert eos_token_ids(tmp_path, {}) == (7, 8, 5)


def test_the_context_is_read(tmp_path: Path) -> None:
    assert context_length({"text_config": {"max_position_embeddings": 64}}, tmp_path) == 64
    assert context_length({"n_positions": 99}, tmp_path) == 99
    assert context_length({}, tmp_path) == 8192
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    assert context_length({}, tmp_path) == 8192


def test_the_device_says_how_much_it_has() -> None:
    assert device_memory_bytes({"device_name": "cpu"}) is None
    assert device_memory_bytes({"memory_size": 5, "max_recommended_working_set_size": 4}) == 4


def test_kernels_run_where_they_can(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    usable = native.available() and mx.default_device().type == mx.cpu
    model, _ = loaded(tmp_path)
    assert model.info.kernels == ("exact" if usable else "mlx")
    job = Job((9, 8, 7), SamplingParams(temperature=0.0, max_tokens=3))
    assert len(run(model.runner, [job]).outcomes[0].tokens) == 3
    if not native.available():
        with pytest.raises(ModelBroken, match="kernels 'fast' cannot run here"):
            loaded(tmp_path, kernels="fast")
