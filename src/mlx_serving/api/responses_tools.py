"""The tools of /v1/responses → what a chat template is shown.

A function in a namespace is shown as `NAMESPACE__NAME`, which every family's format can write, and
told apart again when it is called. A web search is offered to nobody: an answer that never calls it
is one that OpenAI's servers might have given too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from mlx_serving.api import responses_fields as fields
from mlx_serving.api.body import convert, refuse, renamed
from mlx_serving.api.disposition import check
from mlx_serving.content.tools.definitions import MAX_TOOLS, ToolUse, tool_use
from mlx_serving.errors import InvalidRequest
from mlx_serving.unknown import left_out

_SEARCHES = ("web_search", "web_search_2025_08_26")
_PLACE = re.compile(r"\Atools\[(\d+)\](?:\.function)?")


class Offered(msgspec.Struct, frozen=True):
    use: ToolUse
    namespaces: Mapping[str, tuple[str, str]]
    """The namespace and name of a tool, by the name that the model is shown."""
    advisory: tuple[str, ...]


class _Namespace(msgspec.Struct, kw_only=True):
    name: str
    description: str | None = None
    tools: list[dict[str, Any]]


class _Function(msgspec.Struct, frozen=True):
    at: str
    given: dict[str, Any]
    namespace: str | None = None
    about: str | None = None
    """What its namespace's description says, for the first of a namespace."""

    @property
    def shown(self) -> str:
        name = self.given.get("name")
        return full_name(self.namespace, name) if isinstance(name, str) else ""

    def tool(self) -> dict[str, Any]:
        """As chat completions have it."""
        names = ("name", "description", "parameters", "strict")
        function = {k: self.given[k] for k in names if self.given.get(k) is not None}
        if self.namespace is not None and "name" in function:
            function["name"] = self.shown or function["name"]
        if self.about:
            told = function.get("description")
            function["description"] = f"{self.about}\n\n{told}" if told else self.about
        return {"type": "function", "function": function}


def full_name(namespace: str | None, name: str) -> str:
    return name if namespace is None else f"{namespace}__{name}"


def offered(
    tools: Sequence[dict[str, Any]], choice: str | dict[str, Any] | None, parallel: bool | None
) -> Offered:
    """Raises InvalidRequest or UnsupportedParameter, naming the field."""
    advisory: list[str] = []
    functions = [
        function
        for i, tool in enumerate(tools)
        for function in _functions(tool, f"tools[{i}]", advisory)
    ]
    namespaces = {
        f.shown: (f.namespace, f.given["name"]) for f in functions if f.namespace and f.shown
    }
    places = [function.at for function in functions]

    def ours(name: str) -> str:
        """chat completions' path of a tool or a choice, as it is here."""
        name = name.replace("tool_choice.function", "tool_choice", 1)
        return _PLACE.sub(lambda found: places[int(found[1])], name)

    with renamed(ours):
        chosen = _choice(choice, [f.shown for f in functions], namespaces)
        use = tool_use([f.tool() for f in functions], chosen, parallel)
    return Offered(use, namespaces, tuple(advisory))


def _functions(tool: dict[str, Any], at: str, advisory: list[str]) -> Iterator[_Function]:
    kind = tool.get("type")
    if kind == "function":
        check(fields.TOOL, tool, at=at + ".")
        yield _Function(at, tool)
    elif kind == "namespace":
        yield from _inside(tool, at)
    elif kind in _SEARCHES:
        check(fields.WEB_SEARCH, tool, at=at + ".")
        advisory.append(at)
    elif (noted := left_out.get()) is not None:
        noted.append(at)
    else:
        raise refuse(f"{at}.type", "the server runs no tools of its own, only the client's are")


def _inside(raw: dict[str, Any], at: str) -> Iterator[_Function]:
    check(fields.NAMESPACE, raw, at=at + ".")
    namespace = convert(raw, _Namespace, at=at)
    if len(namespace.tools) > MAX_TOOLS:
        raise InvalidRequest(f"'{at}.tools' has over {MAX_TOOLS} tools.", param=f"{at}.tools")
    about = namespace.description
    for i, tool in enumerate(namespace.tools):
        where = f"{at}.tools[{i}]"
        if tool.get("type") != "function":
            raise refuse(f"{where}.type", "only functions are tools here")
        check(fields.TOOL, tool, at=where + ".")
        yield _Function(where, tool, namespace.name, about if i == 0 else None)


def _choice(
    choice: str | dict[str, Any] | None,
    shown: Sequence[str],
    namespaces: Mapping[str, tuple[str, str]],
) -> str | dict[str, Any] | None:
    """As chat completions have it; a name that one namespace has, and nobody else, may stand alone."""
    if not isinstance(choice, dict) or choice.get("type") != "function":
        return choice
    inner = {k: v for k, v in choice.items() if k != "type"}
    found = [full for full, (_, name) in namespaces.items() if name == inner.get("name")]
    if len(found) == 1 and inner.get("name") not in shown:
        inner["name"] = found[0]
    return {"type": "function", "function": inner}
