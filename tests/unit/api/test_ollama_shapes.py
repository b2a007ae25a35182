"""Ollama's JSON, whole and in lines: golden lines, faults, models, and the SDK over a socket."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import ollama
import pytest

from mlx_serving.api.ollama_response import parameter_size
from mlx_serving.errors import ModelNotFound, WorkerDied
from mlx_serving.types import TextLogprob, TokenEvent, ToolCallDelta

CHAT, GENERATE = "/api/chat", "/api/generate"
BODIES = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
    GENERATE: {"model": "tiny", "prompt": "Hi"},
}


def event(**fields: Any) -> TokenEvent:
    return TokenEvent(**{"choice": 0, "text": "", "token_ids": [7], **fields})


def agent(request: Any) -> list[Any]:
    """Thinks, says something, calls two tools."""
    return [
        [event(reasoning="Hmm.")],
        [event(text="So.")],
        [event(tool_calls=[ToolCallDelta(index=0, id="call_a", name="add")])],
        [event(tool_calls=[ToolCallDelta(index=0, arguments='{"x": 1}')])],
        [
            event(
                tool_calls=[ToolCallDelta(index=1, id="call_b", name="now", arguments="{}")],
                finish_reason="tool_calls",
            )
        ],
    ]


def masked(body: bytes) -> str:
    text = re.sub(r'"created_at":"[0-9T:.-]+Z"', '"created_at":"T"', body.decode())
    return re.sub(r'_duration":\d+', '_duration":1', text)


END = (
    '"done":true,"done_reason":"stop","total_duration":1,"load_duration":1,'
    '"prompt_eval_count":5,"prompt_eval_duration":1,"eval_count":2,"eval_duration":1}'
)
HEAD = '{"model":"tiny","created_at":"T",'


async def test_golden_chat(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=BODIES[CHAT])
    assert response.headers["content-type"] == "application/x-ndjson"
    assert masked(response.content) == (
        HEAD + '"message":{"role":"assistant","content":"Hello"},"done":false}\n'
        + HEAD + '"message":{"role":"assistant","content":" world"},"done":false}\n'
        + HEAD + '"message":{"role":"assistant","content":""},' + END + "\n"
    )  # fmt: skip


async def test_golden_generate(client: httpx.AsyncClient) -> None:
    response = await client.post(GENERATE, json=BODIES[GENERATE])
    assert masked(response.content) == (
        HEAD + '"response":"Hello","done":false}\n'
        + HEAD + '"response":" world","done":false}\n'
        + HEAD + '"response":"",' + END + "\n"
    )  # fmt: skip


async def test_golden_whole(client: httpx.AsyncClient) -> None:
    chat = await client.post(CHAT, json=BODIES[CHAT] | {"stream": False})
    said = '"message":{"role":"assistant","content":"Hello world"},'
    assert masked(chat.content) == HEAD + said + END
    generate = await client.post(GENERATE, json=BODIES[GENERATE] | {"stream": False})
    assert masked(generate.content) == HEAD + '"response":"Hello world",' + END


async def test_calls_come_whole(client: httpx.AsyncClient, gateway: Any) -> None:
    gateway.script = agent
    lines = [json.loads(x) for x in (await client.post(CHAT, json=BODIES[CHAT])).text.splitlines()]
    add = {"id": "call_a", "function": {"index": 0, "name": "add", "arguments": {"x": 1}}}
    now = {"id": "call_b", "function": {"index": 1, "name": "now", "arguments": {}}}
    assert [line["message"] for line in lines] == [
        {"role": "assistant", "content": "", "thinking": "Hmm."},
        {"role": "assistant", "content": "So."},
        {"role": "assistant", "content": "", "tool_calls": [add, now]},
        {"role": "assistant", "content": ""},
    ]
    assert lines[-1]["done_reason"] == "stop"
    whole = (await client.post(CHAT, json=BODIES[CHAT] | {"stream": False})).json()
    assert whole["message"] == {
        "role": "assistant",
        "content": "So.",
        "thinking": "Hmm.",
        "tool_calls": [add, now],
    }


async def test_a_call_comes_when_the_next_begins(client: httpx.AsyncClient, gateway: Any) -> None:
    def call(index: int, **more: Any) -> list[TokenEvent]:
        return [event(tool_calls=[ToolCallDelta(index=index, id=f"c{index}", name="f", **more)])]

    gateway.script = lambda r: [call(0), call(1), call(2), [event(finish_reason="stop")]]
    lines = [json.loads(x) for x in (await client.post(CHAT, json=BODIES[CHAT])).text.splitlines()]
    ids = [[c["id"] for c in line["message"].get("tool_calls", ())] for line in lines]
    assert ids == [["c0"], ["c1"], ["c2"], []]


async def test_logprobs(client: httpx.AsyncClient, gateway: Any) -> None:
    lp = TextLogprob(token="x", raw=b"x", logprob=-0.5, top=(("y", b"y", float("-inf")),))
    gateway.script = lambda r: [[event(text="x", logprobs=[lp], finish_reason="length")]]
    wanted = [
        {
            "token": "x",
            "logprob": -0.5,
            "bytes": [120],
            "top_logprobs": [{"token": "y", "logprob": -9999.0, "bytes": [121]}],
        }
    ]
    body = BODIES[GENERATE] | {"logprobs": True}
    whole = (await client.post(GENERATE, json=body | {"stream": False})).json()
    assert (whole["logprobs"], whole["done_reason"]) == (wanted, "length")
    lines = (await client.post(GENERATE, json=body)).text.splitlines()
    assert json.loads(lines[0])["logprobs"] == wanted
    assert json.loads(lines[-1])["done_reason"] == "length"


async def test_faults(client: httpx.AsyncClient, gateway: Any) -> None:
    gateway.script = lambda r: [[event(text="x")], WorkerDied("The worker died.")]
    lines = (await client.post(CHAT, json=BODIES[CHAT])).text.splitlines()
    error = {"error": "The worker died.", "param": None, "code": "worker_died"}
    assert json.loads(lines[-1]) == error
    whole = await client.post(CHAT, json=BODIES[CHAT] | {"stream": False})
    assert (whole.status_code, whole.json()) == (500, error)
    gateway.refuse = lambda r: ModelNotFound("model 'x' not found", param="model")
    assert (await client.post(CHAT, json=BODIES[CHAT])).status_code == 404


@pytest.mark.parametrize(("method", "path"), [("POST", "/api/pull"), ("GET", "/api/chat")])
async def test_other_paths_answer_in_kind(
    client: httpx.AsyncClient, method: str, path: str
) -> None:
    response = await client.request(method, path)
    assert response.status_code in (404, 405)
    assert isinstance(response.json()["error"], str)


async def test_nothing_to_say_loads_the_model(client: httpx.AsyncClient, gateway: Any) -> None:
    body = (await client.post(GENERATE, json={"model": "tiny:latest"})).json()
    assert (body["done"], body["done_reason"], body["response"]) == (True, "load", "")
    body = (await client.post(CHAT, json={"model": "tiny", "messages": []})).json()
    assert (body["done_reason"], body["message"]["content"]) == ("load", "")
    assert gateway.requests == []
    assert (await client.post(CHAT, json={"model": "nope"})).status_code == 404
    assert gateway.loads == [("tiny", None), ("tiny", None)]


async def test_keep_alive_of_nothing_unloads(client: httpx.AsyncClient, gateway: Any) -> None:
    for nothing in (0, "0", "0s", "0m"):
        body = (await client.post(GENERATE, json={"model": "tiny", "keep_alive": nothing})).json()
        assert (body["done"], body["done_reason"]) == (True, "unload")
    assert gateway.unloads == ["tiny"] * 4
    await client.post(GENERATE, json={"model": "tiny", "keep_alive": "1h30m"})
    assert gateway.loads == [("tiny", 5400.0)]


async def test_the_models(client: httpx.AsyncClient) -> None:
    tags = (await client.get("/api/tags")).json()["models"]
    assert [(m["name"], m["size"]) for m in tags] == [("tiny:latest", 1000), ("org/big:4bit", 0)]
    sizes = [m["details"]["parameter_size"] for m in tags]
    assert (tags[0]["details"]["quantization_level"], sizes) == ("4-bit", ["134.52M", ""])
    (running,) = (await client.get("/api/ps")).json()["models"]
    assert (running["model"], running["context_length"]) == ("tiny:latest", 8192)
    for name in ("tiny", "tiny:latest", "small"):
        shown = (await client.post("/api/show", json={"model": name})).json()
        assert shown["model_info"]["llama.context_length"] == 8192
        assert shown["details"]["parameter_size"] == "134.52M"
        assert shown["model_info"]["general.parameter_count"] == 134_515_008
        assert shown["capabilities"] == ["completion", "tools"]
    missing = await client.post("/api/show", json={"model": "nope"})
    assert (missing.status_code, missing.json()["error"]) == (404, "model 'nope' not found")
    assert (await client.post("/api/show", json={})).status_code == 400


@pytest.mark.parametrize(
    ("count", "size"),
    [(0, ""), (999, "999"), (1500, "2K"), (3_000_000, "3M"), (7_615_616_512, "7.6B"), (8 * 10**9, "8B")],
)  # fmt: skip
def test_parameters_are_counted_as_ollama_does(count: int, size: str) -> None:
    assert parameter_size(count) == size


async def test_the_greeting(client: httpx.AsyncClient) -> None:
    clients = {"user-agent": "ollama/0.13.0 (arm64 darwin) Go/go1.24"}
    assert (await client.get("/", headers=clients)).text == "Ollama is running"
    assert (await client.head("/", headers=clients)).status_code == 200
    assert "Ollama is running" in (await client.get("/")).text


def test_the_sdk(start_server: Any, gateway: Any) -> None:
    sdk = ollama.Client(host=start_server().address)
    messages = BODIES[CHAT]["messages"]
    whole = sdk.chat("tiny", messages=messages, options={"temperature": 0, "num_ctx": 4096})
    assert (whole.message.content, whole.done_reason, whole.eval_count) == (
        "Hello world",
        "stop",
        2,
    )
    assert whole.total_duration is not None and whole.total_duration >= (whole.eval_duration or 0)
    parts = list(sdk.generate("tiny", "Hi", stream=True, keep_alive="5m"))
    assert "".join(part.response or "" for part in parts) == "Hello world"
    assert [part.done for part in parts] == [False, False, True]

    gateway.script = agent

    def add(x: int) -> int:
        """Adds.

        Args:
            x: a number
        """
        return x

    answer = sdk.chat("tiny:latest", messages=messages, tools=[add], think=True)
    assert answer.message.thinking == "Hmm."
    calls = answer.message.tool_calls or []
    assert [(c.function.name, c.function.arguments) for c in calls] == [
        ("add", {"x": 1}),
        ("now", {}),
    ]
    again = [*messages, answer.message, {"role": "tool", "content": "1", "tool_name": "add"}]
    assert sdk.chat("tiny", messages=again).message.content == "So."
    assert [m.model for m in sdk.list().models] == ["tiny:latest", "org/big:4bit"]
    assert sdk.ps().models[0].context_length == 8192
    assert sdk.show("tiny").modelinfo["general.architecture"] == "llama"
    with pytest.raises(ollama.ResponseError) as bad:
        sdk.chat("tiny", messages=messages, options={"mirostat": 1})
    assert bad.value.status_code == 400
    assert "options.mirostat" in bad.value.error
