"""OpenAI's /v1/chat/completions and /v1/completions: parse, open, stream or collect."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from mlx_serving import clock
from mlx_serving.api import wishes
from mlx_serving.api.exchange import Exchange, Headers, cut_short, internal_error
from mlx_serving.api.openai_request import Call, parse_chat, parse_completion
from mlx_serving.api.openai_response import Answer, Chunks, Route
from mlx_serving.api.port import GatewayPort, Generation
from mlx_serving.api.sse import DONE, ClientWatch, EventStream
from mlx_serving.errors import MLXServingError
from mlx_serving.types import GenerateRequest, TokenEvent

log = logging.getLogger(__name__)


class OpenAIRoutes:
    def __init__(self, gateway: GatewayPort) -> None:
        self._gateway = gateway
        self._live = gateway.live

    async def chat_completions(self, exchange: Exchange) -> None:
        await self._serve(exchange, "chat", self._parse_chat)

    async def completions(self, exchange: Exchange) -> None:
        await self._serve(exchange, "completions", self._parse_completion)

    def _parse_chat(self, body: bytes) -> Call:
        return parse_chat(body, default_model=self._gateway.default_model())

    def _parse_completion(self, body: bytes) -> Call:
        return parse_completion(
            body,
            default_model=self._gateway.default_model(),
            default_max_tokens=self._live.config.max_tokens,
        )

    async def _serve(
        self, exchange: Exchange, route: Route, parse: Callable[[bytes], Call]
    ) -> None:
        call = parse(await exchange.body(self._live.config.max_body_bytes))
        async with ClientWatch(exchange, self._live.config.ping_interval_s) as watch:
            generations = await self._open([wishes.apply(exchange, r) for r in call.requests])
            exchange.call_id, exchange.generations = call.id, generations
            try:
                headers = _headers(call, generations)
                echoes = _echoes(call, generations)
                if call.stream:
                    watch.stream = EventStream(exchange, headers)
                    await _stream(exchange, watch.stream, route, call, generations, echoes)
                else:
                    await _answer(exchange, headers, route, call, generations, echoes)
            except asyncio.CancelledError:
                # Not the client: the server cuts what its drain could not wait for.
                if watch.stream is not None and watch.stream.started and not watch.gone:
                    await watch.stream.fail(cut_short())
                raise
            finally:
                for generation in generations:
                    generation.cancel()

    async def _open(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """Open every prompt's generation, or none. A drawn seed is shared, so that the one in the
        response's header replays the whole call."""
        generations: list[Generation] = []
        try:
            for index, request in enumerate(requests):
                if generations:
                    request = msgspec.structs.replace(request, seed=generations[0].seed)
                try:
                    generations.append(await self._gateway.open(request))
                except MLXServingError as error:
                    if error.param == "prompt" and len(requests) > 1:
                        error.param = f"prompt[{index}]"
                    raise
        except BaseException:
            for generation in generations:
                generation.cancel()
            raise
        return generations


async def _answer(
    exchange: Exchange,
    headers: Headers,
    route: Route,
    call: Call,
    generations: Sequence[Generation],
    echoes: Sequence[str],
) -> None:
    answer = Answer(route, echoes)
    n = call.requests[0].n
    async for prompt, events in _events(generations):
        for event in events:
            answer.add(prompt * n + event.choice, event)
    usages = [generation.usage() for generation in generations]
    body = answer.encode(call.id, int(clock.wall()), call.model, usages)
    await exchange.respond(200, body, headers)


async def _stream(
    exchange: Exchange,
    stream: EventStream,
    route: Route,
    call: Call,
    generations: Sequence[Generation],
    echoes: Sequence[str],
) -> None:
    chunks = Chunks(
        route,
        call_id=call.id,
        created=int(clock.wall()),
        model=call.model,
        echoes=echoes,
        include_usage=call.include_usage,
    )
    n = call.requests[0].n
    try:
        async for prompt, events in _events(generations):
            data = b"".join([chunks.write(prompt * n + e.choice, e) for e in events])
            if data:
                await stream.write(data)
        end = chunks.usage(g.usage() for g in generations) if call.include_usage else b""
        await stream.write(end + DONE, last=True)
    except MLXServingError as error:
        if not stream.started:
            raise
        await stream.fail(error)
    except Exception:
        if not stream.started:
            raise
        log.exception("[%s] the stream failed", exchange.id)
        await stream.fail(internal_error(exchange.id))


async def _events(
    generations: Sequence[Generation],
) -> AsyncIterator[tuple[int, list[TokenEvent]]]:
    """Batches of all prompts' events as they come, each with its prompt's index."""
    if len(generations) == 1:
        async for events in generations[0]:
            yield 0, events
        return
    iterators = [aiter(generation) for generation in generations]
    waiting = {asyncio.ensure_future(anext(it)): i for i, it in enumerate(iterators)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                prompt = waiting.pop(future)
                try:
                    events = future.result()
                except StopAsyncIteration:
                    continue
                yield prompt, events
                waiting[asyncio.ensure_future(anext(iterators[prompt]))] = prompt
    finally:
        for future in waiting:
            future.cancel()


def _headers(call: Call, generations: Sequence[Generation]) -> Headers:
    headers: Headers = [(b"x-mlx-serving-seed", b"%d" % generations[0].seed)]
    headers += [*wishes.reused(generations), *wishes.variant(generations)]
    if call.advisory:
        headers.append((b"x-mlx-serving-advisory", ", ".join(call.advisory).encode("ascii")))
    return headers


def _echoes(call: Call, generations: Sequence[Generation]) -> list[str]:
    """The text that each choice begins with."""
    if not call.echo:
        return [""] * sum(request.n for request in call.requests)
    return [
        generation.prompt_text or ""
        for request, generation in zip(call.requests, generations, strict=True)
        for _ in range(request.n)
    ]
