"""`TokenEvent`s → Ollama's JSON: one object, or a line of it for each piece."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from mlx_serving import clock
from mlx_serving.api.drive import Collected, ToolCall
from mlx_serving.api.openai_response import token_logprob
from mlx_serving.api.port import Generation
from mlx_serving.errors import MLXServingError
from mlx_serving.types import ModelInfo, ServedModel, TextLogprob, TokenEvent

Route = Literal["chat", "generate"]

NEVER = "9999-12-31T23:59:59Z"

_json = msgspec.json.Encoder().encode


def error_json(error: MLXServingError, _: str = "") -> bytes:
    """`{"error": message}`; `param` and `code` are ours."""
    return _json({"error": error.message, "param": error.param, "code": error.code})


def timestamp(wall_s: float) -> str:
    return datetime.fromtimestamp(wall_s, UTC).isoformat().replace("+00:00", "Z")


class Reply:
    """Writes one request's answer, whole or in lines, and measures how long its parts took."""

    def __init__(self, route: Route, model: str, started_s: float) -> None:
        self._route = route
        self._model = model
        self._started_s = started_s

    def whole(self, generation: Generation, whole: Collected) -> bytes:
        piece = self.piece(whole.text, whole.reasoning, whole.calls, whole.logprobs or ())
        return _json(piece | self.end(generation, whole))

    def loaded(self, leaves: bool = False) -> bytes:
        """The answer to a request that only wanted the model to be there, or gone."""
        return _json(self.piece("") | {"done": True, "done_reason": "unload" if leaves else "load"})

    def writer(self, generation: Generation) -> LineWriter:
        return LineWriter(self, generation)

    def piece(
        self,
        text: str,
        thinking: str = "",
        calls: Sequence[ToolCall] = (),
        logprobs: Sequence[TextLogprob] = (),
        first_call: int = 0,
    ) -> dict[str, Any]:
        """What there is of the answer, as an object that is not the last."""
        piece: dict[str, Any] = {"model": self._model, "created_at": timestamp(clock.wall())}
        said: dict[str, Any] = {"role": "assistant", "content": text}
        if self._route == "generate":
            said = {"response": text}
        if thinking:
            said["thinking"] = thinking
        if calls:
            said["tool_calls"] = [_call(c, first_call + i) for i, c in enumerate(calls)]
        piece |= {"message": said} if self._route == "chat" else said
        if logprobs:
            piece["logprobs"] = [token_logprob(lp) for lp in logprobs]
        return piece | {"done": False}

    def end(self, generation: Generation, whole: Collected) -> dict[str, Any]:
        """Durations are in nanoseconds. Waiting for the model and tokenising is `load`; what the
        request waited for its first token is `prompt_eval`."""
        now_s = clock.monotonic()
        first_s = now_s if whole.first_s is None else whole.first_s
        usage = generation.usage()
        return {
            "done": True,
            "done_reason": "length" if whole.finish_reason == "length" else "stop",
            "total_duration": _ns(self._started_s, now_s),
            "load_duration": _ns(self._started_s, whole.opened_s),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _ns(whole.opened_s, first_s),
            "eval_count": usage.completion_tokens,
            "eval_duration": _ns(first_s, now_s),
        }


class LineWriter:
    """Writes a stream's lines. Ollama's clients know whole tool calls only, so a call is kept until
    the next one begins or the answer ends."""

    def __init__(self, reply: Reply, generation: Generation) -> None:
        self._reply = reply
        self._generation = generation
        self._so_far = Collected()
        self._told = 0

    def write(self, event: TokenEvent) -> bytes:
        so_far = self._so_far
        so_far.add(event)
        done = len(so_far.calls) - (0 if event.finish_reason else 1)
        calls = so_far.calls[self._told : max(done, self._told)]
        piece, told = self._reply.piece, self._told
        self._told += len(calls)
        # A line of its own for each: clients look for thinking or content or calls, not for all.
        lines = []
        if event.reasoning:
            lines.append(piece("", event.reasoning))
        if event.text or event.logprobs:
            lines.append(piece(event.text, "", (), event.logprobs or ()))
        if calls:
            lines.append(piece("", "", calls, (), told))
        return b"".join(_json(line) + b"\n" for line in lines)

    def end(self) -> bytes:
        return (
            _json(self._reply.piece("") | self._reply.end(self._generation, self._so_far)) + b"\n"
        )

    def fail(self, error: MLXServingError) -> bytes:
        return error_json(error) + b"\n"


def _ns(start_s: float, end_s: float) -> int:
    return max(0, round((end_s - start_s) * 1e9))


def _call(call: ToolCall, index: int) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.arguments or "{}")
    except msgspec.DecodeError:  # cut short
        arguments = {}
    function = {"index": index, "name": call.name, "arguments": arguments}
    return {"id": call.id, "function": function}


# ------------------------------------------------------------------- models


def tagged(name: str) -> str:
    """Ollama's names have a tag."""
    return name if ":" in name else name + ":latest"


def entry(served: ServedModel, info: ModelInfo | None) -> dict[str, Any]:
    """A model as /api/tags lists it."""
    name = tagged(served.id)
    return {
        "name": name,
        "model": name,
        "modified_at": timestamp(served.created),
        "size": info.weight_bytes if info else 0,
        # Of its name: a model's files have no one digest here.
        "digest": hashlib.sha256(served.id.encode()).hexdigest(),
        "details": details(info),
    }


def running(served: ServedModel, info: ModelInfo) -> dict[str, Any]:
    """A loaded model as /api/ps lists it."""
    more = {
        "expires_at": NEVER
        if served.expires_in_s is None
        else timestamp(clock.wall() + served.expires_in_s),
        "size_vram": info.weight_bytes,
        "context_length": info.context_length,
    }
    return entry(served, info) | more


def details(info: ModelInfo | None) -> dict[str, Any]:
    family = info.architecture if info else ""
    return {
        "parent_model": "",
        "format": "mlx",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": parameter_size(info.parameters) if info else "",
        "quantization_level": (info.quantization or info.dtype) if info else "",
    }


def parameter_size(count: int) -> str:
    """As Ollama writes it: `134.52M`, `7.6B`, `8B`; nothing where it is not known."""
    for limit, unit, digits in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if count >= limit:
            return f"{count / limit:.{digits if count % limit else 0}f}{unit}"
    return str(count or "")


def _capabilities(info: ModelInfo | None, abilities: Sequence[str]) -> list[str]:
    if info is not None and info.kind != "decoder":
        return ["embedding"] if info.kind == "embedder" else []
    return ["completion", *abilities]


def shown(served: ServedModel, info: ModelInfo | None, abilities: Sequence[str]) -> dict[str, Any]:
    """A model as /api/show describes it."""
    facts: dict[str, Any] = {"general.architecture": info.architecture if info else ""}
    if info is not None:
        facts["general.basename"] = served.id
        if info.parameters:
            facts["general.parameter_count"] = info.parameters
        facts[f"{info.architecture}.context_length"] = info.context_length
        facts[f"{info.architecture}.vocab_size"] = info.vocab_size
    return {
        "license": "",
        "modelfile": f"FROM {served.id}\n",
        "parameters": "",
        "template": "",
        "details": details(info),
        "model_info": facts,
        "capabilities": _capabilities(info, abilities),
        "modified_at": timestamp(served.created),
    }
