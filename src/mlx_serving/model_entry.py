"""One of the served models where it is more than a name: its entry of `models`, with settings of its own.

models:
  - smollm2-135m
  - model: smollm2-135m
    name: smollm2-fast
    kernels: fast
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mlx_serving.types import Prepared

Name = Annotated[str, Meta(min_length=1)]

PER_MODEL = frozenset(
    {
        "dtype",
        "context_length",
        "chat_template",
        "tool_parser",
        "reasoning_parser",
        "max_num_seqs",
        "max_wait_s",
        "short_jobs_first",
        "prefill_step_size",
        "max_itl_ms",
        "pipeline_depth",
        "kernels",
        "kv_bits",
        "prefix_cache_bytes",
        "kv_disk_path",
        "kv_disk_bytes",
        "keep_alive_s",
        "exact_batch",
        "jump_forward",
        "json_digit_tokens",
        "json_string_tokens",
        "json_white_space",
    }
)
"""Settings of `Config` that an entry may have too: the entry's is then the model's, whatever a flag,
a variable or the file says for all models. Every other setting is the whole server's."""


class WarmUpChat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The beginning of a chat: what is cached of a system prompt is what later chats begin with."""

    system: str | None = None
    user: Name = "Hello"


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The fields below, and those of `PER_MODEL`, are the entry's keys."""

    model: Name
    """Alias, hub id, local folder or .gguf file."""
    name: Name | None = None
    """The name that clients use; default: the model's own. Entries with the same files need different ones."""
    aliases: tuple[str, ...] = ()
    """More names that clients may use; patterns, as claude-*, too."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters that run beside it: NAME=FOLDER, or in a file `name: folder` lines."""
    pinned: bool = False
    """Never unload it to make room or for idleness."""
    warm_up: tuple[Name | WarmUpChat, ...] = ()
    """Prompts that it answers when it has been loaded, before anybody else's: a text is a user's message."""
    slow_step_ms: Annotated[float, Meta(ge=0, le=60_000)] = 0.0
    """A fault, for tests and rehearsals: each of its steps is put off by so long, those of the other models are not."""
    unprepared: tuple[Prepared, ...] = ()
    """For measurements: what is not made ready before a request's turn, or not beside the loops that serve others."""
    settings: dict[str, Any] = {}
    """Those of `PER_MODEL` that it has, as `Config` has them."""


ENTRY_FIELDS = {f.name: f for f in msgspec.structs.fields(ModelEntry) if f.name != "settings"}


_ADAPTER = re.compile(r"(?:(?P<base>[^=]+)\+)?(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)=(?P<source>.+)")


class AdapterEntry(msgspec.Struct, frozen=True):
    """One of `Config.adapter`, or of an entry's `adapters`."""

    name: str
    source: str
    """Folder or hub id."""
    base: str | None = None
    """The model that it is for; None: the default one, or the entry's."""


def parse_adapter(text: str) -> AdapterEntry | None:
    """None: it is not one."""
    match = _ADAPTER.fullmatch(text)
    return AdapterEntry(match["name"], match["source"], match["base"]) if match else None
