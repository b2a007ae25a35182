"""The message that a parser writes: content, reasoning and tool calls, taken piece by piece."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import msgspec

from mlx_serving.types import ToolCallDelta


class Parsed(msgspec.Struct, gc=False):
    """What new text was found to be. Pieces of one call are joined."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = []


def new_call_id() -> str:
    return "call_" + secrets.token_hex(12)


class Draft:
    """White space next to markup belongs to the markup: none begins what follows a call or
    reasoning, and none ends what precedes it.

    Attributes:
        calls: how many calls have begun.
        open: whether the last of them still takes arguments.
        done: one call was allowed and is complete.
        malformed: how often something began like a call and was none, or ended like none.
    """

    def __init__(self, *, single: bool = False, new_id: Callable[[], str] = new_call_id) -> None:
        self.calls = 0
        self.open = False
        self.done = False
        self.malformed = 0
        self._single = single
        self._new_id = new_id
        self._ids: set[str] = set()
        self._content = _Text()
        self._reasoning = _Text()
        self._pieces: list[ToolCallDelta] = []

    def say(self, text: str) -> None:
        self._content.add(text)

    def think(self, text: str) -> None:
        self._reasoning.add(text)

    def set_apart(self) -> None:
        """Markup stands here: content and reasoning begin anew after it."""
        self._content.set_apart()
        self._reasoning.set_apart()

    def begin(self, name: str, call_id: str | None = None) -> None:
        assert not self.open, "calls do not nest"
        self.set_apart()
        if call_id is None or call_id in self._ids:
            call_id = self._new_id()
        self._ids.add(call_id)
        self._pieces.append(ToolCallDelta(index=self.calls, id=call_id, name=name))
        self.calls += 1
        self.open = True

    def arguments(self, text: str) -> None:
        if not text:
            return
        assert self.open, "arguments belong to a call"
        if not self._pieces:
            self._pieces.append(ToolCallDelta(index=self.calls - 1))
        self._pieces[-1].arguments += text

    def end(self) -> None:
        self.open = False
        self.done = self._single

    def take(self, *, last: bool = False) -> Parsed:
        """What was written since the last time; `last` gives out trailing white space, too."""
        pieces, self._pieces = self._pieces, []
        return Parsed(self._content.take(last), self._reasoning.take(last), pieces)


class _Text:
    """Text whose white space at the end is held back until something follows it."""

    __slots__ = ("_bare", "_held", "_parts")

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._held = ""
        self._bare = False
        """White space that comes next is dropped."""

    def add(self, text: str) -> None:
        if self._bare:
            text = text.lstrip()
            if not text:
                return
            self._bare = False
        solid = text.rstrip()
        if solid:
            self._parts += (self._held, solid)
            self._held = ""
        self._held += text[len(solid) :]

    def set_apart(self) -> None:
        self._held = ""
        self._bare = True

    def take(self, last: bool) -> str:
        if last:
            self._parts.append(self._held)
            self._held = ""
        text = "".join(self._parts)
        self._parts.clear()
        return text
