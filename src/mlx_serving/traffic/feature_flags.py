"""Feature flags: a share of the requests is answered by another entry, or with defaults of its own.

    fast=10% model=smollm2 use=smollm2-fast
    brief=50% max_tokens=256 timeout=30

Who is in the share of a flag is decided by the same hash as in a rollout, under the flag's name: a user
stays put, and a higher percentage only adds users.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from mlx_serving.errors import ConfigError
from mlx_serving.traffic.routing import takes_part
from mlx_serving.types import MAX_TIMEOUT_S, GenerateRequest

PARAM = "feature_flags"
_HEAD = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,64})=(?P<percent>\d{1,3}(?:\.\d{1,6})?)%")


@dataclass(frozen=True, slots=True)
class Flag:
    name: str
    share: float
    model: str | None = None
    """Requests for this one; None: for every one."""
    use: str | None = None
    """The served model that answers in its place."""
    max_tokens: int | None = None
    timeout_s: float | None = None
    """These two for requests that do not say."""


@dataclass(frozen=True, slots=True)
class Switched:
    """What the flags make of one request. Of two that say the same thing, the one named first does."""

    flags: tuple[str, ...] = ()
    """Those in whose share it is."""
    use: str | None = None
    max_tokens: int | None = None
    timeout_s: float | None = None

    def applied(self, request: GenerateRequest) -> GenerateRequest:
        """With what it left open and a flag says. Raises InvalidRequest as a request of such fields."""
        changes: dict[str, Any] = {}
        if request.max_tokens is None and self.max_tokens is not None:
            # A flag is no reason to refuse a request.
            changes["max_tokens"] = max(self.max_tokens, request.sampling.min_tokens)
        if request.timeout_s is None and self.timeout_s is not None:
            changes["timeout_s"] = self.timeout_s
        return msgspec.structs.replace(request, **changes) if changes else request


UNSWITCHED = Switched()


def switched(flags: Sequence[Flag], model: str, key: str) -> Switched:
    """`key` names whoever is to stay on one side: a user, a session, or the request."""
    on = [f for f in flags if f.model in (None, model) and takes_part(f.name, key, f.share)]
    if not on:
        return UNSWITCHED
    return Switched(
        flags=tuple(flag.name for flag in on),
        use=_first(flag.use for flag in on),
        max_tokens=_first(flag.max_tokens for flag in on),
        timeout_s=_first(flag.timeout_s for flag in on),
    )


def concerning(flags: Sequence[Flag], model: str) -> list[str]:
    """The names of the flags that are about requests for a model."""
    return [flag.name for flag in flags if flag.model in (None, model)]


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def parse_all(texts: Sequence[str], served: Callable[[str], str]) -> tuple[Flag, ...]:
    """Args: served: the served model that a name leads to; raises MLXServingError.

    Raises ConfigError for a flag that is none or given twice, and what `served` raises.
    """
    flags = tuple(_resolved(parse(text), served) for text in texts)
    names = [flag.name for flag in flags]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{PARAM}: '{name}' is given twice", param=PARAM)
    return flags


def parse(text: str) -> Flag:
    """`NAME=PERCENT% [model=NAME] [use=NAME] [max_tokens=COUNT] [timeout=SECONDS]`.

    Raises ConfigError.
    """
    head, *options = text.split() or [""]
    match = _HEAD.fullmatch(head)
    if match is None or not 0 <= float(match["percent"]) <= 100:
        raise ConfigError(
            f"{PARAM}: '{text}': expected NAME=PERCENT% first, as fast=10%", param=PARAM
        )
    found: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in _OPTIONS or not value or name in found:
            what = "given twice" if name in found else f"none of {', '.join(_OPTIONS)}"
            raise ConfigError(f"{PARAM}: '{text}': '{option}' is {what}", param=PARAM)
        try:
            found[name] = _OPTIONS[name](value)
        except ValueError as error:
            raise ConfigError(f"{PARAM}: '{text}': {name} is {error}", param=PARAM) from None
    if not found.keys() - {"model"}:
        raise ConfigError(
            f"{PARAM}: '{text}' switches nothing: say use=MODEL, max_tokens=COUNT or timeout=SECONDS",
            param=PARAM,
        )
    timeout_s = found.pop("timeout", None)
    return Flag(match["name"], float(match["percent"]) / 100, timeout_s=timeout_s, **found)


def with_percent(text: str, percent: float) -> str:
    """The same flag with another share."""
    head, *options = text.split()
    return " ".join([f"{head.partition('=')[0]}={percent:g}%", *options])


def _resolved(flag: Flag, served: Callable[[str], str]) -> Flag:
    model = None if flag.model is None else served(flag.model)
    use = None if flag.use is None else served(flag.use)
    return replace(flag, model=model, use=use)


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise ValueError("a whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text) or not 0 < float(text) <= MAX_TIMEOUT_S:
        raise ValueError(f"seconds, above 0 and at most {MAX_TIMEOUT_S}")
    return float(text)


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "model": str,
    "use": str,
    "max_tokens": _count,
    "timeout": _seconds,
}
