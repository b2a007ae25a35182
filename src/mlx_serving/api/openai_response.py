"""`TokenEvent`s → OpenAI's JSON: whole answers, and the chunks of a stream.

A chunk differs from its neighbours in the delta's text only, so its head and tail are made once a
choice and each event costs one string to escape.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import msgspec

from mlx_serving import __version__
from mlx_serving.api.drive import Collected, ToolCall
from mlx_serving.api.exchange import openai_error
from mlx_serving.api.sse import DONE
from mlx_serving.errors import MLXServingError
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
    return data if text.isascii() else one_line(data)


def one_line(data: bytes) -> bytes:
    """JSON without what such clients take for an end of line."""
    data = data.replace(b"\xe2\x80\xa8", rb"\u2028").replace(b"\xe2\x80\xa9", rb"\u2029")
    return data.replace(b"\xc2\x85", rb"\u0085")


class Logprobs:
    """Writes one choice's log-probabilities in its route's shape, keeping the text's offset."""

    def __init__(self, route: Route, offset: int = 0) -> None:
        self._chat = route == "chat"
        self._offset = offset
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, logprobs: Sequence[TextLogprob]) -> dict[str, Any]:
        if self._chat:
            return {"content": [token_logprob(lp) for lp in logprobs], "refusal": None}
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


def token_logprob(lp: TextLogprob) -> dict[str, Any]:
    """As chat completions have it, and every other dialect but /v1/completions."""
    return _alternative(lp.token, lp.raw, lp.logprob) | {
        "top_logprobs": [_alternative(*top) for top in lp.top]
    }


def _alternative(token: str, raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB


def answer(
    route: Route,
    *,
    call_id: str,
    created: int,
    model: str,
    echoes: Sequence[str],
    choices: Sequence[Collected],
    usages: Iterable[Usage],
) -> bytes:
    """A whole answer. `echoes` has a text for each choice to begin with, mostly empty."""
    return _json(
        {
            "id": call_id,
            "object": _OBJECT[route],
            "created": created,
            "model": model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
            "choices": [
                _choice(route, index, echo, whole)
                for index, (echo, whole) in enumerate(zip(echoes, choices, strict=True))
            ],
            "usage": usage_fields(usages),
        }
    )


def _choice(route: Route, index: int, echo: str, whole: Collected) -> dict[str, Any]:
    said = {"message": _message(whole)} if route == "chat" else {"text": echo + whole.text}
    logprobs = None
    if whole.logprobs is not None:
        logprobs = Logprobs(route, len(echo)).write(whole.logprobs)
    end = {"logprobs": logprobs, "finish_reason": whole.finish_reason}
    stop = {} if whole.stop_reason is None else {"stop_reason": whole.stop_reason}
    return {"index": index, **said, **end, **stop}


def _message(whole: Collected) -> dict[str, Any]:
    text, reasoning = whole.text, whole.reasoning
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if whole.calls:
        message |= {"content": text or None, "tool_calls": [_call(call) for call in whole.calls]}
    return message | ({"reasoning_content": reasoning} if reasoning else {})


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


class Chunks:
    """Writes the events of a stream, each as one `data:` event's bytes. Choices are numbered through
    over all prompts. `usages`: of each prompt, where the client asked for them."""

    def __init__(
        self,
        route: Route,
        *,
        call_id: str,
        created: int,
        model: str,
        echoes: Sequence[str],
        usages: Callable[[], Iterable[Usage]] | None = None,
    ) -> None:
        self._usages = usages
        envelope = {
            "id": call_id,
            "object": _CHUNK[route],
            "created": created,
            "model": model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        self._head = b"data: " + _json(envelope)[:-1] + b',"choices":['
        # Asked for usage, OpenAI puts a null into every chunk but the last.
        self._tail = b'],"usage":null}\n\n' if usages else b"]}\n\n"
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

    def write(self, event: TokenEvent) -> bytes:
        """One event, preceded by the choice's opening and followed by its end where they are due;
        nothing for an event that carries nothing yet."""
        index = event.choice
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

    def end(self) -> bytes:
        if self._usages is None:
            return DONE
        usage = _json(usage_fields(self._usages()))
        return self._head + b'],"usage":' + usage + b"}\n\n" + DONE

    def fail(self, error: MLXServingError) -> bytes:
        """Without [DONE]: clients raise."""
        return b"data: " + openai_error(error, "") + b"\n\n"

    def _beside(self, index: int, event: TokenEvent, content: bytes) -> bytes:
        """What an event carries besides content: reasoning before it, calls after it."""
        parts = [content]
        if event.reasoning:
            parts.insert(0, b'{"reasoning_content":' + escape(event.reasoning) + b"}")
        if event.tool_calls:
            calls = _json([_call_delta(delta) for delta in event.tool_calls])
            parts.append(b'{"tool_calls":' + one_line(calls) + b"}")
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
                one_line(written),
                b',"finish_reason":null}',
                self._tail,
            )
        )

    def _finish(self, index: int, event: TokenEvent) -> bytes:
        reason = _json(event.finish_reason)
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
