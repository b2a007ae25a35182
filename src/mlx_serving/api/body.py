"""A request's JSON body → a checked struct; every refusal names the field at fault."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import msgspec

from mlx_serving.errors import InvalidRequest, UnsupportedParameter
from mlx_serving.unknown import left_out

T = TypeVar("T")

_decode = msgspec.json.Decoder().decode
_decode_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_PLACE = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$(?P<where>.*)`)?", re.DOTALL)
_NAMED = re.compile(r"Object (?:missing required|contains unknown) field `(?P<name>.*)`", re.DOTALL)


def read_object(data: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises InvalidRequest, naming the field that cannot be decoded."""
    try:
        body = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(
            f"The body is not valid JSON: {error}.", param=_culprit(data), code="invalid_json"
        ) from None
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    return body


def _culprit(data: bytes) -> str | None:
    """The top-level field whose value cannot be decoded (1e999, say), where that is the fault."""
    try:
        members = _decode_raw(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    for name, value in members.items():
        try:
            _decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return name[:64]
    return None


def convert(value: Any, kind: type[T], *, at: str = "") -> T:
    """Check types and bounds; `at` is the path of `value`, which the error's param starts with."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        match = _PLACE.fullmatch(str(error))
        assert match is not None, "the pattern matches any message"
        what, where = match["what"], (match["where"] or "").replace("[...]", "")
        if named := _NAMED.fullmatch(what):
            where += "." + named["name"]
        param = (at + where).removeprefix(".")
        raise InvalidRequest(f"'{param}': {what}.", param=param or None) from None


MAX_MESSAGES = 8192
"""Of a conversation: each costs the server's process some microseconds before anything is known of it."""
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024


def stop_strings(strings: list[str], at: str) -> tuple[str, ...]:
    """Bounded stop strings; `at` is the list's path."""
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            f"'{at}' has {len(strings)} strings; at most {MAX_STOP_STRINGS}.", param=at
        )
    for i, string in enumerate(strings):
        if not 1 <= len(string) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"A stop string must have 1 to {MAX_STOP_CHARS} characters.", param=f"{at}[{i}]"
            )
    return tuple(strings)


def seed_in_64_bits(seed: int | None, at: str = "seed") -> int | None:
    """Raises InvalidRequest for what neither a signed nor an unsigned integer of 64 bits could be."""
    if seed is None:
        return None
    if not -(2**63) <= seed < 2**64:
        raise InvalidRequest(f"'{at}' must fit in 64 bits.", param=at)
    return seed % 2**64


def string_of(item: dict[str, Any], key: str, at: str) -> str:
    """A text in an object; `at` is the object's path."""
    value = item.get(key)
    if not isinstance(value, str):
        raise InvalidRequest(f"'{at}.{key}' must be a string.", param=f"{at}.{key}")
    return value


def refuse(at: str, why: str) -> UnsupportedParameter:
    """What is asked for is known and not supported."""
    return UnsupportedParameter(f"'{at}' is not supported: {why}.", param=at)


@contextmanager
def renamed(ours: Callable[[str], str]) -> Iterator[None]:
    """Errors raised inside, and unknown fields noted there, are named as `ours` says."""
    noted = left_out.get()
    noted = [] if noted is None else noted
    before = len(noted)
    try:
        yield
    except InvalidRequest as error:
        if (param := error.param) is not None:
            error.param = ours(param)
            error.message = error.message.replace(f"'{param}", f"'{error.param}")
        raise
    noted[before:] = map(ours, noted[before:])


def spelled(*renames: tuple[str, str]) -> AbstractContextManager[None]:
    """`renamed` by this dialect's words: each (theirs, ours)."""

    def ours(name: str) -> str:
        for theirs, our in renames:
            name = name.replace(theirs, our, 1)
        return name

    return renamed(ours)
