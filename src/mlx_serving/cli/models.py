"""What the model commands share: where models are, and how one is written as JSON and as text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from mlx_serving import config_sources as settings
from mlx_serving.catalog.adapters import AdapterFiles
from mlx_serving.catalog.facts import Facts
from mlx_serving.catalog.health import Broken, Unable, Verdict
from mlx_serving.catalog.health import describe as in_words
from mlx_serving.catalog.home import models_home
from mlx_serving.catalog.inventory import Entry, hub_cache
from mlx_serving.config import Config

NOT_FETCHED = "not fetched"


class Shelf(msgspec.Struct, frozen=True):
    """Where this machine keeps models. `load` raises ConfigError."""

    config: Config
    home: Path
    cache: Path

    @classmethod
    def load(cls) -> Shelf:
        config = settings.load()
        return cls(config, models_home(config.home, os.environ), hub_cache())


def entry_json(entry: Entry) -> dict[str, Any]:
    """One model; unknown facts are null."""
    place = entry.place
    return {
        "name": place.name,
        "source": place.source,
        "path": str(place.path) if place.path else None,
        "size_bytes": entry.disk_bytes,
        **verdict_json(entry.verdict),
        **_facts_json(entry.facts),
        "drafts": list(entry.drafts),
        "adapter": _adapter_json(entry.adapter),
    }


def _adapter_json(found: AdapterFiles | None) -> dict[str, Any] | None:
    if found is None:
        return None
    names = ("kind", "writer", "rank", "layers", "held_bytes")
    return {name: getattr(found, name) for name in names}


def verdict_json(verdict: Verdict | None) -> dict[str, Any]:
    status, reason = (NOT_FETCHED, None) if verdict is None else in_words(verdict)
    problems = verdict.problems if isinstance(verdict, Broken) else ()
    causes = verdict.causes if isinstance(verdict, Unable) else ()
    return {
        "status": status.replace(" ", "_"),
        "reason": reason,
        "problems": msgspec.to_builtins(problems),
        "causes": msgspec.to_builtins(causes),
    }


def _facts_json(facts: Facts | None) -> dict[str, Any]:
    folder = facts.folder if facts else None
    return {
        "architecture": folder.architecture or None if folder else None,
        "model_type": folder.model_type or None if folder else None,
        "modalities": list(facts.modalities) if facts else [],
        "parameters": facts.parameters if facts else None,
        "quantization": folder.quantization if folder else None,
        "dtype": folder.dtype if folder else None,
        "weight_bytes": folder.weight_bytes if folder else None,
        "context_length": folder.context_length if folder else None,
        "vocab_size": folder.vocab_size if folder else None,
        "licence": facts.licence if facts else None,
    }


def count(number: int | None) -> str:
    """`134.5M`, `7.2B`."""
    if not number:
        return ""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return str(number)
