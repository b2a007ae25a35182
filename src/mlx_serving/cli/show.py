"""`mlx-serving show MODEL`: all that is known of one model without serving it."""

from __future__ import annotations

import json as to_json
from pathlib import Path

import msgspec

from mlx_serving.adapter_folder import is_adapter
from mlx_serving.catalog import jobs
from mlx_serving.catalog.health import Healthy, this_machine
from mlx_serving.catalog.inventory import Entry, Place, describe, inventory, locate
from mlx_serving.catalog.known import Known
from mlx_serving.cli.exits import Exit, failed
from mlx_serving.cli.models import Shelf, count, entry_json, verdict_json
from mlx_serving.cli.say import Say, size
from mlx_serving.cli.table import print_facts
from mlx_serving.config import Config
from mlx_serving.content.reasoning import reasoning_in
from mlx_serving.content.text import Reading, TextSide
from mlx_serving.errors import ConfigError, MLXServingError, ModelNotFound
from mlx_serving.types import ChatPrompt
from mlx_serving.worker.jobwire import Described

_ASKS_FOR_TOOLS = ChatPrompt(messages=(), tools=({},))
_REUSE = {"blocks": "yes", "snapshots": "at snapshots", "none": "no"}


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's chat template can do, and which parsers read its answers."""

    template: bool = False
    tools: bool = False
    thinking: bool = False
    tool_parser: str | None = None
    reasoning_parser: str | None = None


def run(model: str, json: bool = False, say: Say | None = None) -> int:
    say = say or Say(json)
    try:
        shelf = Shelf.load()
        place = locate(model, shelf.home, shelf.cache)
    except (ConfigError, ModelNotFound) as error:
        return failed(error, say)
    entry = _entry(place, shelf)
    assert place.path is not None
    if is_adapter(place.path):
        return _show_adapter(entry, json)
    chat = chat_of(place.path, shelf.config)
    caches = _caches(entry)
    if json:
        files = msgspec.to_builtins(entry.files)
        report = entry_json(entry) | {"files": files, "chat": msgspec.to_builtins(chat)}
        report["caches"] = msgspec.to_builtins(caches) if caches else None
        print(to_json.dumps(report))
    else:
        print_facts([*_identity(entry), *_chat_facts(chat), *_cache_facts(caches)])
        _print_files(entry)
    return Exit.OK


def _show_adapter(entry: Entry, json: bool) -> int:
    files, found = msgspec.to_builtins(entry.files), entry.adapter
    if json:
        print(to_json.dumps(entry_json(entry) | {"files": files, "chat": None, "caches": None}))
        return Exit.OK
    facts = _identity(entry)
    if found is not None:
        facts += [
            ("adapter", f"{found.kind} of rank {found.rank}, written by {found.writer}"),
            ("changes", f"{found.layers} layers"),
            ("in memory", size(found.held_bytes)),
        ]
    print_facts([*facts, ("serve it", f"beside its model: --adapter NAME={entry.place.path}")])
    _print_files(entry)
    return Exit.OK


def _print_files(entry: Entry) -> None:
    print("files")
    print_facts([(f"  {file.name}", size(file.size_bytes)) for file in entry.files])


def _entry(place: Place, shelf: Shelf) -> Entry:
    """Drafts are found among all models; a folder from elsewhere has none."""
    machine = this_machine(shelf.config)
    for entry in inventory(shelf.home, shelf.cache, machine):
        if entry.place.path == place.path:
            return entry
    return describe(place, machine, Known(shelf.home))


def chat_of(folder: Path, config: Config) -> Chat:
    """As serving would choose it: the settings, or `auto` by the template's text."""
    try:
        text = TextSide.load(folder, Reading.of(config))
    except MLXServingError:  # the verdict says what is wrong
        return Chat()
    if text.template is None:
        return Chat()
    abilities = text.abilities()
    family = text.format(_ASKS_FOR_TOOLS).family if "tools" in abilities else None
    reasoning: str = config.reasoning_parser
    if reasoning == "auto" and "thinking" in abilities:
        reasoning = reasoning_in(text.template.source(tools="tools" in abilities)) or "none"
    return Chat(
        template=True,
        tools="tools" in abilities,
        thinking="thinking" in abilities,
        tool_parser=family.name if family else None,
        reasoning_parser=reasoning if "thinking" in abilities else None,
    )


def _caches(entry: Entry) -> Described | None:
    """Asked of the model's own code, in a job; None where it could not be built anyway."""
    if not isinstance(entry.verdict, Healthy) or entry.place.path is None:
        return None
    try:
        return jobs.describe(entry.place.path)
    except MLXServingError:
        return None


def _identity(entry: Entry) -> list[tuple[str, str]]:
    facts, status = entry.facts, verdict_json(entry.verdict)
    reason = f": {status['reason']}" if status["reason"] else ""
    common = [
        ("name", entry.place.name),
        ("status", status["status"].replace("_", " ") + reason),
        ("path", str(entry.place.path)),
        ("on disk", size(entry.disk_bytes)),
    ]
    if facts is None:
        return common
    folder = facts.folder
    return [
        *common,
        ("architecture", f"{folder.architecture} ({folder.model_type})".strip()),
        ("parameters", count(facts.parameters)),
        ("weights", folder.quantization or folder.dtype or ""),
        ("context", f"{folder.context_length} tokens" if folder.context_length else ""),
        ("vocabulary", f"{folder.vocab_size} tokens" if folder.vocab_size else ""),
        ("takes", ", ".join(facts.modalities)),
        ("licence", facts.licence or "not said"),
        ("drafts for it", ", ".join(entry.drafts)),
    ]


def _chat_facts(chat: Chat) -> list[tuple[str, str]]:
    can = [word for word, has in (("tools", chat.tools), ("thinking", chat.thinking)) if has]
    return [
        ("chat template", f"yes ({', '.join(can) or 'plain'})" if chat.template else "none"),
        ("tool parser", chat.tool_parser or ""),
        ("reasoning parser", chat.reasoning_parser or ""),
    ]


def _cache_facts(caches: Described | None) -> list[tuple[str, str]]:
    if caches is None:
        return []
    state = f"{size(caches.state_bytes_per_row)} a sequence" if caches.state_bytes_per_row else ""
    forms = [f"{size(each)} with {bits}" for bits, each in caches.kv_bytes_by_bits.items()]
    if caches.kv_bits_why_not:
        forms.append(f"{'no others' if forms else 'no'}: {caches.kv_bits_why_not}")
    return [
        ("KV", f"{size(caches.kv_bytes_per_token)} a token" if caches.kv_bytes_per_token else ""),
        ("--kv-bits", ", ".join(forms)),
        ("recurrent state", state),
        ("prefix reuse", f"{_REUSE[caches.prefix_reuse]}: {caches.why}"),
        ("decoding", "" if caches.batched else "one forward pass a row"),
    ]
