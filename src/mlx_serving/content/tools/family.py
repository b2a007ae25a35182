"""What a family's file says of its call format, and what its reader works with."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_serving.content.draft import Draft
from mlx_serving.content.json_text import copy_scalar, copy_value, read_string
from mlx_serving.content.reading import Malformed, Reader, Steps, Stops

log = logging.getLogger(__name__)

MAX_NAME = 128
_NAME = re.compile(r"[\w.:/-]+")


class Tools:
    """The functions that a request offers, as far as a parser needs to know them."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        functions = [tool.get("function", tool) for tool in tools]
        self._parameters: dict[str, Mapping[str, Any]] = {
            str(f["name"]): f.get("parameters") or {} for f in functions if f.get("name")
        }

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def schemas(self) -> Mapping[str, Mapping[str, Any]]:
        """The functions' names and their parameters' schemas."""
        return self._parameters

    def types(self, function: str, parameter: str) -> frozenset[str]:
        """The JSON types that a parameter may have; empty when its schema does not say."""
        properties = self._parameters.get(function, {}).get("properties")
        schema = properties.get(parameter) if isinstance(properties, Mapping) else None
        return frozenset(_types(schema, 0))


def _types(schema: Any, depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or depth > 8:
        return set()
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return {t for t in declared if isinstance(t, str)}
    if isinstance(values := schema.get("enum"), list):
        return {"string" if isinstance(v, str) else "other" for v in values}
    if "const" in schema:
        return {"string" if isinstance(schema["const"], str) else "other"}
    parts = [
        schema[key] for key in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(key), list)
    ]
    return {t for part in parts for s in part for t in _types(s, depth + 1)}


class Complete(Exception):
    """The answer is over, whatever text may come."""


class Calls:
    """A reader's hands: the text, the draft, and the tools.

    Until `begin` the text is marked, so that a call which turns out to be none can be given back
    as text; from `end` on, what follows is.
    """

    def __init__(self, reader: Reader, draft: Draft, tools: Tools) -> None:
        self.reader = reader
        self.draft = draft
        self.tools = tools

    def begin(self, name: str, call_id: str | None = None) -> None:
        self.reader.unmark()
        self.draft.begin(name, call_id)

    def arguments(self, text: str) -> None:
        self.draft.arguments(text)

    def end(self) -> None:
        """Raises Complete when it was the only call allowed."""
        self.draft.end()
        if self.draft.done:
            raise Complete
        self.reader.mark()

    def whole(self, name: str, arguments: str) -> None:
        self.begin(name)
        self.arguments(arguments)
        self.end()

    def json_arguments(self, name: str, call_id: str | None = None) -> Steps[None]:
        """A call whose arguments are a JSON object, from its brace on; also accepted: the object as
        the text of a JSON string, and null."""
        if (yield from self.reader.peek()) == "{":
            self.begin(name, call_id)
            yield from copy_value(self.reader, self.arguments)
        else:
            text = yield from held_arguments(self.reader)
            self.begin(name, call_id)
            self.arguments(text)
        self.end()


Read = Callable[[Calls, str], Steps[None]]


@dataclass(frozen=True, slots=True)
class Forced:
    """A family's format spelt out, so that a grammar can force it. `{name}` is the function's name;
    its arguments stand between `before` and `after`: one JSON object, or an `element` each."""

    before: str
    after: str
    open: str = ""
    between: str = ""
    close: str = ""
    element: tuple[str, str] | None = None
    """What stands around one argument's value; `{key}` is its name, `{string}` says true for text."""


@dataclass(frozen=True, slots=True)
class Family:
    """How a family of models writes tool calls.

    Attributes:
        opens: markup that begins calls, wherever it stands in the answer.
        read: reads calls after one of `opens`. Raises Malformed.
        ends: where a call whose arguments went wrong is over.
        inner: more of the markup that may be special tokens.
        bare: reads calls without markup at the beginning of the answer. Raises Malformed.
        forced: the format as a grammar forces it, from the chat template's text; None: it cannot be.
    """

    name: str
    opens: tuple[str, ...]
    read: Read
    ends: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    bare: Callable[[Calls], Steps[None]] | None = None
    forced: Callable[[str], Forced | None] = lambda _: None

    @property
    def markup(self) -> frozenset[str]:
        return frozenset((*self.opens, *self.ends, *self.inner))


def attempt(calls: Calls, steps: Steps[None], ends: Stops, *, opener: str = "") -> Steps[bool]:
    """Read calls after `opener`; what is malformed is text again, or, once a call's arguments have
    begun, theirs. Returns whether there was a call."""
    reader, draft = calls.reader, calls.draft
    before = draft.calls
    reader.mark(len(opener))
    try:
        yield from steps
    except Malformed as error:
        draft.malformed += 1
        # The error has words of the model's: not for a log that nobody asked to have them.
        log.debug("A tool call is malformed: %s.", error)
        if draft.open:
            log.warning(
                "The arguments of a tool call are malformed; at level debug the log says how."
            )
            yield from reader.until(ends, draft.arguments)
            draft.end()
            if draft.done:
                raise Complete from None
        else:
            log.warning("What looked like a tool call is text; at level debug the log says why.")
            draft.say(reader.raw())
    reader.unmark()
    return draft.calls > before


def check_name(name: str) -> str:
    """A function's name as a model wrote it. Raises Malformed."""
    name = name.strip()
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise Malformed(
            "a function's name is missing" if not name else "that is no function's name"
        )
    return name


def held_arguments(reader: Reader) -> Steps[str]:
    """Arguments that were written as the text of a JSON string, or as null; as JSON."""
    if (yield from reader.peek()) != '"':
        parts: list[str] = []
        yield from copy_scalar(reader, parts.append)
        if parts != ["null"]:
            raise Malformed("arguments are not an object")
        return "{}"
    text = yield from read_string(reader)
    try:
        value = json.loads(text or "{}")
        text.encode()
    except (ValueError, RecursionError):
        raise Malformed("arguments are not JSON") from None
    if not isinstance(value, dict):
        raise Malformed("arguments are not an object")
    return text or "{}"
