"""The two that a chat may talk to: a server over HTTP, and an engine in this process's care."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import httpx

from mlx_serving import config_sources as settings
from mlx_serving.cli.say import Say
from mlx_serving.cli.where import Where
from mlx_serving.errors import MLXServingError, ServerError, Unauthorized, from_code

CONNECT_TIMEOUT_S = 5.0

Message = dict[str, str]
Emit = Callable[[str], None]


class Talker(Protocol):
    """Who answers. `answer` emits text as it comes, what is only thought by `think`, and raises
    MLXServingError."""

    name: str

    def answer(
        self, messages: list[Message], params: Mapping[str, Any], emit: Emit, think: Emit
    ) -> None: ...

    def close(self) -> None: ...


def answers(where: Where) -> bool:
    """Whether a server of ours is there."""
    try:
        with where.client(timeout=0.5) as http:
            return "status" in http.get("/health").json()
    except (httpx.HTTPError, ValueError, TypeError):
        return False


class ServerTalker:
    """Streams /v1/chat/completions. Raises ServerError where the server does not answer.

    Args:
        model: its name on the server; None takes the server's first.
        transport: another way to the server, for tests.
    """

    def __init__(
        self,
        where: Where,
        model: str | None,
        transport: httpx.BaseTransport | None = None,
        api_key: str | None = None,
    ) -> None:
        self._where = where
        # A queued request may wait for long, and a slow machine prefills for long.
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        own = {} if transport is None else {"transport": transport}
        self._http = where.client(timeout=timeout, headers=headers, **own)
        self._model = model or self._first_model()
        self.name = f"{self._model} at {self._where}"

    def answer(
        self, messages: list[Message], params: Mapping[str, Any], emit: Emit, think: Emit
    ) -> None:
        body = {"model": self._model, "messages": messages, "stream": True, **params}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _error(response.json())
                for chunk in _events(response.iter_lines()):
                    for choice in chunk.get("choices", ()):
                        delta = choice["delta"]
                        if thought := delta.get("reasoning_content"):
                            think(thought)
                        if text := delta.get("content"):
                            emit(text)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except ValueError as error:
            raise ServerError(f"{self._where} did not answer in JSON: {error}") from error

    def close(self) -> None:
        self._http.close()

    def _first_model(self) -> str:
        try:
            data = self._http.get("/v1/models").raise_for_status().json()
            return str(data["data"][0]["id"])
        except httpx.HTTPStatusError as error:
            if error.response.status_code not in (401, 403):
                raise self._unreachable(error) from error
            raise Unauthorized(f"{self._where} asks for its key: --api-key") from error
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (ValueError, LookupError, TypeError) as error:
            raise ServerError(f"{self._where}/v1/models does not list a model") from error

    def _unreachable(self, error: httpx.HTTPError) -> ServerError:
        return ServerError(f"{self._where}: {error}")


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of an event stream. Raises the error that one of them may carry."""
    for line in lines:
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if data:
            event = json.loads(data)
            if "error" in event:
                raise _error(event)
            yield event


def _error(body: Mapping[str, Any]) -> MLXServingError:
    error = body.get("error")
    if not isinstance(error, dict):
        return ServerError(f"the server answered {body}")
    return from_code(str(error.get("code")), str(error.get("message")), param=error.get("param"))


class EngineTalker:
    """An engine on an event loop that runs only while it is talked to.

    Raises what loading the model raises.
    """

    def __init__(self, model: str | None, say: Say) -> None:
        from mlx_serving.engine import Engine

        self._runner = asyncio.Runner()
        try:
            self._engine = Engine(model, config=settings.load(), progress=say.progress())
            self._runner.run(self._start())
        except BaseException:
            self._runner.close()
            raise
        self.name = self._engine.gateway.default_model()

    def answer(
        self, messages: list[Message], params: Mapping[str, Any], emit: Emit, think: Emit
    ) -> None:
        async def stream() -> None:
            async for chunk in self._engine.generate(messages, **params):
                if chunk.reasoning:
                    think(chunk.reasoning)
                if chunk.text:
                    emit(chunk.text)

        # Ctrl-C cancels the task that runs, and with it the request; the loop goes on.
        self._runner.run(stream())

    def close(self) -> None:
        self._runner.run(self._engine.stop())
        self._runner.close()

    async def _start(self) -> None:
        try:
            await self._engine.start()
        except BaseException:
            await self._engine.stop()
            raise
