"""Anthropic's JSON, whole and streamed: golden events, faults, and the SDK over a socket."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import anthropic
import httpx
import pytest

from mlx_serving.api.app import create_app
from mlx_serving.config import Config
from mlx_serving.errors import ModelNotFound, Overloaded, WorkerDied
from mlx_serving.types import TokenEvent, ToolCallDelta

MESSAGES = "/v1/messages"
BODY = {"model": "tiny", "max_tokens": 64, "messages": [{"role": "user", "content": "Hi"}]}
USAGE = {
    "input_tokens": 1,
    "cache_creation_input_tokens": 1,
    "cache_read_input_tokens": 3,
    "output_tokens": 2,
}


def event(**fields: Any) -> TokenEvent:
    return TokenEvent(**{"choice": 0, "text": "", "token_ids": [7], **fields})


def agent(request: Any) -> list[Any]:
    """Thinks, says something, calls two tools."""
    return [
        [event(reasoning="Hm"), event(reasoning="m.")],
        [event(text="I shall"), event(text=" add.")],
        [event(tool_calls=[ToolCallDelta(index=0, id="call_a", name="add")])],
        [event(tool_calls=[ToolCallDelta(index=0, arguments='{"x":')])],
        [event(tool_calls=[ToolCallDelta(index=0, arguments=" 1}")])],
        [
            event(
                tool_calls=[ToolCallDelta(index=1, id="call_b", name="now", arguments="{}")],
                finish_reason="tool_calls",
            )
        ],
    ]


def events(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for chunk in body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = chunk.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def masked(body: bytes) -> str:
    return re.sub(r"msg_[0-9a-f]{24}", "ID", body.decode())


async def test_golden_stream(client: httpx.AsyncClient) -> None:
    response = await client.post(MESSAGES, json=BODY | {"stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["request-id"] == response.headers["x-request-id"]
    start_usage = json.dumps(USAGE | {"output_tokens": 0}, separators=(",", ":"))
    usage = json.dumps(USAGE, separators=(",", ":"))
    assert masked(response.content) == (
        'event: message_start\ndata: {"type":"message_start","message":{"id":"ID","type":"message",'
        '"role":"assistant","model":"tiny","content":[],"usage":' + start_usage + ","
        '"stop_reason":null,"stop_sequence":null}}\n\n'
        'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
        '"content_block":{"type":"text","text":""}}\n\n'
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        '"delta":{"type":"text_delta","text":"Hello"}}\n\n'
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        '"delta":{"type":"text_delta","text":" world"}}\n\n'
        'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
        'event: message_delta\ndata: {"type":"message_delta",'
        '"delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":' + usage + "}\n\n"
        'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )


async def test_golden_blocks(client: httpx.AsyncClient, gateway: Any) -> None:
    gateway.script = agent
    response = await client.post(MESSAGES, json=BODY | {"stream": True})
    found = [
        (name, data.get("index"), data.get("content_block") or data.get("delta"))
        for name, data in events(response.content)
    ]
    start, delta, stop = "content_block_start", "content_block_delta", "content_block_stop"
    assert found == [
        ("message_start", None, None),
        (start, 0, {"type": "thinking", "thinking": "", "signature": ""}),
        (delta, 0, {"type": "thinking_delta", "thinking": "Hm"}),
        (delta, 0, {"type": "thinking_delta", "thinking": "m."}),
        (delta, 0, {"type": "signature_delta", "signature": "mlx-serving"}),
        (stop, 0, None),
        (start, 1, {"type": "text", "text": ""}),
        (delta, 1, {"type": "text_delta", "text": "I shall"}),
        (delta, 1, {"type": "text_delta", "text": " add."}),
        (stop, 1, None),
        (start, 2, {"type": "tool_use", "id": "call_a", "name": "add", "input": {}}),
        (delta, 2, {"type": "input_json_delta", "partial_json": '{"x":'}),
        (delta, 2, {"type": "input_json_delta", "partial_json": " 1}"}),
        (stop, 2, None),
        (start, 3, {"type": "tool_use", "id": "call_b", "name": "now", "input": {}}),
        (delta, 3, {"type": "input_json_delta", "partial_json": "{}"}),
        (stop, 3, None),
        ("message_delta", None, {"stop_reason": "tool_use", "stop_sequence": None}),
        ("message_stop", None, None),
    ]


async def test_a_whole_message(client: httpx.AsyncClient, gateway: Any) -> None:
    gateway.script = agent
    body = (await client.post(MESSAGES, json=BODY)).json()
    assert body.pop("id").startswith("msg_")
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [
            {"type": "thinking", "thinking": "Hmm.", "signature": "mlx-serving"},
            {"type": "text", "text": "I shall add."},
            {"type": "tool_use", "id": "call_a", "name": "add", "input": {"x": 1}},
            {"type": "tool_use", "id": "call_b", "name": "now", "input": {}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": USAGE | {"output_tokens": 8},
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_thinking_may_be_omitted(
    client: httpx.AsyncClient, gateway: Any, stream: bool
) -> None:
    gateway.script = agent
    thinking = {"type": "adaptive", "display": "omitted"}
    response = await client.post(MESSAGES, json=BODY | {"thinking": thinking, "stream": stream})
    assert "Hm" not in response.text
    assert '"type":"thinking"' in response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("end", "wanted"),
    [
        ({"finish_reason": "stop", "stop_reason": "END"}, ("stop_sequence", "END")),
        ({"finish_reason": "stop", "stop_reason": 2}, ("end_turn", None)),
        ({"finish_reason": "length"}, ("max_tokens", None)),
    ],
)
async def test_reasons_to_stop(
    client: httpx.AsyncClient, gateway: Any, end: Any, wanted: Any, stream: bool
) -> None:
    gateway.script = lambda request: [[event(text="x")], [event(**end)]]
    response = await client.post(MESSAGES, json=BODY | {"stream": stream})
    body = events(response.content)[-2][1]["delta"] if stream else response.json()
    assert (body["stop_reason"], body["stop_sequence"]) == wanted


async def test_a_call_cut_short_has_no_arguments(client: httpx.AsyncClient, gateway: Any) -> None:
    call = ToolCallDelta(index=0, id="a", name="f", arguments='{"x": "un')
    gateway.script = lambda request: [[event(tool_calls=[call], finish_reason="length")]]
    body = (await client.post(MESSAGES, json=BODY)).json()
    assert body["content"] == [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]
    assert body["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("Busy.", retry_after_s=1.2), 503, "overloaded_error"),
        (ModelNotFound("No such model.", param="model"), 404, "not_found_error"),
    ],
)
async def test_refusals(
    client: httpx.AsyncClient, gateway: Any, error: Any, status: int, kind: str, stream: bool
) -> None:
    gateway.refuse = lambda request: error
    response = await client.post(MESSAGES, json=BODY | {"stream": stream})
    assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
    assert response.headers.get("retry-after") == ("2" if status == 503 else None)


async def test_faults_in_the_stream_are_events(
    client: httpx.AsyncClient, gateway: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for fault, code in ((WorkerDied("died"), "worker_died"), (RuntimeError("?"), "internal_error")):
        gateway.script = lambda request, fault=fault: [[event(text="Hel")], fault]
        response = await client.post(MESSAGES, json=BODY | {"stream": True})
        name, data = events(response.content)[-1]
        assert (name, data["type"], data["error"]["code"]) == ("error", "error", code)
    assert "message_stop" not in response.text


async def test_silence_is_filled_with_pings(gateway: Any) -> None:
    gateway.script = lambda request: ["hang"]
    sent: list[Any] = []
    gone = asyncio.Event()
    body: list[bytes] = [json.dumps(BODY | {"stream": True}).encode()]

    async def receive() -> Any:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 3:
            gone.set()

    scope = {"type": "http", "method": "POST", "path": MESSAGES, "headers": []}
    gateway.live.config = Config(ping_interval_s=0.01)
    await asyncio.wait_for(create_app(gateway)(scope, receive, send), 5)
    assert events(sent[1]["body"]) == [("ping", {"type": "ping"})]
    assert gateway.generations[0].ended


async def test_what_the_server_cuts_is_told(gateway: Any) -> None:
    gateway.script = lambda request: [[event(text="x")], "hang"]
    sent: list[Any] = []
    body: list[bytes] = [json.dumps(BODY | {"stream": True}).encode()]

    async def receive() -> Any:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": MESSAGES, "headers": []}
    app = asyncio.ensure_future(create_app(gateway)(scope, receive, send))
    while len(sent) < 2:  # noqa: ASYNC110 - nothing signals it
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    app.cancel()
    await app
    assert events(sent[-1]["body"])[0][1]["error"]["code"] == "draining"
    assert not sent[-1]["more_body"]


def test_the_sdk(start_server: Any, gateway: Any) -> None:
    gateway.script = agent
    sdk = anthropic.Anthropic(base_url=start_server().address, api_key="x", max_retries=0)
    asked: Any = {"model": "small", "max_tokens": 9, "messages": BODY["messages"]}
    whole = sdk.messages.create(**asked)
    with sdk.messages.stream(**asked) as stream:
        kinds = [e.type for e in stream]
        streamed = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert [block.to_dict() for block in streamed.content] == [
        block.to_dict() for block in whole.content
    ]
    assert streamed.usage.output_tokens == 8
    assert sdk.messages.count_tokens(model="tiny", messages=BODY["messages"]).input_tokens == 2
    again = [*BODY["messages"], whole.to_param(), {"role": "user", "content": "Go on."}]
    assert sdk.messages.create(**(asked | {"messages": again})).stop_reason == "tool_use"
    assert [model.id for model in sdk.models.list()] == ["tiny", "org/big:4bit"]
    with pytest.raises(anthropic.BadRequestError) as bad:
        sdk.messages.create(**asked, extra_body={"temperature": 9})
    assert "temperature" in str(bad.value)
    gateway.refuse = lambda request: Overloaded("Busy.")
    with pytest.raises(anthropic.InternalServerError):
        sdk.messages.create(**asked)
