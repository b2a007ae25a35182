"""What kind of model a config describes, and whether this installation can run it.

mlx-lm has a module a model type; its folder is looked through without being imported.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mlx_serving.catalog.folder import WEIGHTLESS
from mlx_serving.types import ENCODERS

Modality = Literal["text", "vision", "audio", "embedding"]

_TOWERS: Mapping[str, Modality] = {
    "vision_config": "vision",
    "vision_tower": "vision",
    "audio_config": "audio",
}
"""Parts of a config that say what a model takes besides text."""
_TABLES = ("MODEL_REMAPPING", "MODEL_ARCHITECTURE_REMAPPING")


def modalities(config: Mapping[str, Any], folder: Path) -> tuple[Modality, ...]:
    """What goes in; `embedding` alone where vectors come out instead of text."""
    if _embeds(config, folder):
        return ("embedding",)
    towers = {_TOWERS[key] for key in _TOWERS if isinstance(config.get(key), dict)}
    return ("text", *sorted(towers, reverse=True))


def _embeds(config: Mapping[str, Any], folder: Path) -> bool:
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    if (folder / "modules.json").is_file() or (folder / "1_Pooling").is_dir():
        return True
    return bool(
        re.search(r"((?<!LMHead)Model|ForMaskedLM|ForSequenceClassification)$", name)
    ) and not ("Conditional" in name or "vision_config" in config)


def supported(config: Mapping[str, Any]) -> bool:
    """Whether we, or mlx-lm as it is installed, have this architecture."""
    return _is_ours(config) or _module(config) in _mlx_lm()[0]


class Arguments(NamedTuple):
    """What an architecture reads of config.json."""

    known: frozenset[str]
    required: tuple[str, ...]


def arguments(config: Mapping[str, Any]) -> Arguments | None:
    """None: that cannot be told, since the architecture reads it in a way of its own."""
    return None if _is_ours(config) else _arguments(_module(config))


def _is_ours(config: Mapping[str, Any]) -> bool:
    kind = config.get("model_type")
    return kind == WEIGHTLESS or kind in ENCODERS


def _module(config: Mapping[str, Any]) -> str:
    """The name of mlx-lm's module for it, if there is one."""
    _, renamed, by_class = _mlx_lm()
    kind, names = str(config.get("model_type", "")), config.get("architectures")
    for name in names if isinstance(names, list) else ():
        if (kind, name) in by_class:
            return by_class[kind, name]
    return renamed.get(kind, kind)


@lru_cache(maxsize=64)
def _arguments(module: str) -> Arguments | None:
    """The fields of its dataclass of arguments."""
    import ast

    root = _root()
    if root is None or module not in _mlx_lm()[0]:
        return None
    fields: dict[str, bool] = {}
    for node in ast.parse((root / "models" / f"{module}.py").read_text(encoding="utf-8")).body:
        match node:
            case ast.ClassDef(name="ModelArgs", bases=[ast.Name(id="BaseModelArgs")], body=body):
                for inner in body:
                    match inner:
                        case ast.AnnAssign(target=ast.Name(id=name), value=value):
                            fields[name] = value is None
                        case ast.FunctionDef(name="from_dict" | "__init__"):
                            return None
    if not fields:
        return None
    return Arguments(frozenset(fields), tuple(name for name, needed in fields.items() if needed))


def _root() -> Path | None:
    """mlx-lm's folder."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


@lru_cache(maxsize=1)
def _mlx_lm() -> tuple[frozenset[str], dict[str, str], dict[tuple[str, str], str]]:
    """Model types with a module, model types by other names, and those that a class name decides."""
    import ast  # not before it is needed: `serve` starts without

    root = _root()
    if root is None:
        return frozenset(), {}, {}
    known = frozenset(path.stem for path in (root / "models").glob("*.py"))
    tables: dict[str, dict[Any, str]] = {name: {} for name in _TABLES}
    for node in ast.parse((root / "utils.py").read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in _TABLES:
                tables[name] = ast.literal_eval(value)
    return known, tables[_TABLES[0]], tables[_TABLES[1]]
