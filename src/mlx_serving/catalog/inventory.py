"""Every model that is on this machine or has a name here: the hub's cache, our own folders, aliases."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from mlx_serving.adapter_folder import BadAdapter, is_adapter
from mlx_serving.catalog.adapters import AdapterFiles, read_adapter
from mlx_serving.catalog.aliases import ALIASES, Alias
from mlx_serving.catalog.digests import check_digests, expected
from mlx_serving.catalog.facts import Facts, File, list_files, read_facts
from mlx_serving.catalog.folder import has_fast_tokenizer
from mlx_serving.catalog.health import Machine, Verdict, examine
from mlx_serving.catalog.known import Known
from mlx_serving.catalog.names import default_name, gguf_folder
from mlx_serving.catalog.progress import Silent
from mlx_serving.catalog.resolve import AliasOf, HubRepo, LocalFolder, LocalGGUF, resolve
from mlx_serving.catalog.vocabulary import Candidate, drafts_for, vocabulary
from mlx_serving.errors import ModelBroken, ModelNotFound

Source = Literal["alias", "converted", "hub", "folder"]


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A model's name (what `serve` takes) and where it is; no path: an alias not fetched yet."""

    name: str
    source: Source
    path: Path | None


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    place: Place
    files: tuple[File, ...]
    facts: Facts | None
    """None where config.json cannot be read, or nothing is there yet."""
    verdict: Verdict | None
    """None for an alias that was not fetched yet."""
    drafts: tuple[str, ...] = ()
    """Models that could draft for it."""
    adapter: AdapterFiles | None = None
    """What it is, where it is no model."""

    @property
    def disk_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """As huggingface_hub has it (importing it costs 0.3 s)."""
    if cache := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{base}/huggingface"
    return Path(home).expanduser() / "hub"


def places(home: Path, cache: Path) -> list[Place]:
    """Aliases first, then our own folders, then the hub's cache; each by name."""
    aliases = [_alias_place(alias, home) for alias in ALIASES.values()]
    own = [
        Place(name=path.name, source="converted", path=path)
        for path in sorted((home / "models").glob("*/"))
        if not path.name.startswith(".") and path.name not in ALIASES
    ]
    return [*aliases, *own, *_in_hub(cache)]


def locate(spec: str, home: Path, cache: Path) -> Place:
    """Where MODEL is on this machine. Raises ModelNotFound if it is not, saying how to get it."""
    source = resolve(spec, home)
    match source:
        case LocalFolder(path):
            own = path.absolute().parent == (home / "models").absolute()
            kind: Source = "converted" if own else "folder"
            return Place(name=default_name(spec), source=kind, path=path.absolute())
        case LocalGGUF(path):
            place = Place(name=default_name(spec), source="converted", path=gguf_folder(path, home))
            if path.exists() and place.path is not None and not place.path.is_dir():
                raise ModelNotFound(f"{spec} is not converted; `mlx-serving pull {spec}` does that")
        case AliasOf(alias):
            place = _alias_place(alias, home)
        case HubRepo(repo, revision):
            name = repo if revision in (None, "main") else f"{repo}@{revision}"
            found = (place for place in _in_hub(cache) if place.name == name)
            place = next(found, Place(name=name, source="hub", path=None))
    if place.path is None or not place.path.is_dir():
        raise ModelNotFound(f"{spec} is not on this machine; `mlx-serving pull {spec}` fetches it")
    return place


def _alias_place(alias: Alias, home: Path) -> Place:
    path = home / "models" / alias.name
    return Place(name=alias.name, source="alias", path=path if path.is_dir() else None)


def _in_hub(cache: Path) -> Iterator[Place]:
    """Each branch or tag that was fetched; a snapshot that none points at by its commit."""
    for repo in sorted(cache.glob("models--*--*")):
        name = repo.name.removeprefix("models--").replace("--", "/", 1)
        by_commit = {
            ref.read_text().strip(): str(ref.relative_to(repo / "refs"))
            for ref in sorted((repo / "refs").rglob("*"), reverse=True)
            if ref.is_file()
        }
        for snapshot in sorted((repo / "snapshots").glob("*/")):
            revision = by_commit.get(snapshot.name, snapshot.name)
            if (snapshot / "config.json").is_symlink() or any(snapshot.glob("*.safetensors")):
                full = name if revision == "main" else f"{name}@{revision}"
                yield Place(name=full, source="hub", path=snapshot)


def describe(place: Place, machine: Machine, known: Known) -> Entry:
    """Facts and verdict; of the files' contents, only those that changed since they were read."""
    path = place.path
    if path is None:
        return Entry(place=place, files=(), facts=None, verdict=None)
    wrong = check_digests(expected(path), known, "changed", Silent(), place.name)
    verdict = examine(path, machine, wrong)
    if is_adapter(path):
        return Entry(
            place=place, files=list_files(path), facts=None, verdict=verdict, adapter=_adapter(path)
        )
    try:
        facts = read_facts(path, place.name)
        if place.source == "alias":
            facts = msgspec.structs.replace(facts, licence=ALIASES[place.name].licence)
    except ModelBroken:
        facts = None
    return Entry(place=place, files=list_files(path), facts=facts, verdict=verdict)


def _adapter(path: Path) -> AdapterFiles | None:
    try:
        return read_adapter(path)
    except BadAdapter:
        return None


def inventory(home: Path, cache: Path, machine: Machine) -> list[Entry]:
    """Every place described, with the models that could draft for it."""
    known = Known(home)
    entries = [describe(place, machine, known) for place in places(home, cache)]
    candidates = {entry.place.name: _candidate(entry, known) for entry in entries}
    pool = [candidate for candidate in candidates.values() if candidate is not None]
    return [
        msgspec.structs.replace(entry, drafts=drafts_for(own, pool))
        if (own := candidates[entry.place.name]) is not None
        else entry
        for entry in entries
    ]


def _candidate(entry: Entry, known: Known) -> Candidate | None:
    facts, path = entry.facts, entry.place.path
    if facts is None or path is None or "text" not in facts.modalities or not facts.parameters:
        return None
    if not has_fast_tokenizer(path):
        return None
    digest = vocabulary(path / "tokenizer.json", known)
    return None if digest is None else Candidate(entry.place.name, facts.parameters, digest)
