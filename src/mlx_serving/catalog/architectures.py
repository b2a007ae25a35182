"""What kind of model a config describes, and whether this installation can run it.

mlx-lm has a module a model type; its folder is looked through without being imported.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

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
    kind = str(config.get("model_type", ""))
    if kind == WEIGHTLESS or kind in ENCODERS:
        return True
    known, renamed, by_class = _mlx_lm()
    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        if (kind, name) in by_class:
            return by_class[kind, name] in known
    return renamed.get(kind, kind) in known


@lru_cache(maxsize=1)
def _mlx_lm() -> tuple[frozenset[str], dict[str, str], dict[tuple[str, str], str]]:
    """Model types with a module, model types by other names, and those that a class name decides."""
    import ast  # not before it is needed: `serve` starts without

    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset(), {}, {}
    root = Path(spec.submodule_search_locations[0])
    known = frozenset(path.stem for path in (root / "models").glob("*.py"))
    tables: dict[str, dict[Any, str]] = {name: {} for name in _TABLES}
    for node in ast.parse((root / "utils.py").read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in _TABLES:
                tables[name] = ast.literal_eval(value)
    return known, tables[_TABLES[0]], tables[_TABLES[1]]
