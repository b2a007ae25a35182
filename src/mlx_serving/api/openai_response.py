"""`TokenEvent`s → OpenAI's JSON: whole answers, and the chunks of a stream.

A chunk differs from its neighbours in the delta's text only, so its head and tail are made once a
choice and each event costs one string to escape.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from mlx_serving import __version__
from mlx_serving.errors import Cancelled, ServerError
from mlx_serving.types import TextLogprob, TokenEvent, ToolCallDelta, Usage

Route = Literal["chat", "completions"]

SYSTEM_FINGERPRINT = f"mlx-serving-{__version__}"
MIN_LOGPROB = -9999.0
"""JSON has no infinity; OpenAI writes this for a token that cannot be."""

_json = msgspec.json.Encoder().encode
_OBJECT = {"chat": "chat.completion", "completions": "text_completion"}
_CHUNK = {"chat": "chat.completion.chunk", "completions": "text_completion"}


def usage_fields(usages: Iterable[Usage]) -> dict[str, Any]:
    """OpenAI's `usage`, summed over a request's prompts."""
    parts = list(usages)
    prompt = sum(u.prompt_tokens for u in parts)
    completion = sum(u.completion_tokens for u in parts)
    fields: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in parts)},
    }
    if shared := sum(u.shared_tokens for u in parts):
        fields["completion_tokens_details"] = {"shared_tokens": shared}
    return fields


def escape(text: str) -> bytes:
    """A JSON string that also survives clients which split lines as Unicode does."""
    data = _json(text)
    return data if text.isascii() else _one_line(data)


def _one_line(data: bytes) -> bytes:
    data = data.replace(b"\xe2\x80\xa8", rb"\u2028").replace(b"\xe2\x80\xa9", rb"\u2029")
    return data.replace(b"\xc2\x85", rb"\u0085")


def finish_reason(event: TokenEvent) -> str | None:
    """OpenAI knows no reason for what was cut short: that is an error."""
    if event.finish_reason == "cancelled":
        raise Cancelled("The request was cancelled.")
    if event.finish_reason == "error":
        raise ServerError("Generation failed.")
    return event.finish_reason


class Logprobs:
    """Writes one choice's log-probabilities in its route's shape, keeping the text's offset."""

    def __init__(self, route: Route, offset: int = 0) -> None:
        self._chat = route == "chat"
        self._offset = offset
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, logprobs: Sequence[TextLogprob]) -> dict[str, Any]:
        if self._chat:
            return {"content": [_chat_logprob(lp) for lp in logprobs], "refusal": None}
        return {
            "tokens": [lp.token for lp in logprobs],
            "token_logprobs": [_finite(lp.logprob) for lp in logprobs],
            "top_logprobs": [
                {token: _finite(logprob) for token, _, logprob in lp.top}
                | {lp.token: _finite(lp.logprob)}
                for lp in logprobs
            ],
            "text_offset": [self._advance(lp.raw) for lp in logprobs],
        }

    def _advance(self, raw: bytes) -> int:
        at = self._offset
        self._offset += len(self._characters.decode(raw))
        return at


def _chat_logprob(lp: TextLogprob) -> dict[str, Any]:
    return _alternative(lp.token, lp.raw, lp.logprob) | {
        "top_logprobs": [_alternative(*top) for top in lp.top]
    }


