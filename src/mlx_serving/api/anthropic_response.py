"""`TokenEvent`s → Anthropic's messages: whole ones, and the events of a stream.

A stream is blocks one after another; a block is opened by its first piece and closed by the next
block's, or by the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from mlx_serving.api.drive import Collected
from mlx_serving.api.openai_response import escape
from mlx_serving.api.port import Generation
from mlx_serving.api.sse import EVENT_STREAM, Framing
from mlx_serving.errors import MLXServingError
from mlx_serving.types import FinishReason, ServedModel, TokenEvent, Usage

FRAMING = Framing(EVENT_STREAM, b'event: ping\ndata: {"type": "ping"}\n\n')
SIGNATURE = "mlx-serving"
"""Clients send thinking back only with a signature; there is nothing to prove with one."""

_json = msgspec.json.Encoder().encode
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

Kind = Literal["thinking", "text", "tool_use"]


def error_json(error: MLXServingError, request_id: str) -> bytes:
    """`{"type": "error", "error": {"type", "message", ...}, "request_id"}`; `param` and `code` are
    ours."""
    kind = _ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else error.type)
    body = {"type": kind, "message": error.message, "param": error.param, "code": error.code}
    return _json({"type": "error", "error": body, "request_id": request_id})


def message(generation: Generation, model: str, whole: Collected, *, show_thinking: bool) -> bytes:
    """A whole answer."""
    content: list[dict[str, Any]] = []
    if whole.reasoning:
        thinking = whole.reasoning if show_thinking else ""
        content.append({"type": "thinking", "thinking": thinking, "signature": SIGNATURE})
    if whole.text:
        content.append({"type": "text", "text": whole.text})
    for call in whole.calls:
        arguments = _arguments(call.arguments)
        content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
    envelope = _envelope(generation, model)
    usage = _usage(generation.usage())
    stop = _stop(whole.finish_reason, whole.stop_reason)
    return _json(envelope | {"content": content, "usage": usage} | stop)


class MessageWriter:
    """Writes a stream's events."""

    def __init__(self, generation: Generation, model: str, *, show_thinking: bool) -> None:
        self._generation = generation
        self._model = model
        self._show_thinking = show_thinking
        self._began = False
        self._open: Kind | None = None
        self._index = -1
        self._call = -1
        self._stop = _stop(None, None)

    def write(self, event: TokenEvent) -> bytes:
        parts: list[bytes] = []
        # What was cached is known with the first token.
        if not self._began:
            self._began = True
            parts.append(self._start())
        if event.reasoning:
            parts += self._block("thinking", {"thinking": "", "signature": ""})
            if self._show_thinking:
                parts.append(self._delta("thinking_delta", "thinking", event.reasoning))
        if event.text:
            parts += self._block("text", {"text": ""})
            parts.append(self._delta("text_delta", "text", event.text))
        for call in event.tool_calls or ():
            if call.index != self._call:
                self._call = call.index
                parts += self._close()
                parts += self._block("tool_use", {"id": call.id, "name": call.name, "input": {}})
            if call.arguments:
                parts.append(self._delta("input_json_delta", "partial_json", call.arguments))
        if event.finish_reason is not None:
            self._stop = _stop(event.finish_reason, event.stop_reason)
        return b"".join(parts)

    def end(self) -> bytes:
        usage = _usage(self._generation.usage())
        return b"".join(
            (
                b"" if self._began else self._start(),
                *self._close(),
                _event("message_delta", {"delta": self._stop, "usage": usage}),
                _event("message_stop", {}),
            )
        )

    def fail(self, error: MLXServingError) -> bytes:
        return b"event: error\ndata: " + error_json(error, self._generation.request_id) + b"\n\n"

    def _start(self) -> bytes:
        usage = _usage(self._generation.usage()) | {"output_tokens": 0}
        stop = _stop(None, None)
        envelope = _envelope(self._generation, self._model) | {"content": [], "usage": usage} | stop
        return _event("message_start", {"message": envelope})

    def _block(self, kind: Kind, empty: dict[str, Any]) -> list[bytes]:
        """Open a block of `kind`, unless one is open."""
        if self._open == kind:
            return []
        closed = self._close()
        self._open = kind
        self._index += 1
        block = {"type": kind} | empty
        start = _event("content_block_start", {"index": self._index, "content_block": block})
        return [*closed, start]

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        stop = _event("content_block_stop", {"index": self._index})
        signature = self._delta("signature_delta", "signature", SIGNATURE)
        parts = [signature, stop] if self._open == "thinking" else [stop]
        self._open = None
        return parts

    def _delta(self, kind: str, key: str, text: str) -> bytes:
        return (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
            b'"delta":{"type":"%s","%s":%s}}\n\n'
            % (self._index, kind.encode(), key.encode(), escape(text))
        )


def model_list(models: Sequence[ServedModel]) -> dict[str, Any]:
    """The served models as Anthropic's /v1/models lists them."""
    data = [
        {
            "type": "model",
            "id": served.id,
            "display_name": served.id,
            "created_at": datetime.fromtimestamp(served.created, UTC).isoformat(),
            "max_input_tokens": served.context_length,
        }
        for served in models
    ]
    return {
        "data": data,
        "has_more": False,
        "first_id": models[0].id if models else None,
        "last_id": models[-1].id if models else None,
    }


def _event(name: str, fields: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _json({"type": name} | fields))


def _envelope(generation: Generation, model: str) -> dict[str, Any]:
    return {
        "id": generation.request_id,
        "type": "message",
        "role": "assistant",
        "model": model,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic parts a prompt in three: read from a cache, left in one, neither."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens,
        "cache_creation_input_tokens": usage.cache_write_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _stop(reason: FinishReason | None, stop: str | int | None) -> dict[str, Any]:
    if isinstance(stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    names = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    return {"stop_reason": names[reason] if reason else None, "stop_sequence": None}


def _arguments(text: str) -> Any:
    """A call that was cut short has no whole arguments: none, then."""
    try:
        return msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:
        return {}
