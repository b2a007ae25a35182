"""A scripted gateway behind the API's seam, and the ways to talk to the application over it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec
import pytest
import uvloop

from mlx_serving.api.app import create_app
from mlx_serving.api.server import serve
from mlx_serving.config import Config
from mlx_serving.errors import Cancelled, Draining, InvalidRequest, ModelNotFound
from mlx_serving.live import LiveSettings
from mlx_serving.types import (
    CacheStats,
    ChatPrompt,
    Embeddings,
    EmbedRequest,
    GenerateRequest,
    ModelInfo,
    Prompt,
    Ranked,
    Ranking,
    RankRequest,
    ServedModel,
    TextPrompt,
    TokenEvent,
    TokenPrompt,
    Usage,
)

Step = list[TokenEvent] | Exception | str
"""A batch, an error to raise, or "hang": nothing more until cancelled."""
Script = Callable[[GenerateRequest], list[Step]]

DRAWN_SEED = 1234567890123
INFO = ModelInfo(
    model_id="tiny",
    path="/models/tiny",
    architecture="llama",
    context_length=8192,
    vocab_size=256,
    eos_token_ids=(0,),
    quantization="4-bit",
    dtype="float16",
    parameters=134_515_008,
    weight_bytes=1000,
)


def text_event(text: str, choice: int = 0, **more: Any) -> TokenEvent:
    return TokenEvent(choice=choice, text=text, token_ids=[7], **more)


def hello(request: GenerateRequest) -> list[Step]:
    """Two tokens a choice and an end."""
    return [
        *([text_event("Hello", i) for i in range(request.n)],),
        *([text_event(" world", i, finish_reason="stop") for i in range(request.n)],),
    ]


class FakeGeneration:
    def __init__(self, request: GenerateRequest, steps: list[Step]) -> None:
        self.request = request
        self.request_id = request.request_id
        self.prompt_tokens = 5
        self.cached_tokens = 3
        self.seed = DRAWN_SEED if request.seed is None else request.seed
        self.prompt_text = "Once upon"
        self.reused = None
        self.variant = None
        self.flags: tuple[str, ...] = ()
        self.cancelled = False
        self.ended = False
        self._steps = steps
        self._tokens = 0
        self._wake = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        try:
            for step in self._steps:
                if self.cancelled:
                    raise Cancelled("cancelled")
                if step == "hang":
                    await self._wake.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    assert isinstance(step, list)
                    self._tokens += sum(len(event.token_ids) for event in step)
                    yield step
        finally:
            self.ended = True

    def cancel(self) -> None:
        if not self.ended:
            self.cancelled = True
            self._wake.set()

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=5, completion_tokens=self._tokens, cached_tokens=3, cache_write_tokens=1
        )


class FakeGateway:
    """Plays `script`; keeps the requests it saw and the generations it opened."""

    def __init__(self) -> None:
        self.script: Script = hello
        self.refuse: Callable[[GenerateRequest], Exception | None] = lambda request: None
        self.open_hangs = False
        self.open_was_cancelled = False
        self.status = "ready"
        self.requests: list[GenerateRequest] = []
        self.prompts: list[tuple[str, Prompt]] = []
        self.pooled: list[EmbedRequest | RankRequest] = []
        self.generations: list[FakeGeneration] = []
        self.cache = CacheStats(memory_blocks=3, disk_lost=1)
        self.loads: list[tuple[str, float | Literal["anew"] | None]] = []
        self.unloads: list[str] = []
        self.live = LiveSettings(Config())

    def default_model(self) -> str:
        return "tiny"

    def models(self) -> list[ServedModel]:
        return [
            ServedModel(
                id="tiny", created=7, status="ready", aliases=("small",), context_length=8192
            ),
            ServedModel(id="org/big:4bit", created=8, status="failed", reason="no such file"),
        ]

    def cache_stats(self) -> dict[str, CacheStats]:
        return {"tiny": self.cache}

    async def clear_cache(self) -> None:
        self.cache = CacheStats()

    def health(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "workers": [{"pid": 42, "state": "ready", "phase": "idle", "models": ["tiny"]}],
        }

    async def open(self, request: GenerateRequest) -> FakeGeneration:
        self.requests.append(request)
        if self.status == "draining":
            raise Draining("The server is shutting down.")
        if self.open_hangs:
            try:
                await asyncio.Event().wait()
            finally:
                self.open_was_cancelled = True
        error = self.refuse(request)
        if error is not None:
            raise error
        generation = FakeGeneration(request, self.script(request))
        self.generations.append(generation)
        return generation

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Two numbers a text: its length and its place."""
        await self._pool(request)
        lengths = [
            len(i.text if isinstance(i, TextPrompt) else i.token_ids) for i in request.inputs
        ]
        return Embeddings(
            request_id=request.request_id,
            model="tiny",
            vectors=tuple(array("f", [n, i]) for i, n in enumerate(lengths)),
            usage=Usage(prompt_tokens=sum(lengths), completion_tokens=0),
        )

    async def rank(self, request: RankRequest) -> Ranking:
        """The longer, the better."""
        await self._pool(request)
        scores = [Ranked(index=i, score=len(d) / 10) for i, d in enumerate(request.documents)]
        scores.sort(key=lambda one: -one.score)
        return Ranking(
            request_id=request.request_id,
            model="tiny",
            results=tuple(scores[: request.top_n]),
            usage=Usage(prompt_tokens=9, completion_tokens=0),
        )

    async def _pool(self, request: EmbedRequest | RankRequest) -> None:
        self.pooled.append(request)
        if self.open_hangs:
            try:
                await asyncio.Event().wait()
            finally:
                self.open_was_cancelled = True

    async def tokenise(self, model: str, prompt: Prompt) -> list[int]:
        self.prompts.append((model, prompt))
        match prompt:
            case TokenPrompt():
                return list(prompt.token_ids)
            case TextPrompt():
                return list(prompt.text.encode())
            case ChatPrompt():
                return list("".join(m.content or "" for m in prompt.messages).encode())

    async def detokenise(self, model: str, token_ids: Sequence[int]) -> str:
        self.model_info(model)
        if any(token_id > 255 for token_id in token_ids):
            raise InvalidRequest("Not in the vocabulary.", param="tokens")
        return bytes(token_ids).decode(errors="replace")

    async def load(
        self, model: str, keep_alive_s: float | None = None, *, anew: bool = False
    ) -> ServedModel:
        self.model_info(model)
        self.loads.append((model, "anew" if anew else keep_alive_s))
        return self.models()[0]

    async def unload(self, model: str) -> ServedModel:
        self.model_info(model)
        self.unloads.append(model)
        return self.models()[0]

    def pin(self, model: str, pinned: bool) -> ServedModel:
        self.model_info(model)
        return msgspec.structs.replace(self.models()[0], pinned=pinned)

    def model_id(self, model: str) -> str:
        for served in self.models():
            if model == served.id or model in served.aliases:
                return served.id
        raise ModelNotFound(f"Model '{model}' is not served here.", param="model")

    def model_info(self, model: str) -> ModelInfo | None:
        if model in ("tiny", "small"):
            return INFO
        if model == "org/big:4bit":
            return None
        raise ModelNotFound(f"Model '{model}' is not served here.", param="model")

    def abilities(self, model: str) -> tuple[str, ...]:
        return ("tools",) if model == "tiny" else ()

    def metrics(self) -> bytes:
        return b"# HELP x X\nx 1\n"

    async def drain(self, timeout_s: float) -> bool:
        self.status = "draining"
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while not self._idle() and asyncio.get_running_loop().time() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return self._idle()

    def _idle(self) -> bool:
        return all(g.ended or g.cancelled for g in self.generations)


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
def config() -> Config:
    return Config(max_body_bytes=64 * 1024)


