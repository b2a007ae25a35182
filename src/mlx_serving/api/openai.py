"""OpenAI's /v1/chat/completions and /v1/completions: parse, open, stream or collect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

import msgspec

from mlx_serving import clock
from mlx_serving.api import drive, wishes
from mlx_serving.api.exchange import Exchange
from mlx_serving.api.openai_request import Call, parse_chat, parse_completion
from mlx_serving.api.openai_response import Chunks, Route, answer
from mlx_serving.api.port import GatewayPort, Generation
from mlx_serving.api.sse import ClientWatch, EventStream
from mlx_serving.errors import MLXServingError
from mlx_serving.types import GenerateRequest, TokenEvent, Usage


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
                head = drive.said(generations, call.advisory)
                if call.stream:
                    watch.stream = EventStream(exchange, head)
                    chunks = _chunks(route, call, generations)
                    events = _events(call, generations)
                    await drive.stream(exchange, watch, watch.stream, events, chunks)
                else:
                    await exchange.respond(200, await _whole(route, call, generations), head)
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


async def _whole(route: Route, call: Call, generations: Sequence[Generation]) -> bytes:
    echoes = _echoes(call, generations)
    choices = await drive.collect(_events(call, generations), len(echoes))
    return answer(
        route,
        call_id=call.id,
        created=int(clock.wall()),
        model=call.model,
        echoes=echoes,
        choices=choices,
        usages=_usages(generations),
    )


def _chunks(route: Route, call: Call, generations: Sequence[Generation]) -> Chunks:
    return Chunks(
        route,
        call_id=call.id,
        created=int(clock.wall()),
        model=call.model,
        echoes=_echoes(call, generations),
        usages=partial(_usages, generations) if call.include_usage else None,
    )


def _usages(generations: Sequence[Generation]) -> list[Usage]:
    return [generation.usage() for generation in generations]


def _events(call: Call, generations: Sequence[Generation]) -> drive.Events:
    """Batches of all prompts' events as they come, with the choices numbered through."""
    return generations[0] if len(generations) == 1 else _merged(generations, call.requests[0].n)


async def _merged(generations: Sequence[Generation], n: int) -> AsyncIterator[list[TokenEvent]]:
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
                for event in events:
                    event.choice += prompt * n
                yield events
                waiting[asyncio.ensure_future(anext(iterators[prompt]))] = prompt
    finally:
        for future in waiting:
            future.cancel()


def _echoes(call: Call, generations: Sequence[Generation]) -> list[str]:
    """The text that each choice begins with."""
    if not call.echo:
        return [""] * sum(request.n for request in call.requests)
    return [
        generation.prompt_text or ""
        for request, generation in zip(call.requests, generations, strict=True)
        for _ in range(request.n)
    ]
