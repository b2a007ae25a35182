"""`TokenEvent`s → OpenAI's Responses: whole ones, and numbered events.

An answer is items one after another: reasoning, a message, function calls. An item is opened by its
first piece and closed by the next item's, or by the end.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from mlx_serving import clock
from mlx_serving.api.drive import Collected
from mlx_serving.api.openai_response import one_line, token_logprob
from mlx_serving.api.port import Generation
from mlx_serving.api.responses_request import ResponsesCall
from mlx_serving.errors import MLXServingError
from mlx_serving.types import Message, TokenEvent, ToolCallDelta

_json = msgspec.json.Encoder().encode

Kind = Literal["reasoning", "message", "function_call"]
Keep = Callable[[str, bytes, Message], None]
"""Stores a response that is complete: its id, its JSON, and the answer as a message."""


class _Item:
    """One item of the output, growing."""

    def __init__(
        self,
        kind: Kind,
        call: ToolCallDelta | None = None,
        place: tuple[str, str] | None = None,
    ) -> None:
        """`place`: the namespace and name of the tool that is called, if it is in one."""
        prefix = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_"}[kind]
        self.kind = kind
        self.id = prefix + secrets.token_hex(24)
        self.call = call
        self.place = place
        self.texts: list[str] = []
        self.logprobs: list[dict[str, Any]] = []

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self, text: str) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": self.logprobs if text else [],
        }

    def body(self, status: str) -> dict[str, Any]:
        """The item as it stands; without its content while it is in progress."""
        content = [] if status == "in_progress" else [self.part(self.text)]
        head = {"id": self.id, "type": self.kind, "status": status}
        if self.kind == "reasoning":
            return head | {"summary": [], "content": content}
        if self.kind == "message":
            return head | {"role": "assistant", "content": content}
        assert self.call is not None, "a call's item begins with its call"
        arguments = "" if status == "in_progress" else self.text
        called: dict[str, Any] = {"call_id": self.call.id, "name": self.call.name}
        if self.place is not None:
            called |= {"namespace": self.place[0], "name": self.place[1]}
        return head | called | {"arguments": arguments}


class ResponseWriter:
    """Writes a stream's events; what they add up to is the whole response."""

    def __init__(self, generation: Generation, call: ResponsesCall, keep: Keep) -> None:
        self._generation = generation
        self._call = call
        self._keep = keep
        self._created_s = int(clock.wall())
        self._number = 0
        self._items: list[_Item] = []
        self._closed = True
        self._status = "completed"
        self._reasoning_tokens = 0

    def write(self, event: TokenEvent) -> bytes:
        parts = [] if self._number else self._begin()
        if event.reasoning:
            self._reasoning_tokens += event.reasoning_tokens
            parts += self._open("reasoning")
            parts.append(self._delta("response.reasoning_text.delta", event.reasoning))
        if event.text:
            parts += self._open("message")
            logprobs = [token_logprob(lp) for lp in event.logprobs or ()]
            self._items[-1].logprobs += logprobs
            parts.append(self._delta("response.output_text.delta", event.text, logprobs=logprobs))
        for call in event.tool_calls or ():
            if call.id is not None:
                parts += self._open("function_call", call)
            if call.arguments:
                name = "response.function_call_arguments.delta"
                parts.append(self._delta(name, call.arguments))
        if event.finish_reason == "length":
            self._status = "incomplete"
        return b"".join(parts)

    def end(self) -> bytes:
        parts = [] if self._number else self._begin()
        parts += self._close(self._status)
        parts.append(self._event(f"response.{self._status}", response=self.finish()))
        return b"".join(parts)

    def fail(self, error: MLXServingError) -> bytes:
        code = {429: "rate_limit_exceeded", 400: "invalid_prompt"}.get(error.status, "server_error")
        told = {"code": code, "message": error.message, "param": error.param, "type": error.type}
        return self._event("response.failed", response=self._body("failed") | {"error": told})

    def finish(self) -> dict[str, Any]:
        """The whole response, kept if it is to be."""
        whole = self._body(self._status)
        if self._call.store:
            self._keep(self._generation.request_id, _json(whole), self._message())
        return whole

    def _message(self) -> Message:
        def texts(kind: Kind) -> list[str]:
            return [item.text for item in self._items if item.kind == kind]

        calls = [item for item in self._items if item.kind == "function_call"]
        return Message(
            role="assistant",
            content="".join(texts("message")) if texts("message") or not calls else None,
            reasoning_content="".join(texts("reasoning")) or None,
            tool_calls=tuple(
                {
                    "id": item.call.id,
                    "type": "function",
                    "function": {"name": item.call.name, "arguments": item.text},
                }
                for item in calls
                if item.call is not None
            ),
        )

    def _begin(self) -> list[bytes]:
        body = self._body("in_progress")
        return [
            self._event("response.created", response=body),
            self._event("response.in_progress", response=body),
        ]

    def _open(self, kind: Kind, call: ToolCallDelta | None = None) -> list[bytes]:
        """Begin an item of `kind`, unless one is open; every call is an item of its own."""
        if not self._closed and call is None and self._items[-1].kind == kind:
            return []
        parts = self._close("completed")
        place = self._call.namespaces.get(call.name or "") if call is not None else None
        item = _Item(kind, call, place)
        self._items.append(item)
        self._closed = False
        at = {"output_index": len(self._items) - 1}
        added = self._event("response.output_item.added", **at, item=item.body("in_progress"))
        parts.append(added)
        if kind != "function_call":
            parts.append(
                self._event(
                    "response.content_part.added",
                    item_id=item.id,
                    **at,
                    content_index=0,
                    part=item.part(""),
                )
            )
        return parts

    def _close(self, status: str) -> list[bytes]:
        if self._closed:
            return []
        self._closed = True
        item = self._items[-1]
        at: dict[str, Any] = {"item_id": item.id, "output_index": len(self._items) - 1}
        if item.kind == "function_call":
            name = "response.function_call_arguments.done"
            parts = [self._event(name, **at, name=item.body(status)["name"], arguments=item.text)]
        else:
            at["content_index"] = 0
            more = {"logprobs": item.logprobs} if item.kind == "message" else {}
            kind = "output_text" if item.kind == "message" else "reasoning_text"
            parts = [
                self._event(f"response.{kind}.done", **at, text=item.text, **more),
                self._event("response.content_part.done", **at, part=item.part(item.text)),
            ]
        index = len(self._items) - 1
        done = self._event("response.output_item.done", output_index=index, item=item.body(status))
        return [*parts, done]

    def _delta(self, name: str, text: str, **more: Any) -> bytes:
        item = self._items[-1]
        item.texts.append(text)
        at: dict[str, Any] = {"item_id": item.id, "output_index": len(self._items) - 1}
        if item.kind != "function_call":
            at["content_index"] = 0
        return self._event(name, **at, delta=text, **more)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        data = _json({"type": name, "sequence_number": self._number} | fields)
        self._number += 1
        return b"event: %s\ndata: %s\n\n" % (name.encode(), one_line(data))

    def _body(self, status: str) -> dict[str, Any]:
        ended = status in ("completed", "incomplete")
        last = len(self._items) - 1
        items = [
            item.body(status if i == last and ended else "completed")
            for i, item in enumerate(self._items)
        ]
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._generation.request_id,
            "object": "response",
            "created_at": self._created_s,
            "completed_at": int(clock.wall()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": reason,
            "model": self._call.request.model,
            "output": items,
            **self._call.echo,
            "usage": self._usage() if ended else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage()
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens,
                "cache_write_tokens": usage.cache_write_tokens,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": usage.total_tokens,
        }


def whole(generation: Generation, call: ResponsesCall, keep: Keep, answer: Collected) -> bytes:
    """A response in one piece: what its stream would have ended with."""
    writer = ResponseWriter(generation, call, keep)
    for event in _replayed(answer):
        writer.write(event)
    return _json(writer.finish())


def _replayed(answer: Collected) -> Sequence[TokenEvent]:
    """A whole answer as events, one a part."""
    calls = [
        ToolCallDelta(index=i, id=call.id, name=call.name, arguments=call.arguments)
        for i, call in enumerate(answer.calls)
    ]
    return [
        TokenEvent(
            choice=0,
            text="",
            token_ids=[],
            reasoning=answer.reasoning,
            reasoning_tokens=answer.reasoning_tokens,
        ),
        TokenEvent(choice=0, text=answer.text, token_ids=[], logprobs=answer.logprobs),
        TokenEvent(
            choice=0,
            text="",
            token_ids=[],
            tool_calls=calls,
            finish_reason=answer.finish_reason,
        ),
    ]
