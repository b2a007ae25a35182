"""OpenAI's JSON, whole and streamed: golden bytes, and what the stream does when it fails."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from mlx_serving.api.app import create_app
from mlx_serving.api.openai_response import SYSTEM_FINGERPRINT, Chunks
from mlx_serving.config import Config
from mlx_serving.errors import ContextOverflow, Overloaded, WorkerDied
from mlx_serving.types import TextLogprob, TokenEvent, Usage

USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 2,
    "total_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 3},
}
LOGPROBS = [
    TextLogprob(
        token="é",
        raw="é".encode(),
        logprob=-0.5,
        top=(("é", "é".encode(), -0.5), ("x", b"x", -2.0)),
    ),
    TextLogprob(token="!", raw=b"!", logprob=float("-inf"), top=()),
]


def masked(body: bytes) -> bytes:
    """The parts that differ from run to run, replaced."""
    body = re.sub(rb'"id":"(chatcmpl|cmpl)-[0-9a-f]{24}"', rb'"id":"ID"', body)
    body = re.sub(rb'"created":\d{10}', b'"created":1', body)
    return body.replace(SYSTEM_FINGERPRINT.encode(), b"FP")


CHAT_HEAD = b'{"id":"ID","object":"chat.completion.chunk","created":1,"model":"tiny","system_fingerprint":"FP","choices":['
TEXT_HEAD = b'{"id":"ID","object":"text_completion","created":1,"model":"tiny","system_fingerprint":"FP","choices":['


async def test_golden_chat_stream(chat: Any) -> None:
    response = await chat.post(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert masked(response.content) == b"".join(
        (
            b"data: "
            + CHAT_HEAD
            + b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n',
            b"data: "
            + CHAT_HEAD
            + b'{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}]}\n\n',
            b"data: "
            + CHAT_HEAD
            + b'{"index":0,"delta":{"content":" world"},"logprobs":null,"finish_reason":null}]}\n\n',
            b"data: "
            + CHAT_HEAD
            + b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}\n\n',
            b"data: [DONE]\n\n",
        )
    )


async def test_golden_completion_stream_with_usage(chat: Any) -> None:
    response = await chat.complete(stream=True, stream_options={"include_usage": True})
    assert masked(response.content) == b"".join(
        (
            b"data: "
            + TEXT_HEAD
            + b'{"index":0,"text":"Hello","logprobs":null,"finish_reason":null}],"usage":null}\n\n',
            b"data: "
            + TEXT_HEAD
            + b'{"index":0,"text":" world","logprobs":null,"finish_reason":null}],"usage":null}\n\n',
            b"data: "
            + TEXT_HEAD
            + b'{"index":0,"text":"","logprobs":null,"finish_reason":"stop"}],"usage":null}\n\n',
            b"data: " + TEXT_HEAD + b'],"usage":' + msgspec.json.encode(USAGE) + b"}\n\n",
            b"data: [DONE]\n\n",
        )
    )


async def test_golden_chat_answer(chat: Any) -> None:
    response = await chat.post()
    assert masked(response.content) == (
        b'{"id":"ID","object":"chat.completion","created":1,"model":"tiny","system_fingerprint":"FP",'
        b'"choices":[{"index":0,"message":{"role":"assistant","content":"Hello world","refusal":null},'
        b'"logprobs":null,"finish_reason":"stop"}],"usage":' + msgspec.json.encode(USAGE) + b"}"
    )


async def test_golden_completion_answer(chat: Any) -> None:
    response = await chat.complete()
    assert masked(response.content) == (
        b'{"id":"ID","object":"text_completion","created":1,"model":"tiny","system_fingerprint":"FP",'
        b'"choices":[{"index":0,"text":"Hello world","logprobs":null,"finish_reason":"stop"}],'
        b'"usage":' + msgspec.json.encode(USAGE) + b"}"
    )


def events(response: Any) -> list[dict[str, Any]]:
    lines = [line for line in response.content.split(b"\n\n") if line]
    assert lines[-1] == b"data: [DONE]"
    return [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]


async def test_choices_stream_apart_and_the_prompt_counts_once(chat: Any) -> None:
    chunks = events(await chat.post(n=3, stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 5
    assert last["usage"]["completion_tokens"] == 6
    for index in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [choice["delta"].get("role") for choice in mine] == ["assistant", None, None, None]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "Hello world"
        assert [choice["finish_reason"] for choice in mine] == [None, None, None, "stop"]


async def test_choices_of_an_answer(chat: Any) -> None:
    body = (await chat.post(n=2)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"]["prompt_tokens"] == 5
    assert body["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_number_their_choices_in_order(
    chat: Any, gateway: Any, stream: bool, drawn_seed: int
) -> None:
    def script(request: Any) -> list[Any]:
        text = request.prompt.text
        return [
            [TokenEvent(choice=i, text=f"{text}{i}", token_ids=[1], finish_reason="length")]
            for i in range(request.n)
        ]

    gateway.script = script
    response = await chat.complete(prompt=["a", "b", "c"], n=2, stream=stream)
    choices = [c["choices"][0] for c in events(response)] if stream else response.json()["choices"]
    texts = {i: "".join(c["text"] for c in choices if c["index"] == i) for i in range(6)}
    assert texts == {0: "a0", 1: "a1", 2: "b0", 3: "b1", 4: "c0", 5: "c1"}
    if not stream:
        assert response.json()["usage"]["prompt_tokens"] == 15
        assert response.json()["usage"]["completion_tokens"] == 6
    # One seed replays the whole call.
    assert [request.seed for request in gateway.requests] == [None, drawn_seed, drawn_seed]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_first(chat: Any, stream: bool) -> None:
    response = await chat.complete(echo=True, n=2, stream=stream)
    choices = [c["choices"][0] for c in events(response)] if stream else response.json()["choices"]
    for index in range(2):
        text = "".join(c["text"] for c in choices if c["index"] == index)
        assert text == "Once uponHello world"


def logprob_script(request: Any) -> list[Any]:
    return [
        [
            TokenEvent(
                choice=0, text="é!", token_ids=[1, 2], logprobs=LOGPROBS, finish_reason="length"
            )
        ]
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(chat: Any, gateway: Any, stream: bool) -> None:
    gateway.script = logprob_script
    response = await chat.post(logprobs=True, top_logprobs=2, stream=stream)
    choice = events(response)[1]["choices"][0] if stream else response.json()["choices"][0]
    first = {"token": "é", "logprob": -0.5, "bytes": [0xC3, 0xA9]}
    assert choice["logprobs"] == {
        "content": [
            {**first, "top_logprobs": [first, {"token": "x", "logprob": -2.0, "bytes": [120]}]},
            {"token": "!", "logprob": -9999.0, "bytes": [33], "top_logprobs": []},
        ],
        "refusal": None,
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(chat: Any, gateway: Any, stream: bool) -> None:
    gateway.script = logprob_script
    response = await chat.complete(logprobs=2, stream=stream)
    choice = events(response)[0]["choices"][0] if stream else response.json()["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["é", "!"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"é": -0.5, "x": -2.0}, {"!": -9999.0}],
        "text_offset": [0, 1],
    }


async def test_what_is_held_back_is_no_event(chat: Any, gateway: Any) -> None:
    gateway.script = lambda request: [
        [TokenEvent(choice=0, text="", token_ids=[1])],
        [TokenEvent(choice=0, text="", token_ids=[2])],
        [TokenEvent(choice=0, text="ü", token_ids=[3])],
        [TokenEvent(choice=0, text="", token_ids=[], finish_reason="stop", stop_reason="END")],
    ]
    deltas = [chunk["choices"][0] for chunk in events(await chat.post(stream=True))]
    assert [choice["delta"] for choice in deltas] == [
        {"role": "assistant", "content": ""},
        {"content": "ü"},
        {},
    ]
    assert deltas[-1]["stop_reason"] == "END"
    assert (await chat.post()).json()["choices"][0]["stop_reason"] == "END"


async def test_text_survives_line_splitters_and_quotes(chat: Any, gateway: Any) -> None:
    nasty = 'a\u2028b\u2029c\x85d\r\n"\\\x00\x7f\U0001f600'
    lp = TextLogprob(token=nasty, raw=nasty.encode(), logprob=-1.0)
    gateway.script = lambda request: [
        [TokenEvent(choice=0, text=nasty, token_ids=[1])],
        [TokenEvent(choice=0, text=nasty, token_ids=[1], logprobs=[lp], finish_reason="stop")],
    ]
    response = await chat.post(stream=True)
    lines = [line for line in response.content.decode().splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert events(response)[1]["choices"][0]["delta"]["content"] == nasty
    assert events(response)[2]["choices"][0]["logprobs"]["content"][0]["token"] == nasty


async def test_the_seed_is_said(chat: Any, drawn_seed: int) -> None:
    assert (await chat.post()).headers["x-mlx-serving-seed"] == str(drawn_seed)
    streamed = await chat.post(seed=11, stream=True)
    assert streamed.headers["x-mlx-serving-seed"] == "11"


@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_before_output_have_their_status(
    chat: Any, gateway: Any, stream: bool
) -> None:
    gateway.refuse = lambda request: Overloaded("Busy.", retry_after_s=1.2)
    response = await chat.post(stream=stream)
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    assert response.json() == {
        "error": {
            "message": "Busy.",
            "type": "overloaded_error",
            "param": None,
            "code": "overloaded",
        }
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fault_before_the_first_token_has_a_status(
    chat: Any, gateway: Any, stream: bool
) -> None:
    gateway.script = lambda request: [WorkerDied("The worker died: out of memory.")]
    response = await chat.post(stream=stream)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "worker_died"
    assert gateway.generations[0].ended


async def test_a_fault_in_the_stream_is_an_event_without_done(
    chat: Any, gateway: Any, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.script = lambda request: [
        [TokenEvent(choice=0, text="Hel", token_ids=[1])],
        WorkerDied("The worker died."),
    ]
    with caplog.at_level(logging.INFO, "mlx_serving.api"):
        response = await chat.post(stream=True)
    (said,) = [record.getMessage().partition("] ")[2] for record in caplog.records]
    assert said == "POST '/v1/chat/completions' -> 200, broken off: worker_died"
    assert response.status_code == 200
    *_, last, end = response.content.split(b"\n\n")
    assert end == b""
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "worker_died"


@pytest.mark.parametrize("reason", ["cancelled", "error"])
async def test_a_choice_cut_short_is_an_error(chat: Any, gateway: Any, reason: Any) -> None:
    gateway.script = lambda request: [
        [TokenEvent(choice=0, text="x", token_ids=[1])],
        [TokenEvent(choice=0, text="", token_ids=[], finish_reason=reason)],
    ]
    assert (await chat.post()).status_code == (499 if reason == "cancelled" else 500)
    assert b"[DONE]" not in (await chat.post(stream=True)).content


async def test_our_own_faults_show_nothing(
    chat: Any, gateway: Any, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.script = lambda request: [
        [TokenEvent(choice=0, text="x", token_ids=[1])],
        RuntimeError("secret path"),
    ]
    answer = await chat.post()
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    streamed = await chat.post(stream=True)
    assert b'"code":"internal_error"' in streamed.content
    assert b"secret" not in answer.content + streamed.content
    assert caplog.text.count("secret path") == 2
    assert answer.headers["x-request-id"] in caplog.text


async def test_one_refused_prompt_of_several_cancels_the_rest(chat: Any, gateway: Any) -> None:
    gateway.refuse = lambda request: (
        ContextOverflow("Too long.", param="prompt") if request.prompt.text == "c" else None
    )
    response = await chat.complete(prompt=["a", "b", "c"])
    assert response.json()["error"]["param"] == "prompt[2]"
    assert [generation.cancelled for generation in gateway.generations] == [True, True]


async def test_one_failing_prompt_of_several_cancels_the_rest(chat: Any, gateway: Any) -> None:
    gateway.script = lambda request: (
        [WorkerDied("died")] if request.prompt.text == "b" else ["hang"]
    )
    response = await chat.complete(prompt=["a", "b"])
    assert response.status_code == 500
    assert gateway.generations[0].cancelled


class Wire:
    """One request on raw ASGI, whose client can leave at will."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self.wrote = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        self.wrote.set()

    def run(self, app: Any, path: str = "/v1/chat/completions") -> asyncio.Task[None]:
        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        return asyncio.ensure_future(app(scope, self.receive, self.send))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - nothing signals it
        await asyncio.sleep(0)


MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_generation(gateway: Any, stream: bool) -> None:
    gateway.script = lambda request: [[TokenEvent(choice=0, text="x", token_ids=[1])], "hang"]
    wire = Wire({"messages": MESSAGES, "stream": stream})
    task = wire.run(create_app(gateway))
    if stream:
        await wire.wrote.wait()
    else:
        await until(lambda: bool(gateway.generations))
    wire.gone.set()
    await asyncio.wait_for(task, 5)
    assert gateway.generations[0].ended or gateway.generations[0].cancelled
    assert all(message.get("more_body", True) for message in wire.sent), "nothing ends the answer"


async def test_a_client_that_leaves_while_waiting_is_not_admitted(gateway: Any) -> None:
    gateway.open_hangs = True
    wire = Wire({"messages": MESSAGES})
    task = wire.run(create_app(gateway))
    await until(lambda: bool(gateway.requests))
    wire.gone.set()
    await asyncio.wait_for(task, 5)
    assert gateway.open_was_cancelled
    assert wire.sent == []


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_server_cuts_is_told(gateway: Any, stream: bool) -> None:
    gateway.script = lambda request: [[TokenEvent(choice=0, text="x", token_ids=[1])], "hang"]
    wire = Wire({"messages": MESSAGES, "stream": stream})
    task = wire.run(create_app(gateway))
    await until(lambda: bool(gateway.generations) and (not stream or bool(wire.sent)))
    await asyncio.sleep(0)
    task.cancel()
    await task
    assert gateway.generations[0].ended
    assert wire.sent[0]["status"] == (200 if stream else 503)
    assert b'"code":"draining"' in wire.sent[-1]["body"]
    assert not wire.sent[-1].get("more_body", False)


async def test_silence_is_filled_with_pings(gateway: Any) -> None:
    gateway.script = lambda request: ["hang"]
    gateway.live.config = Config(ping_interval_s=0.01)
    wire = Wire({"messages": MESSAGES, "stream": True})
    task = wire.run(create_app(gateway))
    while len(wire.sent) < 4:
        await asyncio.wait_for(wire.wrote.wait(), 5)
        wire.wrote.clear()
    wire.gone.set()
    await task
    start, *pings = wire.sent
    assert start["status"] == 200
    assert {message["body"] for message in pings} == {b": ping\n\n"}


def test_chunks_are_json_whatever_the_text() -> None:
    usages = [Usage(prompt_tokens=1, completion_tokens=1)]
    chunks = Chunks(
        "chat", call_id='i"d', created=1, model="m\\", echoes=["", ""], usages=lambda: usages
    )
    data = chunks.write(TokenEvent(choice=1, text="x", token_ids=[1])) + chunks.end()
    for event in data.removesuffix(b"\n\ndata: [DONE]\n\n").split(b"\n\n"):
        assert json.loads(event.removeprefix(b"data: "))["id"] == 'i"d'
