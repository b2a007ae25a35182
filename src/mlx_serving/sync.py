"""The engine for scripts and notebooks: plain calls, plain iterators."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

from mlx_serving.answers import Chunk, Completion, PromptLike, TextsLike
from mlx_serving.engine import Engine
from mlx_serving.errors import Draining
from mlx_serving.types import Embeddings, Ranking

T = TypeVar("T")


class SyncEngine:
    """The same engine for scripts and notebooks: plain calls, plain iterators.

        with SyncEngine("smollm2-135m") as engine:
            print(engine.chat("What is the capital of France?").text)

    It runs an `Engine` on an event loop in a thread of its own.
    """

    def __init__(
        self, model: str | Sequence[str | Mapping[str, Any]] | None = None, **kwargs: Any
    ) -> None:
        self._args = (model, kwargs)
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._engine: Engine | None = None

    def start(self) -> Self:
        """Does nothing where it runs already; after `close` it starts anew."""
        if self._thread is not None:
            return self
        if self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="mlx-serving", daemon=True
        )
        self._thread.start()
        try:
            self._engine = self._run(self._make())
            self._run(self._engine.start())
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        if self._thread is None:
            return
        if self._engine is not None:
            self._run(self._engine.stop())
            self._engine = None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._thread = None
        self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """The engine underneath; its coroutines belong to this object's own event loop. Raises Draining
        where it is not started, or closed."""
        if self._engine is None:
            raise Draining("The engine is not started: start() it, or use it as a context manager.")
        return self._engine

    def generate(self, prompt: PromptLike, **params: Any) -> Iterator[Chunk]:
        chunks = self.engine.generate(prompt, **params)
        try:
            while True:
                try:
                    yield self._run(_next(chunks))
                except StopAsyncIteration:
                    return
        finally:
            self._run(_aclose(chunks))

    def complete(self, prompt: PromptLike, **params: Any) -> Completion:
        return self._run(self.engine.complete(prompt, **params))

    def chat(self, messages: str | Sequence[Mapping[str, Any]], **params: Any) -> Completion:
        return self._run(self.engine.chat(messages, **params))

    def batch(self, prompts: Sequence[PromptLike], **params: Any) -> list[Completion]:
        return self._run(self.engine.batch(prompts, **params))

    def embed(self, texts: TextsLike, **params: Any) -> Embeddings:
        return self._run(self.engine.embed(texts, **params))

    def rerank(self, query: str, documents: Sequence[str], **params: Any) -> Ranking:
        return self._run(self.engine.rerank(query, documents, **params))

    def tokenize(self, prompt: PromptLike, **params: Any) -> list[int]:
        return self._run(self.engine.tokenize(prompt, **params))

    def detokenize(self, token_ids: Sequence[int], **params: Any) -> str:
        return self._run(self.engine.detokenize(token_ids, **params))

    def on(self, kind: type[Any], hook: Callable[[Any], None]) -> Callable[[], None]:
        """As `Engine.on`; the hook is called on the engine's thread."""
        return self.engine.on(kind, hook)

    async def _make(self) -> Engine:
        model, kwargs = self._args
        return Engine(model, **kwargs)

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        begun: list[asyncio.Task[Any]] = []
        try:
            return asyncio.run_coroutine_threadsafe(_noted(call, begun), self._loop).result()
        except BaseException:
            # Ctrl-C ends the waiting alone: the call is cancelled too, and has ended when this returns.
            asyncio.run_coroutine_threadsafe(_end(begun), self._loop).result()
            raise


async def _noted(call: Coroutine[Any, Any, T], begun: list[asyncio.Task[Any]]) -> T:
    task = asyncio.current_task()
    assert task is not None, "it is run as a task"
    begun.append(task)
    return await call


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


async def _next(chunks: AsyncIterator[Chunk]) -> Chunk:
    return await anext(chunks)


async def _aclose(chunks: AsyncIterator[Chunk]) -> None:
    close = getattr(chunks, "aclose", None)
    if close is not None:
        await close()
