"""Over real sockets: the official client, bytes on the wire, drains, Unix sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mlx_serving.api.app import create_app
from mlx_serving.api.server import serve
from mlx_serving.config import Config
from mlx_serving.errors import ConfigError, WorkerDied
from mlx_serving.types import TextLogprob, TokenEvent

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


def sdk(server: Any) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=server.address + "/v1", api_key="none", max_retries=0, timeout=120
    )


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never became true"
        time.sleep(0.005)


def test_the_openai_client(start_server: Any) -> None:
    client = sdk(start_server())
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, n=2)
    assert [choice.message.content for choice in chat.choices] == ["Hello world"] * 2
    assert [choice.finish_reason for choice in chat.choices] == ["stop"] * 2
    assert chat.object == "chat.completion"
    assert chat.usage is not None
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (5, 4)
    assert chat.usage.prompt_tokens_details is not None
    assert chat.usage.prompt_tokens_details.cached_tokens == 3
    text = client.completions.create(model="tiny", prompt=["a", "b"])
    assert [choice.text for choice in text.choices] == ["Hello world"] * 2
    assert [model.id for model in client.models.list()] == ["tiny", "org/big:4bit"]
    assert client.models.retrieve("org/big:4bit").id == "org/big:4bit"


def test_the_openai_client_streams(start_server: Any) -> None:
    client = sdk(start_server())
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == "Hello world"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 7
    assert len({chunk.id for chunk in chunks}) == 1
    pieces = client.completions.create(model="tiny", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == "Hello world"


def test_the_openai_client_reads_logprobs(start_server: Any, gateway: Any) -> None:
    lp = TextLogprob(token="a", raw=b"a", logprob=-0.5, top=(("a", b"a", -0.5), ("b", b"b", -1.0)))
    gateway.script = lambda request: [
        [TokenEvent(choice=0, text="a", token_ids=[1], logprobs=[lp], finish_reason="length")]
    ]
    client = sdk(start_server())
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    token = chat.choices[0].logprobs.content[0]
    assert (token.token, token.bytes, token.logprob) == ("a", [97], -0.5)
    assert [top.token for top in token.top_logprobs] == ["a", "b"]
    text = client.completions.create(model="tiny", prompt="x", logprobs=1)
    assert text.choices[0].logprobs is not None
    assert text.choices[0].logprobs.top_logprobs == [{"a": -0.5, "b": -1.0}]


def test_the_openai_client_raises(start_server: Any, gateway: Any) -> None:
    client = sdk(start_server())
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert caught.value.param == "temperature"
    gateway.script = lambda request: [
        [TokenEvent(choice=0, text="Hel", token_ids=[1])],
        WorkerDied("The worker died."),
    ]
    got: list[str | None] = []
    with pytest.raises(openai.APIError, match=r"The worker died\.") as failed:
        stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        got.extend(chunk.choices[0].delta.content for chunk in stream)
    assert got == ["", "Hel"]
    assert failed.value.code == "worker_died"


def test_a_closed_stream_frees_its_row(start_server: Any, gateway: Any) -> None:
    gateway.script = lambda request: [[TokenEvent(choice=0, text="x", token_ids=[1])], "hang"]
    stream = sdk(start_server()).chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True
    )
    next(iter(stream))
    assert not gateway.generations[0].ended
    stream.close()
    eventually(lambda: gateway.generations[0].ended)


def test_a_connection_is_kept_after_an_error(start_server: Any) -> None:
    server = start_server(max_body_bytes=2048)
    with httpx.Client(base_url=server.address) as client:
        for _ in range(2):
            big = client.post("/v1/chat/completions", content=b"x" * 100_000)
            assert big.status_code == 413
            chunked = client.post("/v1/chat/completions", content=iter([b"x" * 1024] * 64))
            assert chunked.status_code == 413
            assert client.get("/health").status_code == 200


def test_sixteen_streams_at_once(start_server: Any, gateway: Any) -> None:
    gateway.script = lambda request: [
        *([TokenEvent(choice=0, text=f"{i},", token_ids=[i])] for i in range(200)),
        [TokenEvent(choice=0, text="", token_ids=[], finish_reason="length")],
    ]
    server = start_server()
    wanted = "".join(f"{i}," for i in range(200))
    texts: list[str] = []

    def read() -> None:
        body = {"messages": MESSAGES, "stream": True}
        with sdk(server).chat.completions.create(model="tiny", **body) as stream:
            texts.append("".join(c.choices[0].delta.content or "" for c in stream))

    threads = [threading.Thread(target=read) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert texts == [wanted] * 16


def test_a_unix_socket_is_private_and_removed(start_server: Any, uds_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(uds_path))
    stale.close()
    server = start_server(uds=str(uds_path))
    assert server.address == f"unix:{uds_path}"
    assert stat.S_IMODE(uds_path.stat().st_mode) == 0o600
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(uds_path))) as client:
        answer = client.post("http://x/v1/chat/completions", json={"messages": MESSAGES})
    assert answer.json()["choices"][0]["message"]["content"] == "Hello world"
    server.stop()
    assert server.join() == 0
    assert not uds_path.exists()


def test_an_idle_server_stops_with_0(start_server: Any) -> None:
    server = start_server()
    with httpx.Client(base_url=server.address) as client:
        client.get("/health")
        server.stop()
        assert server.join() == 0


def test_a_drain_lets_streams_finish_and_refuses_new_ones(start_server: Any, gateway: Any) -> None:
    gateway.script = lambda request: [[TokenEvent(choice=0, text="x", token_ids=[1])], "hang"]
    server = start_server(drain_timeout_s=20)
    client = sdk(server)
    stream = iter(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    next(stream)
    server.stop()
    eventually(lambda: gateway.status == "draining")
    assert httpx.get(server.address + "/health").json()["status"] == "draining"
    assert httpx.get(server.address + "/ready").status_code == 503
    with pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert refused.value.code == "draining"
    # The stream's model ends its answer.
    server._loop.call_soon_threadsafe(gateway.generations[0]._wake.set)
    assert list(stream) is not None
    assert server.join() == 0


def test_the_deadline_cuts_streams(start_server: Any, gateway: Any) -> None:
    gateway.script = lambda request: [[TokenEvent(choice=0, text="x", token_ids=[1])], "hang"]
    server = start_server(drain_timeout_s=0.05)
    stream = iter(sdk(server).chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    next(stream)
    server.stop()
    with pytest.raises(openai.APIError) as told:
        list(stream)
    assert told.value.code == "draining"
    assert server.join() == 1


def test_a_slow_reader_holds_up_itself_only(start_server: Any, gateway: Any) -> None:
    long = [[TokenEvent(choice=0, text="x" * 1000, token_ids=[1])]] * 50_000
    gateway.script = lambda request: long
    server = start_server()
    with httpx.stream(
        "POST", server.address + "/v1/completions", json={"prompt": "x", "stream": True}
    ) as slow:
        assert slow.status_code == 200
        gateway.script = lambda request: long[:3]
        answer = httpx.post(server.address + "/v1/completions", json={"prompt": "x"})
        assert len(answer.json()["choices"][0]["text"]) == 3000
        assert not gateway.generations[0].ended, "50 MB do not fit in what is buffered"
    eventually(lambda: gateway.generations[0].ended or gateway.generations[0].cancelled)


SERVER = """
import asyncio, sys, uvloop
sys.path.insert(0, {folder!r})
from conftest import FakeGateway, text_event
from mlx_serving.api.app import create_app
from mlx_serving.api.server import serve
from mlx_serving.config import Config