def _alternative(token: str, raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB


class Answer:
    """Collects events of an answer that is not streamed."""

    def __init__(self, route: Route, echoes: Sequence[str]) -> None:
        """`echoes` has a text for each choice to begin with, mostly empty."""
        self._route = route
        self._texts = [[echo] for echo in echoes]
        self._thoughts: list[list[str]] = [[] for _ in echoes]
        self._calls: list[list[dict[str, Any]]] = [[] for _ in echoes]
        self._logprobs: list[list[TextLogprob] | None] = [None for _ in echoes]
        self._reasons: list[str | None] = [None for _ in echoes]
        self._stops: list[str | int | None] = [None for _ in echoes]
        self._offsets = [len(echo) for echo in echoes]

    def add(self, index: int, event: TokenEvent) -> None:
        self._texts[index].append(event.text)
        if event.reasoning:
            self._thoughts[index].append(event.reasoning)
        for delta in event.tool_calls or ():
            add_call(self._calls[index], delta)
        if event.logprobs is not None:
            self._logprobs[index] = (self._logprobs[index] or []) + event.logprobs
        if event.finish_reason is not None:
            self._reasons[index] = finish_reason(event)
            self._stops[index] = event.stop_reason

    def encode(self, call_id: str, created: int, model: str, usages: Iterable[Usage]) -> bytes:
        return _json(
            {
                "id": call_id,
                "object": _OBJECT[self._route],
                "created": created,
                "model": model,
                "system_fingerprint": SYSTEM_FINGERPRINT,
                "choices": [self._choice(index) for index in range(len(self._texts))],
                "usage": usage_fields(usages),
            }
        )

    def _message(self, index: int, text: str) -> dict[str, Any]:
        calls, thoughts = self._calls[index], self._thoughts[index]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        if thoughts:
            message["reasoning_content"] = "".join(thoughts)
        return message

    def _choice(self, index: int) -> dict[str, Any]:
        text = "".join(self._texts[index])
        logprobs = self._logprobs[index]
        choice: dict[str, Any] = {"index": index}
        if self._route == "chat":
            choice["message"] = self._message(index, text)
        else:
            choice["text"] = text
        choice["logprobs"] = (
            None
            if logprobs is None
            else Logprobs(self._route, self._offsets[index]).write(logprobs)
        )
        choice["finish_reason"] = self._reasons[index]
        if self._stops[index] is not None:
            choice["stop_reason"] = self._stops[index]
        return choice


def add_call(calls: list[dict[str, Any]], delta: ToolCallDelta) -> None:
    """Add a piece of a call to a message's `tool_calls`."""
    if delta.index == len(calls):
        function = {"name": delta.name, "arguments": ""}
        calls.append({"id": delta.id, "type": "function", "function": function})
    calls[delta.index]["function"]["arguments"] += delta.arguments


class Chunks:
    """Writes the events of a stream, each as one `data:` event's bytes."""

    def __init__(
        self,
        route: Route,
        *,
        call_id: str,
        created: int,
        model: str,
        echoes: Sequence[str],
        include_usage: bool,
    ) -> None:
        envelope = {
            "id": call_id,
            "object": _CHUNK[route],
            "created": created,
            "model": model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        self._head = b"data: " + _json(envelope)[:-1] + b',"choices":['
        # Asked for usage, OpenAI puts a null into every chunk but the last.
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        key, close, empty, first = _DELTA[route]
        self._heads = [self._head + b'{"index":%d,' % i for i in range(len(echoes))]
        self._text_heads = [head + key for head in self._heads]
        self._close = close
        self._text_tail = close + b',"logprobs":null,"finish_reason":null}' + self._tail
        self._empty = empty
        self._first: list[bytes | None] = [
            head + first + self._text_tail[len(close) :] if first else None for head in self._heads
        ]
        if route == "completions":
            self._first = [
                head + escape(echo) + self._text_tail if echo else None
                for head, echo in zip(self._text_heads, echoes, strict=True)
            ]
        self._logprobs = [Logprobs(route, len(echo)) for echo in echoes]

    def write(self, index: int, event: TokenEvent) -> bytes:
        """One event, preceded by the choice's opening and followed by its end where they are due;
        nothing for an event that carries nothing yet."""
        if event.logprobs is not None:
            data = self._with_logprobs(index, event.text, event.logprobs)
        elif event.text:
            data = self._text_heads[index] + escape(event.text) + self._text_tail
        else:
            data = b""
        if event.reasoning or event.tool_calls:
            data = self._beside(index, event, data)
        first = self._first[index]
        if first is not None:
            self._first[index] = None
            data = first + data
        if event.finish_reason is not None:
            data += self._finish(index, event)
        return data

    def usage(self, usages: Iterable[Usage]) -> bytes:
        return self._head + b'],"usage":' + _json(usage_fields(usages)) + b"}\n\n"

    def _beside(self, index: int, event: TokenEvent, content: bytes) -> bytes:
        """What an event carries besides content: reasoning before it, calls after it."""
        parts = [content]
        if event.reasoning:
            parts.insert(0, b'{"reasoning_content":' + escape(event.reasoning) + b"}")
        if event.tool_calls:
            calls = _json([_call_delta(delta) for delta in event.tool_calls])
            parts.append(b'{"tool_calls":' + _one_line(calls) + b"}")
        tail = b',"logprobs":null,"finish_reason":null}' + self._tail
        return b"".join(
            part if part is content else self._heads[index] + b'"delta":' + part + tail
            for part in parts
        )

    def _with_logprobs(self, index: int, text: str, logprobs: Sequence[TextLogprob]) -> bytes:
        written = _json(self._logprobs[index].write(logprobs))
        return b"".join(
            (
                self._text_heads[index],
                escape(text),
                self._close,
                b',"logprobs":',
                # Tokens may hold what a line splitter takes for an end of line, as text may.
                _one_line(written),
                b',"finish_reason":null}',
                self._tail,
            )
        )

    def _finish(self, index: int, event: TokenEvent) -> bytes:
        reason = _json(finish_reason(event))
        stop = b"" if event.stop_reason is None else b',"stop_reason":' + _json(event.stop_reason)
        end = b',"logprobs":null,"finish_reason":' + reason + stop + b"}"
        return self._heads[index] + self._empty + end + self._tail


def _call_delta(delta: ToolCallDelta) -> dict[str, Any]:
    """`id`, `type` and the function's name are said once, in a call's first piece."""
    if delta.id is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}


_DELTA = {
    # what opens and closes a delta's text, a delta without text, and a choice's opening delta
    "chat": (
        b'"delta":{"content":',
        b"}",
        b'"delta":{}',
        b'"delta":{"role":"assistant","content":""}',
    ),
    "completions": (b'"text":', b"", b'"text":""', b""),
}
