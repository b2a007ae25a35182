"""What options of other engines are called here: the one table for the library's keyword arguments.

    Engine(maxNumSeqs=8)                       as max_num_seqs, by rule: camelCase is snake_case
    generate(…, stopSequences=["\\n"], temp=0)  as stop and temperature, by the table
    generate(…, num_draft_tokens=3)            a typed error that says what to do instead

The names are those of the older TypeScript engine, LM Studio's mlx-engine and mlx_lm. A name that is
ours always means what it means here. Nothing is imported but the errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlx_serving.errors import ConfigError, InvalidRequest, MLXServingError, UnsupportedParameter


def _as_it_is(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Renamed:
    """The option is there under another name; `read` makes its value ours."""

    to: str
    read: Callable[[Any], Any] = _as_it_is


@dataclass(frozen=True, slots=True)
class Refused:
    """The option is known and not there. `instead` says why, or what to do; a value in `neutral`
    asks for nothing."""

    instead: str
    neutral: tuple[Any, ...] = ()


Spelling = Renamed | Refused
Table = Mapping[str, Spelling]


def _models(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value)


def _seconds(value: Any) -> Any:
    return value / 1e3 if isinstance(value, int | float) else value


def _schema(value: Any) -> dict[str, Any]:
    """mlx-engine's `json_schema`: a schema, or its text."""
    schema = value
    if isinstance(value, str):
        try:
            schema = json.loads(value)
        except ValueError:
            raise InvalidRequest("'json_schema' is not JSON.", param="json_schema") from None
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def _structured(value: Any) -> dict[str, Any]:
    """The TypeScript engine's `structured`: a schema and a format."""
    if not isinstance(value, Mapping) or "schema" not in value:
        raise InvalidRequest("'structured' must have a schema.", param="structured")
    if value.get("format", "json") != "json":
        raise UnsupportedParameter(
            "'structured.format' is not supported: only json can be followed.",
            param="structured.format",
        )
    return _schema(value["schema"])


_TEXT_ONLY = Refused("text only", ([], ()))
_NO_SPECULATION = Refused("speculation is not built yet")
_WINDOW = Refused("penalty_window says how far all three penalties look back")

SETTINGS: Table = {
    "model": Renamed("models", _models),
    "model_id": Renamed("models", _models),
    "model_path": Renamed("models", _models),
    "local_path": Renamed("models", _models),
    "max_kv_size": Renamed("context_length"),
    "max_seq_nums": Renamed("max_num_seqs"),
    "cache_dir": Renamed("home"),
    "adapter_path": Refused(
        "adapter=['NAME=FOLDER'] is loaded beside the model; requests name MODEL+NAME"
    ),
    "auto_fit_context": Refused(
        "set context_length; requests wait where memory is short", (False,)
    ),
    "draft": Refused("speculation is not built yet", (False,)),
    "draft_model": _NO_SPECULATION,
    "enable_disk_cache": Refused("kv_disk_path names the folder", (False,)),
    "kv_group_size": Refused("kv_bits chooses the form; groups follow from the heads"),
    "num_draft_tokens": _NO_SPECULATION,
    "parameters": Refused("give them with each call", ({},)),
    "python_path": Refused("the worker runs in this interpreter"),
    "quantization": Refused("name a model that is quantised", ("none",)),
    "quantized_kv_start": Refused("every position is kept alike", (0,)),
    "revision": Refused("write it behind the hub id, ORG/NAME@REVISION"),
    "runtime_path": Refused("the worker is part of this package"),
    "seed": Refused("give it with each call"),
    "telemetry": Refused("Engine.metrics counts always, Engine.on() calls hooks"),
    "trust_remote_code": Refused("a model's own code is never run", (False,)),
    "vocab_only": Refused("models are loaded whole", (False,)),
}
"""For `Engine(...)` and `SyncEngine(...)`; ours are the fields of `Config`."""