gateway = FakeGateway()
gateway.script = lambda request: [[text_event("x")], "hang"]
gateway.live.config = Config(port=0, drain_timeout_s=60)
sys.exit(uvloop.run(serve(create_app(gateway), gateway,
                          on_started=lambda address: print(address, flush=True))))
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_drains_and_a_second_cuts(signum: int) -> None:
    code = SERVER.format(folder=str(Path(__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with httpx.stream(
            "POST", address + "/v1/chat/completions", json={"messages": MESSAGES, "stream": True}
        ) as response:
            chunks = response.iter_bytes()
            next(chunks)
            os.kill(process.pid, signum)
            eventually(lambda: httpx.get(address + "/health").json()["status"] == "draining")
            assert process.poll() is None
            os.kill(process.pid, signum)
            assert process.wait(10) == 1
    finally:
        process.kill()
        process.wait()


def run(config: Config, gateway: Any) -> int:
    gateway.live.config = config
    return asyncio.run(serve(create_app(gateway), gateway))


def test_addresses_that_cannot_be_listened_on(
    start_server: Any, gateway: Any, uds_path: Path
) -> None:
    taken = int(start_server().address.rsplit(":", 1)[1])
    with pytest.raises(ConfigError) as port:
        run(Config(port=taken), gateway)
    assert port.value.param == "port"
    with pytest.raises(ConfigError) as host:
        run(Config(host="999.1.1.1", port=0), gateway)
    assert host.value.param == "host"
    start_server(uds=str(uds_path))
    with pytest.raises(ConfigError, match="Another server"):
        run(Config(uds=str(uds_path)), gateway)
    assert uds_path.exists(), "the running server's socket stays"
    plain = uds_path.with_name("file")
    plain.write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        run(Config(uds=str(plain)), gateway)
    assert plain.read_text() == "precious"
    with pytest.raises(ConfigError) as missing:
        run(Config(uds=str(uds_path.parent / "no" / "s")), gateway)
    assert missing.value.param == "uds"
