"""One prompt's request from its opening to its last byte, whatever the dialect."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mlx_serving import clock
from mlx_serving.api import wishes
from mlx_serving.api.exchange import Exchange, Headers, cut_short, internal_error
from mlx_serving.api.port import GatewayPort, Generation
from mlx_serving.api.sse import SSE, ClientWatch, EventStream, Framing
from mlx_serving.config import Config
from mlx_serving.errors import Cancelled, MLXServingError, ServerError
from mlx_serving.types import FinishReason, GenerateRequest, TextLogprob, TokenEvent

log = logging.getLogger(__name__)


class Writer(Protocol):
    """A dialect's stream. What `write` and `end` return is whole events; `fail` ends a stream that
    has begun."""

    def write(self, event: TokenEvent) -> bytes: ...

    def end(self) -> bytes: ...

    def fail(self, error: MLXServingError) -> bytes: ...


@dataclass(slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str = ""
    """JSON text."""


@dataclass(slots=True)
class Collected:
    """One choice's whole answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TextLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    reasoning_tokens: int = 0
    opened_s: float = field(default_factory=clock.monotonic)
    """When the request had been opened, on the monotonic clock."""
    first_s: float | None = None
    """When its first token was there."""


async def serve(
    exchange: Exchange,
    gateway: GatewayPort,
    config: Config,
    request: GenerateRequest,
    *,
    answer: Callable[[Generation, Collected], bytes],
    writer: Callable[[Generation], Writer] | None,
    framing: Framing = SSE,
    advisory: Sequence[str] = (),
    headers: Headers | None = None,
) -> None:
    """Open `request` and answer it: by `answer` in one piece, or streamed by `writer` if there is
    one. Errors before the first byte are raised."""
    async with ClientWatch(exchange, config.ping_interval_s) as watch:
        generation = await gateway.open(wishes.apply(exchange, request))
        exchange.call_id, exchange.generations = request.request_id, (generation,)
        try:
            head = said(generation, advisory) + (headers or [])
            if writer is None:
                body = answer(generation, await collect(generation))
                await exchange.respond(200, body, head)
            else:
                watch.stream = EventStream(exchange, head, framing)
                await _stream(exchange, watch, watch.stream, generation, writer(generation))
        finally:
            generation.cancel()


def said(generation: Generation, advisory: Sequence[str]) -> Headers:
    """The headers that name the seed in use, whether the work was shared, and the fields that cannot
    change the tokens."""
    seed = (b"x-mlx-serving-seed", b"%d" % generation.seed)
    return [seed, *wishes.reused([generation]), *wishes.variant([generation]), *advised(advisory)]


def advised(advisory: Sequence[str]) -> Headers:
    if not advisory:
        return []
    return [(b"x-mlx-serving-advisory", ", ".join(advisory).encode("ascii"))]


async def collect(generation: Generation) -> Collected:
    """Read a generation of one choice to its end."""
    whole = Collected()
    texts: list[str] = []
    thoughts: list[str] = []
    async for events in generation:
        for event in events:
            checked(event)
            if whole.first_s is None and event.token_ids:
                whole.first_s = clock.monotonic()
            texts.append(event.text)
            if event.reasoning:
                thoughts.append(event.reasoning)
                whole.reasoning_tokens += event.reasoning_tokens
            whole.logprobs += event.logprobs or ()
            add_calls(whole.calls, event)
            if event.finish_reason is not None:
                whole.finish_reason, whole.stop_reason = event.finish_reason, event.stop_reason
    whole.text, whole.reasoning = "".join(texts), "".join(thoughts)
    return whole


def checked(event: TokenEvent) -> TokenEvent:
    """No dialect knows a reason for what was cut short: that is an error."""
    if event.finish_reason == "cancelled":
        raise Cancelled("The request was cancelled.")
    if event.finish_reason == "error":
        raise ServerError("Generation failed.")
    return event


def add_calls(calls: list[ToolCall], event: TokenEvent) -> None:
    """Put an event's pieces of calls together."""
    for delta in event.tool_calls or ():
        if delta.index == len(calls):
            calls.append(ToolCall(id=delta.id or "", name=delta.name or ""))
        calls[delta.index].arguments += delta.arguments


async def _stream(
    exchange: Exchange,
    watch: ClientWatch,
    stream: EventStream,
    generation: Generation,
    writer: Writer,
) -> None:
    try:
        async for events in generation:
            data = b"".join([writer.write(checked(event)) for event in events])
            if data:
                await stream.write(data)
        await stream.write(writer.end(), last=True)
    except asyncio.CancelledError:
        # Not the client: the server cuts what its drain could not wait for.
        if stream.started and not watch.gone:
            await stream.write(writer.fail(cut_short()), last=True)
        raise
    except Exception as error:
        if not stream.started:
            raise
        if not isinstance(error, MLXServingError):
            log.exception("[%s] the stream failed", exchange.id)
            error = internal_error(exchange.id)
        await stream.write(writer.fail(error), last=True)
