"""How settings come to be: their sources, merged, and text made into values.

A setting comes from, in this order: flag > `MLX_SERVING_*` > YAML file > default. All three
sources are text; one function (`parse`) turns text into values, and one (`load`) merges the
sources and names every mistake with its place.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import msgspec

from mlx_serving.config import (
    ENV_PREFIX,
    FIELDS,
    KINDS,
    SECRETS,
    Config,
    closest,
    describe,
    env_name,
    flag_name,
    is_bool,
    is_list,
    unknown,
)
from mlx_serving.contradictions import contradictions
from mlx_serving.errors import ConfigError
from mlx_serving.model_entry import ENTRY_FIELDS, PER_MODEL, ModelEntry
from mlx_serving.secret import hashed


class Given(msgspec.Struct, frozen=True):
    """One setting as a source gave it. `place` names the source the way its author would find it."""

    place: str
    name: str
    value: Any
    """A text, None, a list of texts or, from a program, of the setting's own type. An item of `models`
    may be a Given itself, whose value is the list of the entry's keys."""


Convert = Callable[[str, Any], Any]
"""`parse` or `_convert`."""


class _Invalid(Exception):
    """Why a value cannot be; the place is the caller's to add."""


def load(
    flags: Mapping[str, str | list[str]] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    file: str | None = None,
) -> Config:
    """Merge all sources; a flag wins over a variable over the file over the default.

    Args:
        flags: field name → text, as given on a command line.
        env: the environment; default `os.environ`. `MLX_SERVING_CONFIG` names a file.
        file: a YAML file, as `--config` names it.

    Raises:
        ConfigError: one line a mistake, each with its place; `param` is the first one's.
    """
    env = os.environ if env is None else env
    path = file or env.get(ENV_PREFIX + "CONFIG")
    given: list[Given] = []
    problems: list[str] = []
    if path:
        from mlx_serving.config_file import read  # YAML costs 60 ms

        in_file, wrong = read(Path(path))
        given += in_file
        problems += wrong
    in_env, wrong = _from_env(env)
    given += in_env
    problems += wrong
    given += [Given(flag_name(name), name, text) for name, text in (flags or {}).items()]

    return _merge(Config(), given, parse, problems)


def override(
    base: Config, values: Mapping[str, object], spelled: Mapping[str, str] | None = None
) -> Config:
    """`base` with typed `values`, checked like any other source; `spelled` has the caller's names of
    settings, where they are not ours. Raises ConfigError."""
    problems = [unknown(name, "setting") for name in values if name not in FIELDS]
    given = [
        _from_program((spelled or {}).get(name, name), name, value)
        for name, value in values.items()
        if name in FIELDS
    ]
    return _merge(base, given, _convert, problems)


def _from_program(place: str, name: str, value: object) -> Given:
    if not isinstance(value, list | tuple):
        return Given(place, name, value)
    items = [
        Given(
            f"{place}[{i}]", name, [_of_entry(f"{place}[{i}].{k}", k, v) for k, v in item.items()]
        )
        if name == "models" and isinstance(item, Mapping)
        else item
        for i, item in enumerate(value)
    ]
    return Given(place, name, items)


def _of_entry(place: str, key: str, value: object) -> Given:
    if key == "adapters" and isinstance(value, Mapping):
        value = [f"{name}={source}" for name, source in value.items()]
    return Given(place, key, value)


def _merge(base: Config, given: Iterable[Given], convert: Convert, problems: list[str]) -> Config:
    """`base` with what was given, a later one in place of an earlier. Raises ConfigError."""
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for item in given:
        places[item.name] = item.place
        value = item.value
        if item.name == "models" and isinstance(value, list):
            value = [_entry(i, convert, problems) if isinstance(i, Given) else i for i in value]
            if None in value:
                continue
        try:
            values[item.name] = convert(item.name, value)
        except _Invalid as error:
            problems.append(f"{item.place}: {error}")
    return _finish(base, values, places, problems)


