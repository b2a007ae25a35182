"""Responses that clients may go on from, kept in memory within bounds; the least lately used goes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from mlx_serving.types import Message

MAX_RESPONSES = 1024
MAX_CHARS = 64 * 1024 * 1024
"""Of all stored conversations; one that shares its beginning with another counts in full."""


class Stored(msgspec.Struct, frozen=True):
    body: bytes
    """The response's JSON."""
    messages: tuple[Message, ...]
    """The conversation up to and with its answer, without instructions."""
    chars: int
    client: str | None
    """Whose it is: nobody else's key can read it."""


class ResponseStore:
    def __init__(self, max_responses: int = MAX_RESPONSES, max_chars: int = MAX_CHARS) -> None:
        self._max_responses = max_responses
        self._max_chars = max_chars
        self._chars = 0
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def get(self, response_id: str, client: str | None = None) -> Stored | None:
        stored = self._stored.get(response_id)
        if stored is None or stored.client != client:
            return None
        self._stored.move_to_end(response_id)
        return stored

    def put(
        self,
        response_id: str,
        body: bytes,
        messages: Sequence[Message],
        client: str | None = None,
    ) -> None:
        """Keep a response; one that is over the bounds by itself is not kept."""
        chars = len(body) + sum(map(_chars, messages))
        if chars > self._max_chars:
            return
        stored = Stored(body, tuple(messages), chars, client)
        self._stored[response_id] = stored
        self._chars += stored.chars
        while len(self._stored) > self._max_responses or self._chars > self._max_chars:
            _, gone = self._stored.popitem(last=False)
            self._chars -= gone.chars

    def delete(self, response_id: str, client: str | None = None) -> bool:
        if self.get(response_id, client) is None:
            return False
        self._chars -= self._stored.pop(response_id).chars
        return True


def _chars(message: Message) -> int:
    calls = sum(len(call["function"]["arguments"]) + 64 for call in message.tool_calls)
    return len(message.content or "") + len(message.reasoning_content or "") + calls + 64