@pytest.fixture
async def client(gateway: FakeGateway, config: Config) -> AsyncIterator[httpx.AsyncClient]:
    """Talks to the application without a socket; an exception that leaves the app fails the test."""
    gateway.live.config = config
    transport = httpx.ASGITransport(create_app(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
async def relaxed() -> AsyncIterator[httpx.AsyncClient]:
    """A server that leaves out what it does not know. Settings are a gateway's: it has its own."""
    gateway = FakeGateway()
    gateway.live.config = Config(unknown_fields="warn")
    transport = httpx.ASGITransport(create_app(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


class Chat:
    """Sends a chat request of one message, with fields of choice."""

    def __init__(self, client: httpx.AsyncClient, gateway: FakeGateway) -> None:
        self._client = client
        self._gateway = gateway

    async def post(self, **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
        return await self._client.post("/v1/chat/completions", json=body)

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self._client.post("/v1/completions", json={"prompt": "Hi", **fields})

    async def request_of(self, **fields: Any) -> GenerateRequest:
        """The GenerateRequest that a chat body becomes."""
        response = await self.post(**fields)
        assert response.status_code == 200, response.text
        return self._gateway.requests[-1]

    async def completion_request_of(self, **fields: Any) -> GenerateRequest:
        response = await self.complete(**fields)
        assert response.status_code == 200, response.text
        return self._gateway.requests[-1]


@pytest.fixture
def chat(client: httpx.AsyncClient, gateway: FakeGateway) -> Chat:
    return Chat(client, gateway)


class RunningServer:
    """`serve()` in a thread of its own, as a process would run it."""

    def __init__(self, gateway: FakeGateway, config: Config) -> None:
        self.gateway = gateway
        gateway.live.config = config
        self.address = ""
        self.exit_code: int | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(10), "the server did not start"

    def stop(self) -> None:
        """What a signal does: once drains, twice cuts."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has stopped
            self._loop.call_soon_threadsafe(self._stop.set)

    def join(self) -> int | None:
        self._thread.join(15)
        assert not self._thread.is_alive(), "the server did not stop"
        return self.exit_code

    def _run(self) -> None:
        uvloop.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        app = create_app(self.gateway)
        self.exit_code = await serve(
            app, self.gateway, on_started=self._on_started, should_stop=self._stop
        )

    def _on_started(self, address: str) -> None:
        self.address = address
        self._started.set()


@pytest.fixture
def start_server(gateway: FakeGateway) -> Iterator[Callable[..., RunningServer]]:
    running: list[RunningServer] = []

    def start(**settings: Any) -> RunningServer:
        server = RunningServer(gateway, Config(**{"port": 0, "drain_timeout_s": 0.3, **settings}))
        server.start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.stop()
        server.join()


@pytest.fixture
def uds_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("u") / "s"


@pytest.fixture
def drawn_seed() -> int:
    return DRAWN_SEED


@pytest.fixture(scope="session")
def make_gateway() -> Callable[[], FakeGateway]:
    return FakeGateway
