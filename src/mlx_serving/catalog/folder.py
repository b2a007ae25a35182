"""What a model folder holds, read without MLX: its facts, and which of its files are broken."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from mlx_serving.catalog.tensors import NotWhole, read_header
from mlx_serving.errors import ModelBroken

SLOW_TOKENIZERS = (
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tiktoken.model",
    "qwen.tiktoken",
)
INDEX = "model.safetensors.index.json"
_OPTIONAL = ("tokenizer_config.json", "generation_config.json", "chat_template.json")
"""Files that may be absent, but not be anything else than JSON objects."""
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")

ProblemKind = Literal["missing", "truncated", "bad_json", "bad_file", "mismatch", "wrong_hash"]


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One broken file of a model folder."""

    file: str
    kind: ProblemKind
    detail: str

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}"


WEIGHTLESS = "scripted"
"""The `model_type` that the runtime's scripted backend serves: tests and benchmarks, no weights."""


class ModelFolder(msgspec.Struct, frozen=True, kw_only=True):
    """A model on disk. `name` is what clients call it unless configured otherwise."""

    name: str
    path: Path
    tokenizer_path: Path
    """Folder of tokenizer.json: `path`, or where the converted one is kept."""
    model_type: str
    architecture: str
    context_length: int | None
    vocab_size: int | None
    quantization: str | None
    """`4-bit g32`, `4+6-bit g64` where layers differ, a mode's own name, or None for floats."""
    dtype: str | None
    weight_bytes: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool


def read_folder(path: Path, name: str, tokenizer_path: Path | None = None) -> ModelFolder:
    """Raises ModelBroken (corrupt_file) when config.json cannot be read; checks nothing else."""
    config = read_config(path)
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    merged = {**text, **{key: value for key, value in config.items() if value is not None}}
    generation = _optional_json(path / "generation_config.json")
    architectures = config.get("architectures")
    return ModelFolder(
        name=name,
        path=path,
        tokenizer_path=tokenizer_path or path,
        model_type=str(config.get("model_type", "")),
        architecture=str(architectures[0])
        if isinstance(architectures, list) and architectures
        else "",
        context_length=next((n for key in _CONTEXT_KEYS if (n := _int(merged.get(key)))), None),
        vocab_size=_int(merged.get("vocab_size")),
        quantization=_quantization(config),
        dtype=str(merged["torch_dtype"]) if "torch_dtype" in merged else _text(merged.get("dtype")),
        weight_bytes=sum(shard.stat().st_size for shard in weight_files(path) if shard.exists()),
        eos_token_ids=_ids(generation.get("eos_token_id")) or _ids(merged.get("eos_token_id")),
        has_chat_template=_has_chat_template(path),
    )


def read_config(path: Path) -> dict[str, Any]:
    """config.json. Raises ModelBroken (corrupt_file)."""
    try:
        return _json_object(path / "config.json")
    except _Bad as bad:
        message = f"the model in {path} has broken files: {bad.problem}"
        raise ModelBroken(message, code="corrupt_file") from None


def weight_files(path: Path) -> list[Path]:
    """The files that mlx-lm loads."""
    return sorted(path.glob("model*.safetensors"))


def check(path: Path) -> list[Problem]:
    """Every broken file: missing, cut short, or not what its name says. Reads headers, not weights."""
    if _optional_json(path / "config.json").get("model_type") == WEIGHTLESS:
        return [*_check_config(path), *_check_tokenizer(path)]
    return [*_check_config(path), *_check_weights(path), *_check_tokenizer(path)]


def has_fast_tokenizer(path: Path) -> bool:
    return (path / "tokenizer.json").is_file()


class _Bad(Exception):
    def __init__(self, file: str, kind: ProblemKind, detail: str) -> None:
        self.problem = Problem(file=file, kind=kind, detail=detail)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise _Bad(path.name, "missing", "is missing") from None
    except (ValueError, RecursionError) as e:
        raise _Bad(path.name, "bad_json", f"is not JSON ({e})") from None
    except OSError as e:
        raise _Bad(path.name, "bad_file", f"cannot be read ({e.strerror})") from None
    if not isinstance(value, dict):
        raise _Bad(path.name, "bad_json", "is not a JSON object")
    return value


