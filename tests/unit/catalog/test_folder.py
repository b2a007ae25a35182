"""A model folder's facts, and each kind of broken file by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import model_folders
from mlx_serving.catalog.ensure import ensure
from mlx_serving.catalog.folder import check, read_folder
from mlx_serving.config import Config
from mlx_serving.errors import ModelBroken

CONFIG = model_folders.CONFIG | {
    "quantization": {"bits": 4, "group_size": 64},
    "eos_token_id": 2,
}


TOKENIZER = '{"model": {"vocab": {"a": 0}}}'


def shard(size: int = 64, name: str = "b") -> bytes:
    header = json.dumps(
        {name: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    ).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text(TOKENIZER)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, tensor in zip(names, "ab", strict=True):
        (path / name).write_bytes(shard(name=tensor))
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_facts_of_a_healthy_folder(model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (model / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    folder = ensure(str(model), Config(home=str(tmp_path / "home")))
    assert (folder.name, folder.path, folder.tokenizer_path) == ("tiny", model, model)
    assert (folder.model_type, folder.architecture) == ("llama", "LlamaForCausalLM")
    assert (folder.context_length, folder.vocab_size, folder.dtype) == (512, 10, "bfloat16")
    assert (folder.quantization, folder.eos_token_ids) == ("4-bit g64", (2, 7))
    assert folder.has_chat_template
    assert folder.weight_bytes == 2 * len(shard())


def test_a_text_model_inside_another_is_found(model: Path) -> None:
    inner = {"max_position_embeddings": 99, "vocab_size": 5, "eos_token_id": 1}
    (model / "config.json").write_text(json.dumps({"model_type": "vlm", "text_config": inner}))
    folder = read_folder(model, "x")
    assert (folder.context_length, folder.vocab_size, folder.eos_token_ids) == (99, 5, (1,))
    assert folder.quantization is None


def cut(name: str, keep: int) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:keep]) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(data) and None


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "file", "kind"),
    [
        (remove(SECOND), SECOND, "missing"),
        (cut(SECOND, len(shard()) - 1), SECOND, "truncated"),
        (cut(SECOND, 20), SECOND, "truncated"),
        (cut(SECOND, 0), SECOND, "truncated"),
        (write(SECOND, shard() + b"x"), SECOND, "bad_file"),
        (write(SECOND, (4).to_bytes(8, "little") + b"null"), SECOND, "bad_file"),
        (write(SECOND, (9).to_bytes(8, "little") + b'{"a": 12}'), SECOND, "bad_file"),
        (write("model.safetensors.index.json", b"{"), "model.safetensors.index.json", "bad_json"),
        (write("model.safetensors.index.json", b"{}"), "model.safetensors.index.json", "bad_json"),
        (write(SECOND, shard(name="other")), SECOND, "mismatch"),
        (write("config.json", b'{"a": '), "config.json", "bad_json"),
        (write("config.json", b"[]"), "config.json", "bad_json"),
        (write("config.json", b"{}"), "config.json", "bad_json"),
        (remove("config.json"), "config.json", "missing"),
        (remove("tokenizer.json"), "tokenizer.json", "missing"),
        (write("tokenizer.json", b'{"a"'), "tokenizer.json", "bad_json"),
        (write("tokenizer.json", b"{}"), "tokenizer.json", "bad_file"),
        (write("tokenizer_config.json", b"[]"), "tokenizer_config.json", "bad_json"),
    ],
)
def test_each_broken_file_is_named(
    model: Path, tmp_path: Path, damage: Callable[[Path], None], file: str, kind: str
) -> None:
    assert check(model) == []
    damage(model)
    assert [(problem.file, problem.kind) for problem in check(model)] == [(file, kind)]
    with pytest.raises(ModelBroken, match=file) as caught:
        ensure(str(model), Config(home=str(tmp_path / "home")))
    assert caught.value.code == "corrupt_file"


def test_every_problem_is_listed(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    problems = check(tmp_path)
    assert [problem.file for problem in problems] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert "x.gguf" in problems[1].detail


def test_an_index_cannot_point_outside_its_folder(model: Path) -> None:
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [(p.file, p.kind) for p in check(model)] == [("passwd", "missing")]


@pytest.mark.parametrize(
    ("file", "data", "line"),
    [
        ("config.json", b'{\n"a": 1,\n}', 3),
        ("tokenizer.json", b'{\n"model": {\n x}}', 3),
        ("tokenizer.json", b'{\n"model": {', 2),
    ],
)
def test_bad_json_is_said_with_its_line(model: Path, file: str, data: bytes, line: int) -> None:
    (model / file).write_bytes(data)
    assert f"line {line}" in check(model)[0].detail


def test_slow_tokenizer_files_count_as_a_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"x")
    assert check(model) == []
