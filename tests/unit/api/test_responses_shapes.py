"""/v1/responses' JSON, whole and streamed: golden events, the store, and the SDK over a socket."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest

from mlx_serving.api.responses_store import ResponseStore
from mlx_serving.errors import WorkerDied
from mlx_serving.types import ChatPrompt, Message, TextLogprob, TokenEvent, ToolCallDelta

ROUTE = "/v1/responses"


def event(**fields: Any) -> TokenEvent:
    return TokenEvent(**{"choice": 0, "text": "", "token_ids": [7], **fields})


def agent(request: Any) -> list[Any]:
    """Thinks, says something, calls two tools."""
    return [
        [event(reasoning="Hm", reasoning_tokens=1), event(reasoning="m.", reasoning_tokens=1)],
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


def events(body: bytes) -> list[dict[str, Any]]:
    found = []
    for chunk in body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = chunk.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert found[-1]["type"] == name.removeprefix("event: ")
    assert [e["sequence_number"] for e in found] == list(range(len(found)))
    return found


def masked(value: Any) -> Any:
    """Ids by their kind, times as 1."""
    text = re.sub(r'"(rs|msg|fc|resp)_[0-9a-f]{48}"', r'"\1"', json.dumps(value))
    return json.loads(re.sub(r'"(created|completed)_at": \d+', r'"\1_at": 1', text))


USAGE = {
    "input_tokens": 5,
    "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 1},
    "output_tokens": 2,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 7,
}
BODY = {
    "id": "resp",
    "object": "response",
    "created_at": 1,
    "completed_at": None,
    "status": "in_progress",
    "background": False,
    "error": None,
    "incomplete_details": None,
    "model": "tiny",
    "output": [],
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {"a": "b"},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "usage": None,
}


def part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def message(status: str, *parts: Any) -> dict[str, Any]:
    return {
        "id": "msg",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": list(parts),
    }


COMPLETED = BODY | {
    "status": "completed",
    "completed_at": 1,
    "output": [message("completed", part("Hello world"))],
    "usage": USAGE,
}


async def test_golden_stream(client: httpx.AsyncClient) -> None:
    body = {"input": "Hi", "stream": True, "metadata": {"a": "b"}}
    response = await client.post(ROUTE, json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    at = {"item_id": "msg", "output_index": 0, "content_index": 0}
    wanted: list[dict[str, Any]] = [
        {"type": "response.created", "response": BODY},
        {"type": "response.in_progress", "response": BODY},
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": message("in_progress"),
        },
        {"type": "response.content_part.added", **at, "part": part("")},
        {"type": "response.output_text.delta", **at, "delta": "Hello", "logprobs": []},
        {"type": "response.output_text.delta", **at, "delta": " world", "logprobs": []},
        {"type": "response.output_text.done", **at, "text": "Hello world", "logprobs": []},
        {"type": "response.content_part.done", **at, "part": part("Hello world")},
        {
            "type": "response.output_item.done",
            "output_index": 0,
            "item": message("completed", part("Hello world")),
        },
        {"type": "response.completed", "response": COMPLETED},
    ]
    found = events(response.content)
    assert masked(found) == [w | {"sequence_number": i} for i, w in enumerate(wanted)]


async def test_golden_items(client: httpx.AsyncClient, gateway: Any) -> None:
    gateway.script = agent
    response = await client.post(ROUTE, json={"input": "Hi", "stream": True})
    found = [
        (e["type"].removeprefix("response."), e.get("output_index"), e.get("delta"))
        for e in events(response.content)
    ]
    assert found == [
        ("created", None, None),
        ("in_progress", None, None),
        ("output_item.added", 0, None),
        ("content_part.added", 0, None),
        ("reasoning_text.delta", 0, "Hm"),
        ("reasoning_text.delta", 0, "m."),
        ("reasoning_text.done", 0, None),
        ("content_part.done", 0, None),
        ("output_item.done", 0, None),
        ("output_item.added", 1, None),
        ("content_part.added", 1, None),
        ("output_text.delta", 1, "So."),
        ("output_text.done", 1, None),
        ("content_part.done", 1, None),
        ("output_item.done", 1, None),
        ("output_item.added", 2, None),
        ("function_call_arguments.delta", 2, '{"x": 1}'),
        ("function_call_arguments.done", 2, None),
        ("output_item.done", 2, None),
        ("output_item.added", 3, None),
        ("function_call_arguments.delta", 3, "{}"),
        ("function_call_arguments.done", 3, None),
        ("output_item.done", 3, None),
        ("completed", None, None),
    ]


async def test_a_whole_response_is_what_the_stream_ends_with(
    client: httpx.AsyncClient, gateway: Any
) -> None:
    for script in (None, agent):
        gateway.script = script or gateway.script
        whole = (await client.post(ROUTE, json={"input": "Hi"})).json()
        stream = await client.post(ROUTE, json={"input": "Hi", "stream": True})
        assert masked(events(stream.content)[-1]["response"]) == masked(whole)
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    assert [masked(item) for item in whole["output"]] == [
        {
            "id": "rs",
            "type": "reasoning",
            "status": "completed",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hmm."}],
        },
        message("completed", part("So.")),
        {
            "id": "fc",
            "type": "function_call",
            "status": "completed",
            "call_id": "call_a",
            "name": "add",
            "arguments": '{"x": 1}',
        },
        {
            "id": "fc",
            "type": "function_call",
            "status": "completed",
            "call_id": "call_b",
            "name": "now",
            "arguments": "{}",
        },
    ]


async def test_an_answer_cut_by_length_is_incomplete(
    client: httpx.AsyncClient, gateway: Any
) -> None:
    gateway.script = lambda r: [[event(text="x", finish_reason="length")]]
    whole = (await client.post(ROUTE, json={"input": "Hi"})).json()
    assert (whole["status"], whole["output"][0]["status"]) == ("incomplete", "incomplete")
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    stream = await client.post(ROUTE, json={"input": "Hi", "stream": True})
    assert events(stream.content)[-1]["type"] == "response.incomplete"


async def test_logprobs(client: httpx.AsyncClient, gateway: Any) -> None:
    lp = TextLogprob(token="x", raw=b"x", logprob=-0.5, top=(("y", b"y", float("-inf")),))
    gateway.script = lambda r: [[event(text="x", logprobs=[lp], finish_reason="stop")]]
    wanted = [
        {
            "token": "x",
            "bytes": [120],
            "logprob": -0.5,
            "top_logprobs": [{"token": "y", "bytes": [121], "logprob": -9999.0}],
        }
    ]
    body = {"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    whole = (await client.post(ROUTE, json=body)).json()
    assert whole["output"][0]["content"][0]["logprobs"] == wanted
    stream = events((await client.post(ROUTE, json=body | {"stream": True})).content)
    assert [e["logprobs"] for e in stream if e["type"] == "response.output_text.delta"] == [wanted]


async def test_faults(client: httpx.AsyncClient, gateway: Any) -> None:
    gateway.script = lambda r: [[event(text="x")], WorkerDied("The worker died.")]
    stream = await client.post(ROUTE, json={"input": "Hi", "stream": True})
    last = events(stream.content)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["message"] == "The worker died."
    assert (await client.get(f"{ROUTE}/{last['response']['id']}")).status_code == 404
    assert (await client.post(ROUTE, json={"input": "Hi"})).status_code == 500


@pytest.mark.parametrize("stream", [False, True])
async def test_conversations_go_on(client: httpx.AsyncClient, gateway: Any, stream: bool) -> None:
    async def create(**body: Any) -> Any:
        response = await client.post(ROUTE, json={**body, "stream": stream})
        return events(response.content)[-1]["response"] if stream else response.json()

    gateway.script = agent
    first = await create(input="Hi", instructions="Be brief.")
    assert (await client.get(f"{ROUTE}/{first['id']}")).json() == first
    output = {"type": "function_call_output", "call_id": "call_a", "output": "3"}
    second = await create(input=[output], previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    prompt = gateway.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert [(m.role, m.content, m.reasoning_content) for m in prompt.messages] == [
        ("user", "Hi", None),
        ("assistant", "So.", "Hmm."),
        ("tool", "3", None),
    ]
    assert [call["id"] for call in prompt.messages[1].tool_calls] == ["call_a", "call_b"]
    deleted = await client.delete(f"{ROUTE}/{first['id']}")
    assert deleted.json() == {"id": first["id"], "object": "response.deleted", "deleted": True}
    for method in ("GET", "DELETE"):
        assert (await client.request(method, f"{ROUTE}/{first['id']}")).status_code == 404
    body = {"input": "x", "previous_response_id": first["id"]}
    gone = (await client.post(ROUTE, json=body)).json()["error"]
    assert (gone["param"], gone["code"]) == ("previous_response_id", "previous_response_not_found")
    assert (await create(input="x", previous_response_id=second["id"]))["status"] == "completed"


async def test_what_is_not_to_be_stored_is_not(client: httpx.AsyncClient) -> None:
    body = (await client.post(ROUTE, json={"input": "Hi", "store": False})).json()
    assert body["store"] is False
    assert (await client.get(f"{ROUTE}/{body['id']}")).status_code == 404


def test_the_store_is_bounded() -> None:
    store = ResponseStore(max_responses=2, max_chars=1000)
    message = Message(role="user", content="x" * 100)
    for name in "abc":
        store.put(name, b"", [message])
        store.get("a")
    assert [store.get(name) is not None for name in "abc"] == [True, False, True]
    store.put("long", b"", [message] * 5)
    assert [store.get(name) is not None for name in ("a", "c", "long")] == [False, True, True]
    store.put("too long", b"x" * 1001, [])
    assert store.get("too long") is None
    assert [store.get(name) is not None for name in ("a", "c", "long")] == [False, True, True]
    store.put("a", b"", [message])
    assert store.delete("a")
    assert not store.delete("a")


def test_the_sdk(start_server: Any, gateway: Any) -> None:
    sdk = openai.OpenAI(base_url=start_server().address + "/v1", api_key="x", max_retries=0)
    assert sdk.responses.create(model="tiny", input="Hi").output_text == "Hello world"
    gateway.script = agent
    tool: Any = {
        "type": "function",
        "name": "add",
        "parameters": {"type": "object"},
        "strict": None,
    }
    with sdk.responses.stream(model="tiny", input="Hi", tools=[tool]) as stream:
        kinds = [e.type for e in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert [item.type for item in final.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert final.output_text == "So."
    again: Any = [
        *final.output,
        {"type": "function_call_output", "call_id": "call_a", "output": "3"},
    ]
    second = sdk.responses.create(model="tiny", input=again, previous_response_id=final.id)
    assert sdk.responses.retrieve(second.id).id == second.id
    sdk.responses.delete(second.id)
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.responses.create(model="tiny", input="Hi", background=True)
    assert bad.value.param == "background"