OPTIONS: Table = {
    "chat_template_kwargs": Renamed("template_kwargs"),
    "include_stop_str_in_output": Renamed("include_stop_str"),
    "json_schema": Renamed("response_format", _schema),
    "max_completion_tokens": Renamed("max_tokens"),
    "repeat_penalty": Renamed("repetition_penalty"),
    "stop_sequences": Renamed("stop", _list),
    "stop_strings": Renamed("stop", _list),
    "structured": Renamed("response_format", _structured),
    "temp": Renamed("temperature"),
    "timeout_ms": Renamed("timeout_s", _seconds),
    "top_logprobs": Renamed("logprobs"),
    "adapters": Refused("the model is named MODEL+NAME"),
    "draft_model": _NO_SPECULATION,
    "frequency_context_size": _WINDOW,
    "hints": Refused("there is nothing to hint at", ({},)),
    "images": _TEXT_ONLY,
    "images_b64": _TEXT_ONLY,
    "max_image_size": _TEXT_ONLY,
    "min_tokens_to_keep": Refused("top_p and min_p keep the most likely token", (1,)),
    "multimodal": _TEXT_ONLY,
    "num_draft_tokens": _NO_SPECULATION,
    "presence_context_size": _WINDOW,
    "prompt_progress_callback": Refused("a prompt's progress is not told"),
    "prompt_progress_reporter": Refused("a prompt's progress is not told"),
    "prompt_tokens": Refused("give the token ids as the prompt"),
    "repetition_context_size": _WINDOW,
    "request_id": Refused("the engine draws it and Completion.request_id says it"),
    "signal": Refused("cancel the task, or close the generator"),
    "speculative_decoding_toggle": Refused("speculation is not built yet", (False,)),
    "stream": Refused("generate() streams; complete(), chat() and batch() do not"),
    "stream_id": Refused("the engine draws it and Completion.request_id says it"),
    "streaming": Refused("generate() streams; complete(), chat() and batch() do not"),
    "xtc_probability": Refused("XTC sampling is not implemented", (0,)),
    "xtc_threshold": Refused("XTC sampling is not implemented", (0,)),
}
"""For each call's options; ours are the fields that `answers.to_request` takes."""


@dataclass(frozen=True, slots=True)
class Normalised:
    values: dict[str, Any]
    """By our names; names that nobody knows are left as they are."""
    spelled: dict[str, str]
    """Our names → the caller's, where they differ."""


def snake_case(name: str) -> str:
    """`maxNumSeqs` → `max_num_seqs`; a name without a hump stays as it is."""
    return re.sub(r"(?<=[a-z0-9])[A-Z]", lambda hump: "_" + hump.group().lower(), name)


def find(name: str, ours: Collection[str], table: Table) -> Spelling | None:
    """What `name` means; None: nobody knows it."""
    for spelling in (name, snake_case(name)):
        if spelling in ours:
            return Renamed(spelling)
        if spelling in table:
            return table[spelling]
    return None


def normalise(given: Mapping[str, Any], ours: Collection[str], table: Table) -> Normalised:
    """Raises UnsupportedParameter for a name that is known and not there, InvalidRequest for two
    spellings of one option. What another engine's option leaves open with None is dropped."""
    values: dict[str, Any] = {}
    source: dict[str, str] = {}
    for name, value in given.items():
        match find(name, ours, table):
            case Renamed(to, read):
                if value is None and to != name:
                    continue
                if to in source:
                    both = f"'{source[to]}' and '{name}' are spellings of one option"
                    raise InvalidRequest(f"{both}; give one.", param=name)
                values[to], source[to] = read(value), name
            case Refused(instead, neutral):
                if value is not None and not any(_same(value, n) for n in neutral):
                    raise UnsupportedParameter(f"'{name}' is not supported: {instead}.", param=name)
            case None:
                values[name] = value
    return Normalised(values, {to: name for to, name in source.items() if to != name})


def normalise_settings(given: Mapping[str, Any], ours: Collection[str]) -> Normalised:
    """`normalise` by SETTINGS. Raises ConfigError."""
    try:
        return normalise(given, ours, SETTINGS)
    except InvalidRequest as error:
        raise ConfigError(error.message, param=error.param) from None


@contextmanager
def spelled_back(spelled: Mapping[str, str]) -> Iterator[None]:
    """Errors raised inside name their field as the caller spelled it."""
    try:
        yield
    except MLXServingError as error:
        root = re.split(r"[.\[]", error.param or "", maxsplit=1)[0]
        if theirs := spelled.get(root):
            error.param = theirs
            error.args = (error.message.replace(f"'{root}", f"'{theirs}", 1),)
            error.message = str(error)
        raise


def _same(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
