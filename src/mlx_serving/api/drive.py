"""A request from its opening to its last byte, whatever the dialect."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Callable, Sequence
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

Events = AsyncIterable[Sequence[TokenEvent]]

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
    """What there is of one choice's answer."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TextLogprob] | None = None
    """None: they were not asked for."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    reasoning_tokens: int = 0
    opened_s: float = field(default_factory=clock.monotonic)
    """When the request had been opened, on the monotonic clock."""
    first_s: float | None = None
    """When its first token was there."""

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def reasoning(self) -> str:
        return "".join(self.thoughts)

    def add(self, event: TokenEvent) -> None:
        if self.first_s is None and event.token_ids:
            self.first_s = clock.monotonic()
        if event.text:
            self.texts.append(event.text)
        if event.reasoning:
            self.thoughts.append(event.reasoning)
            self.reasoning_tokens += event.reasoning_tokens
        for delta in event.tool_calls or ():
            if delta.index == len(self.calls):
                self.calls.append(ToolCall(id=delta.id or "", name=delta.name or ""))
            self.calls[delta.index].arguments += delta.arguments
        if event.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += event.logprobs
        if event.finish_reason is not None:
            self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason


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
    """Open `request`, of one choice, and answer it: by `answer` in one piece, or streamed by `writer`
    if there is one. Errors before the first byte are raised."""
    async with ClientWatch(exchange, config.ping_interval_s) as watch:
        generation = await gateway.open(wishes.apply(exchange, request))
        exchange.call_id, exchange.generations = request.request_id, (generation,)
        try:
            head = said([generation], advisory) + (headers or [])
            if writer is None:
                (whole,) = await collect(generation)
                await exchange.respond(200, answer(generation, whole), head)
            else:
                watch.stream = EventStream(exchange, head, framing)
                await stream(exchange, watch, watch.stream, generation, writer(generation))
        finally:
            generation.cancel()


def said(generations: Sequence[Generation], advisory: Sequence[str]) -> Headers:
    """The headers that name the seed in use, whether the work was shared, and the fields that cannot
    change the tokens."""
    seed = (b"x-mlx-serving-seed", b"%d" % generations[0].seed)
    return [seed, *wishes.reused(generations), *wishes.variant(generations), *advised(advisory)]


def advised(advisory: Sequence[str]) -> Headers:
    if not advisory:
        return []
    return [(b"x-mlx-serving-advisory", ", ".join(advisory).encode("ascii"))]


async def collect(events: Events, choices: int = 1) -> list[Collected]:
    """Every choice, read to its end."""
    found = [Collected() for _ in range(choices)]
    async for batch in events:
        for event in batch:
            found[event.choice].add(_checked(event))
    return found


async def stream(
    exchange: Exchange, watch: ClientWatch, out: EventStream, events: Events, writer: Writer
) -> None:
    """Write events as they come. What fails before the first byte is raised."""
    try:
        async for batch in events:
            data = b"".join([writer.write(_checked(event)) for event in batch])
            if data:
                await out.write(data)
        await out.write(writer.end(), last=True)
    except asyncio.CancelledError:
        # Not the client: the server cuts what its drain could not wait for.
        if out.started and not (watch.gone or exchange.answered):
            exchange.log_failure(cut_short())
            await out.write(writer.fail(cut_short()), last=True)
        raise
    except Exception as error:
        if not out.started:
            raise
        if not isinstance(error, MLXServingError):
            log.exception("[%s] the stream failed", exchange.id)
            error = internal_error(exchange.id)
        exchange.log_failure(error)
        await out.write(writer.fail(error), last=True)


def _checked(event: TokenEvent) -> TokenEvent:
    """No dialect knows a reason for what was cut short: that is an error."""
    if event.finish_reason == "cancelled":
        raise Cancelled("The request was cancelled.")
    if event.finish_reason == "error":
        raise ServerError("Generation failed.")
    return event