def _entry(given: Given, convert: Convert, problems: list[str]) -> ModelEntry | None:
    """None: `problems` says why not."""
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for item in given.value:
        try:
            if item.name in PER_MODEL:
                values.setdefault("settings", {})[item.name] = convert(item.name, item.value)
            elif item.name in ENTRY_FIELDS:
                values[item.name] = convert(item.name, item.value)
            elif item.name in FIELDS:
                wrong.append(f"{item.place}: it is set for the whole server, not for one model")
            else:
                close = closest(item.name, [*ENTRY_FIELDS, *PER_MODEL])
                hint = f" (did you mean '{close}'?)" if close else ""
                wrong.append(f"{item.place}: unknown key{hint}")
        except _Invalid as error:
            wrong.append(f"{item.place}: {error}")
    if not any(item.name == "model" for item in given.value):
        wrong.append(f"{given.place}: 'model' is missing")
    problems += wrong
    return None if wrong else ModelEntry(**values)


def _finish(
    base: Config, values: Mapping[str, Any], places: Mapping[str, str], problems: Iterable[str]
) -> Config:
    config = msgspec.structs.replace(base, **values)
    problems = [*problems, *contradictions(config, places)]
    if problems:
        raise ConfigError("\n".join(problems), param=problems[0].split(": ", 1)[0])
    return config


# ------------------------------------------------------------------- environment

_NOT_SETTINGS = frozenset({"AMX", "CONFIG", "REQUIRE_NATIVE"})
"""MLX_SERVING_ variables that mean something else than a field."""


def _from_env(env: Mapping[str, str]) -> tuple[list[Given], list[str]]:
    """Settings among the variables, and complaints about those that look like one but are none.

    An empty variable counts as unset, as compose files and unit files write it.
    """
    given: list[Given] = []
    problems: list[str] = []
    for variable in sorted(env):
        if not variable.startswith(ENV_PREFIX) or not env[variable]:
            continue
        rest = variable.removeprefix(ENV_PREFIX)
        if rest in _NOT_SETTINGS or rest.startswith("TEST_"):
            continue
        name = rest.lower()
        if name not in FIELDS or variable != env_name(name):
            close = closest(name)
            hint = f" (did you mean '{env_name(close)}'?)" if close else ""
            problems.append(f"{variable}: unknown variable{hint}")
            continue
        text = env[variable]
        parts = [part.strip() for part in text.split(",")] if is_list(name) else text
        given.append(Given(variable, name, parts))
    return given, problems


# ------------------------------------------------------------------- text to values

_WORDS = {"yes": "true", "on": "true", "no": "false", "off": "false"}


def parse(name: str, text: str | list[str] | None) -> Any:
    """The field's value from text. Raises _Invalid with the reason."""
    if isinstance(text, list):
        if not is_list(name):
            raise _Invalid(f"expected {describe(name)}, got a list")
        if "" in text:
            raise _Invalid("an item is empty")
        return _convert(name, text)
    if text is None or (text.lower() in ("none", "null") and _optional(name)):
        return _convert(name, None)
    if is_list(name):
        return _convert(name, [text])
    if is_bool(name):
        text = _WORDS.get(text.lower(), text)
    return _convert(name, text)


def _convert(name: str, value: object) -> Any:
    try:
        result = msgspec.convert(value, KINDS[name].type, strict=not isinstance(value, str))
    except msgspec.ValidationError as error:
        shown = "(not shown)" if name in SECRETS else value
        raise _Invalid(_reason(name, shown, str(error))) from None
    if name in SECRETS and result is not None:
        return hashed(result) if isinstance(result, str) else tuple(map(hashed, result))
    if isinstance(result, float) and not math.isfinite(result):
        raise _Invalid(f"must be finite, got {value}")
    return result


def _reason(name: str, value: object, complaint: str) -> str:
    shown = "null" if value is None else f"'{value}'" if isinstance(value, str) else value
    if bound := re.search(r"` ([<>]=?) ([-\d.]+)", complaint):
        sign, limit = bound.groups()
        return f"must be {sign} {float(limit):g}, got {value}"
    if "of length >= 1" in complaint:
        return "must not be empty"
    return f"expected {describe(name)}, got {shown}"


def _optional(name: str) -> bool:
    return type(None) in get_args(KINDS[name].type)
