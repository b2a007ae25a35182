"""Every field of /v1/responses, through HTTP: honoured, advisory or refused as its table says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai.types.responses
import openai.types.shared_params
import pytest

from mlx_serving.api import responses_fields as fields
from mlx_serving.errors import InvalidRequest
from mlx_serving.types import ChatPrompt, GenerateRequest, Grammar

Read = Callable[[GenerateRequest], Any]
ROUTE = "/v1/responses"
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}
NESTED = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
LOGPROBS = ["message.output_text.logprobs"]


def prompt_of(request: GenerateRequest) -> ChatPrompt:
    assert isinstance(request.prompt, ChatPrompt)
    return request.prompt


def texts(request: GenerateRequest) -> list[tuple[str, str | None]]:
    return [(m.role, m.content) for m in prompt_of(request).messages]


HONOURED: dict[str, tuple[Any, Read, Any]] = {
    "input": ("Yo", texts, [("user", "Yo")]),
    "model": ("small", lambda r: r.model, "small"),
    "instructions": ("Be brief.", texts, [("system", "Be brief."), ("user", "Hi")]),
    "max_output_tokens": (9, lambda r: r.max_tokens, 9),
    "temperature": (0, lambda r: r.sampling.temperature, 0.0),
    "top_p": (0.25, lambda r: r.sampling.top_p, 0.25),
    "include": (LOGPROBS, lambda r: r.sampling.logprobs, 0),
    "tools": ([TOOL], lambda r: prompt_of(r).tools, (NESTED,)),
    "parallel_tool_calls": (False, lambda r: prompt_of(r).parallel_tool_calls, False),
    "text": (
        {"format": {"type": "json_object"}},
        lambda r: r.grammar,
        Grammar(kind="json_object", param="text.format"),
    ),
    "reasoning": (
        {"effort": "low"},
        lambda r: prompt_of(r).reasoning_effort,
        "low",
    ),
    "seed": (-1, lambda r: r.seed, 2**64 - 1),
}
ELSEWHERE = {
    "stream": "test_responses_shapes.py::test_golden_stream",
    "store": "test_responses_shapes.py::test_what_is_not_to_be_stored_is_not",
    "previous_response_id": "test_responses_shapes.py::test_conversations_go_on",
    "metadata": "test_responses_shapes.py::test_a_whole_response_is_what_the_stream_ends_with",
    "tool_choice": "test_responses_tools.py::test_choices_of_tools",
    "top_logprobs": "test_responses_fields.py::test_top_logprobs",
}


async def send(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post(ROUTE, json={"input": "Hi", **body})


async def request_of(client: httpx.AsyncClient, gateway: Any, **body: Any) -> GenerateRequest:
    response = await send(client, **body)
    assert response.status_code == 200, response.text
    request: GenerateRequest = gateway.requests[-1]
    return request


async def refused(answer: Any, param: str, code: str | None = None) -> None:
    response = await answer
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code


def test_every_honoured_field_has_a_case() -> None:
    honoured = {f.name for f in fields.RESPONSES.values() if f.disposition == "honoured"}
    assert honoured - ELSEWHERE.keys() == HONOURED.keys()


@pytest.mark.parametrize("name", HONOURED)
async def test_honoured(client: httpx.AsyncClient, gateway: Any, name: str) -> None:
    value, read, wanted = HONOURED[name]
    more = {"tools": [TOOL]} if name == "parallel_tool_calls" else {}
    assert read(await request_of(client, gateway, **more)) != wanted, "the case must differ"
    assert read(await request_of(client, gateway, **more, **{name: value})) == wanted


async def test_null_is_the_default_of_every_field(client: httpx.AsyncClient) -> None:
    response = await send(client, **{name: None for name in fields.RESPONSES if name != "input"})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "field", [f for f in fields.RESPONSES.values() if f.disposition == "refused"]
)
async def test_refused_fields_are_named(client: httpx.AsyncClient, field: Any) -> None:
    await refused(send(client, **{field.name: {"a": 1}}), field.name, "unsupported_parameter")
    for neutral in (None, *field.neutral):
        assert (await send(client, **{field.name: neutral})).status_code == 200


@pytest.mark.parametrize(
    "field", [f for f in fields.RESPONSES.values() if f.disposition == "advisory"]
)
async def test_advisory_fields_are_named_in_a_header(client: httpx.AsyncClient, field: Any) -> None:
    response = await send(client, **{field.name: {"any": "thing"}})
    assert response.headers["x-mlx-serving-advisory"] == field.name


async def test_nested_fields(client: httpx.AsyncClient) -> None:
    response = await send(
        client,
        reasoning={"summary": "auto", "effort": None, "mode": "standard", "context": "auto"},
        text={"verbosity": "medium"},
    )
    assert response.headers["x-mlx-serving-advisory"] == "reasoning.summary"


@pytest.mark.parametrize(
    ("params", "table"),
    [
        (
            openai.types.responses.response_create_params.ResponseCreateParamsBase,
            fields.RESPONSES,
        ),
        (openai.types.shared_params.Reasoning, fields.REASONING),
        (openai.types.responses.ResponseTextConfigParam, fields.TEXT),
        (openai.types.responses.FunctionToolParam, fields.TOOL),
        (openai.types.responses.NamespaceToolParam, fields.NAMESPACE),
        (openai.types.responses.WebSearchToolParam, fields.WEB_SEARCH),
        (openai.types.responses.ToolChoiceFunctionParam, fields.TOOL_CHOICE),
        (openai.types.responses.ResponseFormatTextJSONSchemaConfigParam, fields.FORMAT),
        (openai.types.responses.EasyInputMessageParam, fields.ITEMS["message"]),
        (openai.types.responses.ResponseOutputMessageParam, fields.ITEMS["message"]),
        (openai.types.responses.ResponseFunctionToolCallParam, fields.ITEMS["function_call"]),
        (openai.types.responses.ResponseReasoningItemParam, fields.ITEMS["reasoning"]),
        (
            openai.types.responses.response_input_item_param.FunctionCallOutput,
            fields.ITEMS["function_call_output"],
        ),
        (openai.types.responses.ResponseInputTextParam, fields.TEXT_PART),
        (openai.types.responses.ResponseOutputTextParam, fields.TEXT_PART),
        (openai.types.responses.ResponseOutputRefusalParam, fields.REFUSAL),
    ],
)
def test_every_field_of_the_client_has_a_disposition(params: Any, table: Any) -> None:
    assert {name.rstrip("_") for name in params.__annotations__} - table.keys() == set()


def items(*items: Any) -> dict[str, Any]:
    return {"input": list(items)}


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    (items("x"), "input[0]"),
    (items({"type": "computer_call"}), "input[0].type"),
    (items({"type": "item_reference", "id": "x"}), "input[0].type"),
    (items({"type": 3}), "input[0].type"),
    (items({"role": "wizard", "content": "x"}), "input[0].role"),
    (items({"content": "x"}), "input[0].role"),
    (items({"role": "user"}), "input[0].content"),
    (items({"role": "user", "content": "x", "mood": 1}), "input[0].mood"),
    (items({"role": "user", "content": [{"type": "input_image"}]}), "input[0].content[0]"),
    (items({"role": "user", "content": [{"type": "input_text"}]}), "input[0].content[0].text"),
    (items({"type": "function_call", "name": "f", "arguments": "{}"}), "input[0].call_id"),
    (items({"type": "function_call_output", "output": "x"}), "input[0].call_id"),
    (items({"type": "function_call_output", "call_id": "c"}), "input[0].output"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"seed": 2**64}, "seed"),
    ({"include": ["everything"]}, "include[0]"),
    ({"top_logprobs": 2}, "include"),
    ({"top_logprobs": 21, "include": LOGPROBS}, "top_logprobs"),
    ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [TOOL | {"mood": 1}]}, "tools[0].mood"),
    ({"tools": [TOOL | {"output_schema": {}}]}, "tools[0].output_schema"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "sub"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"mood": 1}}, "text.mood"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"previous_response_id": "resp_x"}, "previous_response_id"),
    ({"stream": "yes"}, "stream"),
    ({"messages": []}, "messages"),
]


@pytest.mark.parametrize(("body", "param"), REFUSALS)
async def test_refusals_name_the_field(
    client: httpx.AsyncClient, gateway: Any, body: dict[str, Any], param: str
) -> None:
    await refused(send(client, **body), param)
    assert gateway.requests == [], "nothing reaches the gateway"


async def test_top_logprobs(client: httpx.AsyncClient, gateway: Any) -> None:
    request = await request_of(client, gateway, include=LOGPROBS, top_logprobs=3)
    assert request.sampling.logprobs == 3


@pytest.mark.parametrize(
    ("theirs", "ours"), [("messages", "input"), ("reasoning_effort", "reasoning.effort")]
)
async def test_what_the_gateway_refuses_is_named_as_here(
    client: httpx.AsyncClient, gateway: Any, theirs: str, ours: str
) -> None:
    gateway.refuse = lambda request: InvalidRequest(f"'{theirs}' is wrong.", param=theirs)
    response = await send(client)
    assert response.json()["error"]["message"] == f"'{ours}' is wrong."
    await refused(send(client), ours)


async def test_a_schema_is_a_grammar(client: httpx.AsyncClient, gateway: Any) -> None:
    wanted = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    request = await request_of(client, gateway, text={"format": wanted})
    assert request.grammar is not None
    assert (request.grammar.kind, request.grammar.text) == ("json_schema", '{"type":"object"}')
    assert request.grammar.param.startswith("text.format")