def _optional_json(path: Path) -> dict[str, Any]:
    try:
        return _json_object(path)
    except _Bad:
        return {}


def _check_config(path: Path) -> Iterator[Problem]:
    try:
        config = _json_object(path / "config.json")
    except _Bad as bad:
        yield bad.problem
        return
    if not isinstance(config.get("model_type"), str):
        yield Problem(file="config.json", kind="bad_json", detail="has no model_type")


def _check_weights(path: Path) -> Iterator[Problem]:
    try:
        shards = _expected_shards(path)
    except _Bad as bad:
        yield bad.problem
        return
    for shard, listed in shards.items():
        try:
            tensors = read_header(shard)
        except NotWhole as why:
            yield Problem(file=shard.name, kind=why.kind, detail=why.detail)
            continue
        # Indexes that list a tied head or a buffer too many load well; another model's file does not.
        if listed and listed.isdisjoint(tensors):
            detail = f"holds none of the {len(listed)} tensors that {INDEX} lists in it"
            yield Problem(file=shard.name, kind="mismatch", detail=detail)


def _expected_shards(path: Path) -> dict[Path, set[str]]:
    """Each weight file and the tensors that the index lists in it, if there is one."""
    if (path / INDEX).exists():
        weight_map = _json_object(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(v, str) for v in weight_map.values()
        ):
            raise _Bad(INDEX, "bad_json", "has no weight_map of names to files")
        shards: dict[Path, set[str]] = {}
        for tensor, file in sorted(weight_map.items(), key=lambda item: str(item[1])):
            shards.setdefault(path / Path(file).name, set()).add(tensor)
        return shards
    found = weight_files(path)
    if not found:
        others = sorted(p.name for p in path.glob("*.gguf")) + sorted(
            p.name for p in path.glob("*.bin")
        )
        hint = f" (found {', '.join(others[:3])})" if others else ""
        raise _Bad(
            "model.safetensors", "missing", f"is missing, and there are no other shards{hint}"
        )
    return {shard: set() for shard in found}


def _check_tokenizer(path: Path) -> Iterator[Problem]:
    for name in _OPTIONAL:
        try:
            if (path / name).exists():
                _json_object(path / name)
        except _Bad as bad:
            yield bad.problem
    if has_fast_tokenizer(path):
        yield from _check_fast_tokenizer(path / "tokenizer.json")
    elif not any((path / name).is_file() for name in SLOW_TOKENIZERS):
        yield Problem(
            file="tokenizer.json",
            kind="missing",
            detail="is missing, and so is every other tokenizer file",
        )


class _FastTokenizer(msgspec.Struct):
    """Checked without being built: a large vocabulary would be 200 MB of objects."""

    model: dict[str, msgspec.Raw]


def _check_fast_tokenizer(path: Path) -> Iterator[Problem]:
    try:
        data = path.read_bytes()
    except OSError as e:
        yield Problem(file=path.name, kind="bad_file", detail=f"cannot be read ({e.strerror})")
        return
    try:
        msgspec.json.decode(data, type=_FastTokenizer)
    except msgspec.ValidationError:
        yield Problem(file=path.name, kind="bad_file", detail="is not a tokenizer: has no model")
    except msgspec.DecodeError as e:
        where = re.search(r"byte (\d+)", str(e))
        line = data.count(b"\n", 0, int(where[1]) if where else len(data)) + 1
        yield Problem(file=path.name, kind="bad_json", detail=f"is not JSON ({e}, line {line})")


def _quantization(config: Mapping[str, Any]) -> str | None:
    entry = config.get("quantization") or config.get("quantization_config")
    if not isinstance(entry, dict):
        return None
    bits, group = entry.get("bits"), entry.get("group_size")
    if entry.get("mode", "affine") != "affine":
        return str(entry["mode"])
    if isinstance(bits, int) and isinstance(group, int):
        own = {m["bits"] for m in entry.values() if isinstance(m, dict) and "bits" in m} - {bits}
        return f"{'+'.join(map(str, (bits, *sorted(own))))}-bit g{group}"
    return _text(entry.get("quant_method")) or "quantised"


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    return bool(_optional_json(path / "tokenizer_config.json").get("chat_template"))


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))
