"""Every field of Anthropic's routes, through HTTP: honoured, advisory or refused as the tables say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import anthropic.types
import httpx
import pytest

from mlx_serving.api import anthropic_fields as fields
from mlx_serving.types import ChatPrompt, GenerateRequest, Grammar, Message

Read = Callable[[GenerateRequest], Any]
MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
MINIMUM = {"max_tokens": 64, "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}
TEMPLATE_TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
}


def prompt_of(request: GenerateRequest) -> ChatPrompt:
    assert isinstance(request.prompt, ChatPrompt)
    return request.prompt


HONOURED: dict[str, tuple[Any, Read, Any]] = {
    "model": ("small", lambda r: r.model, "small"),
    "messages": (
        [{"role": "user", "content": "Yo"}],
        lambda r: [(m.role, m.content) for m in prompt_of(r).messages],
        [("user", "Yo")],
    ),
    "system": ("Be brief.", lambda r: prompt_of(r).messages[0].content, "Be brief."),
    "tools": ([TOOL], lambda r: prompt_of(r).tools, (TEMPLATE_TOOL,)),
    "thinking": (
        {"type": "adaptive"},
        lambda r: prompt_of(r).template_kwargs,
        {"enable_thinking": True},
    ),
    "output_config": (
        {"effort": "max"},
        lambda r: prompt_of(r).template_kwargs,
        {"reasoning_effort": "high"},
    ),
    "max_tokens": (9, lambda r: r.max_tokens, 9),
    "stop_sequences": (["a", "b"], lambda r: r.stop, ("a", "b")),
    "temperature": (0, lambda r: r.sampling.temperature, 0.0),
    "top_p": (0.25, lambda r: r.sampling.top_p, 0.25),
    "top_k": (40, lambda r: r.sampling.top_k, 40),
    "seed": (-1, lambda r: r.seed, 2**64 - 1),
}
ELSEWHERE = {
    "stream": "test_anthropic_shapes.py::test_golden_stream",
    "tool_choice": "test_anthropic_fields.py::test_choices_of_tools",
    "context_management": "test_anthropic_fields.py::test_edits_that_keep_everything",
}


async def send(client: httpx.AsyncClient, route: str = MESSAGES, **body: Any) -> httpx.Response:
    minimum = MINIMUM if route == MESSAGES else {"messages": MINIMUM["messages"]}
    whole = {k: v for k, v in {**minimum, **body}.items() if v is not ...}
    return await client.post(route, json=whole, headers={"anthropic-version": "2023-06-01"})


async def request_of(client: httpx.AsyncClient, gateway: Any, **body: Any) -> GenerateRequest:
    response = await send(client, **body)
    assert response.status_code == 200, response.text
    request: GenerateRequest = gateway.requests[-1]
    return request


async def refused(answer: Any, param: str, code: str | None = None) -> None:
    response = await answer
    assert response.status_code == 400, response.text
    body = response.json()
    assert body["type"] == "error"
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == param
    if code is not None:
        assert body["error"]["code"] == code


def test_every_honoured_field_has_a_case() -> None:
    honoured = {f.name for f in fields.MESSAGES.values() if f.disposition == "honoured"}
    assert honoured - ELSEWHERE.keys() == HONOURED.keys()


@pytest.mark.parametrize("name", HONOURED)
async def test_honoured(client: httpx.AsyncClient, gateway: Any, name: str) -> None:
    value, read, wanted = HONOURED[name]
    assert read(await request_of(client, gateway)) != wanted, "the case must differ"
    assert read(await request_of(client, gateway, **{name: value})) == wanted


@pytest.mark.parametrize("name", ["messages", "system", "model", "tools", "thinking"])
async def test_counting_sees_the_same_prompt(
    client: httpx.AsyncClient, gateway: Any, name: str
) -> None:
    value = HONOURED[name][0]
    request = await request_of(client, gateway, **{name: value})
    response = await send(client, COUNT, **{name: value})
    assert gateway.prompts == [(request.model, request.prompt)]
    text = "".join(m.content or "" for m in prompt_of(request).messages)
    assert response.json() == {"input_tokens": len(text)}


def of_disposition(disposition: str) -> list[tuple[str, str, Any]]:
    return [
        (route, field.name, field)
        for route in (MESSAGES, COUNT)
        for field in fields.ROUTES[route].values()
        if field.disposition == disposition
    ]


@pytest.mark.parametrize(("route", "name", "field"), of_disposition("refused"))
async def test_refused_fields_are_named(
    client: httpx.AsyncClient, route: str, name: str, field: Any
) -> None:
    await refused(send(client, route, **{name: {"asks": "for it"}}), name, "unsupported_parameter")
    for neutral in (None, *field.neutral):
        assert (await send(client, route, **{name: neutral})).status_code == 200


@pytest.mark.parametrize(("route", "name", "field"), of_disposition("advisory"))
async def test_advisory_fields_are_named_in_a_header(
    client: httpx.AsyncClient, route: str, name: str, field: Any
) -> None:
    response = await send(client, route, **{name: {"any": "thing"}})
    assert response.status_code == 200
    assert response.headers["x-mlx-serving-advisory"] == name


async def test_nested_advisory_fields_are_named(client: httpx.AsyncClient) -> None:
    cached = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    response = await send(
        client,
        messages=[{"role": "user", "content": [cached, cached]}],
        thinking={"type": "enabled", "budget_tokens": 1024},
        tools=[TOOL | {"eager_input_streaming": True}],
    )
    named = response.headers["x-mlx-serving-advisory"]
    assert named == "thinking.budget_tokens, tools[0].eager_input_streaming, cache_control"


@pytest.mark.parametrize(
    ("params", "table"),
    [
        (
            anthropic.types.message_create_params.MessageCreateParamsBase,
            fields.MESSAGES.keys() | {"stream"},
        ),
        (anthropic.types.MessageCountTokensParams, fields.COUNT_TOKENS.keys()),
        (anthropic.types.ToolParam, fields.TOOL.keys()),
        (anthropic.types.ThinkingConfigEnabledParam, fields.THINKING.keys()),
        (anthropic.types.ToolChoiceToolParam, fields.TOOL_CHOICE.keys()),
        (anthropic.types.OutputConfigParam, fields.OUTPUT_CONFIG.keys()),
        (anthropic.types.JSONOutputFormatParam, fields.FORMAT.keys()),
        (anthropic.types.MessageParam, fields.MESSAGE.keys()),
        (anthropic.types.TextBlockParam, fields.BLOCKS["text"].keys()),
        (anthropic.types.ThinkingBlockParam, fields.BLOCKS["thinking"].keys()),
        (anthropic.types.RedactedThinkingBlockParam, fields.BLOCKS["redacted_thinking"].keys()),
        (anthropic.types.ToolUseBlockParam, fields.BLOCKS["tool_use"].keys()),
        (anthropic.types.ToolResultBlockParam, fields.BLOCKS["tool_result"].keys()),
    ],
)
def test_every_field_of_the_client_has_a_disposition(params: Any, table: set[str]) -> None:
    kinds = get_args(params) or (params,)
    assert {name for kind in kinds for name in kind.__annotations__} - table == set()


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": ...}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": ...}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "content": ""}]}, "messages[0].content"),
    (user({"type": "image", "source": {}}), "messages[0].content[0]"),
    (user({"text": "x"}), "messages[0].content[0].type"),
    (user({"type": "text", "text": 3}), "messages[0].content[0].text"),
    (user({"type": "text", "text": "x", "mood": 1}), "messages[0].content[0].mood"),
    (user({"type": "thinking", "thinking": "x"}), "messages[0].content[0]"),
    (user({"type": "tool_result", "content": "x"}), "messages[0].content[0].tool_use_id"),
    (
        user({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}),
        "messages[0].content[0].content[0]",
    ),
    (
        user({"type": "tool_result", "tool_use_id": "a", "content": 3}),
        "messages[0].content[0].content",
    ),
    (
        user({"type": "tool_result", "tool_use_id": "a", "is_error": "no"}),
        "messages[0].content[0].is_error",
    ),
    ({"system": 3}, "system"),
    ({"system": [{"type": "image"}]}, "system[0]"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [TOOL | {"strict": 1}]}, "tools[0].strict"),
    ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name"),
    ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
    ({"tools": [TOOL | {"mood": 1}]}, "tools[0].mood"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "sub"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "auto", "x": 1}}, "tool_choice.x"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"thinking": {"type": "enabled", "x": 1}}, "thinking.x"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"output_config": {"format": {"type": "regex"}}}, "output_config.format.type"),
    ({"output_config": {"effort": "extreme"}}, "output_config.effort"),
    ({"context_management": {"edits": [{"type": "clear"}]}}, "context_management.edits[0]"),
    ({"context_management": {"other": []}}, "context_management.other"),
    ({"stop_sequences": ["a", ""]}, "stop_sequences[1]"),
    ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"seed": 2**64}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"maxtokens": 3}, "maxtokens"),
]


@pytest.mark.parametrize(("body", "param"), REFUSALS)
async def test_refusals_name_the_field(
    client: httpx.AsyncClient, gateway: Any, body: dict[str, Any], param: str
) -> None:
    await refused(send(client, **body), param)
    assert gateway.requests == [], "nothing reaches the gateway"


async def test_turns_become_what_the_template_sees(client: httpx.AsyncClient, gateway: Any) -> None:
    request = await request_of(
        client,
        gateway,
        system=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Add 1 and 2."}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Use it.", "signature": "s"},
                    {"type": "redacted_thinking", "data": "zzz"},
                    {"type": "tool_use", "id": "t1", "name": "add", "input": {"x": [1, 2]}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "3"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "t2",
                        "is_error": True,
                        "content": [{"type": "text", "text": "no"}],
                    },
                    {"type": "text", "text": "And?"},
                ],
            },
        ],
    )
    prompt = prompt_of(request)
    function = {"name": "add", "arguments": '{"x":[1,2]}'}
    assert prompt.messages == (
        Message(role="system", content="a\nb"),
        Message(role="user", content="Add 1 and 2."),
        Message(
            role="assistant",
            reasoning_content="Use it.",
            tool_calls=({"id": "t1", "type": "function", "function": function},),
        ),
        Message(role="tool", content="3", tool_call_id="t1"),
        Message(role="tool", content="Error: no", tool_call_id="t2"),
        Message(role="user", content="And?"),
    )
    assert prompt.add_generation_prompt and not prompt.continue_final_message


async def test_an_assistants_last_turn_is_continued(
    client: httpx.AsyncClient, gateway: Any
) -> None:
    turns = [*MINIMUM["messages"], {"role": "assistant", "content": "The answer is ("}]
    prompt = prompt_of(await request_of(client, gateway, messages=turns))
    assert (prompt.continue_final_message, prompt.add_generation_prompt) == (True, False)


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ({"type": "auto"}, (1, "auto", True)),
        ({"type": "any", "disable_parallel_tool_use": True}, (1, "required", False)),
        ({"type": "tool", "name": "add"}, (1, "=add", True)),
        ({"type": "none"}, (0, "auto", True)),
    ],
)
async def test_choices_of_tools(
    client: httpx.AsyncClient, gateway: Any, choice: Any, wanted: Any
) -> None:
    prompt = prompt_of(await request_of(client, gateway, tools=[TOOL], tool_choice=choice))
    assert (len(prompt.tools), prompt.tool_choice, prompt.parallel_tool_calls) == wanted


async def test_strict_tools(client: httpx.AsyncClient, gateway: Any) -> None:
    request = await request_of(client, gateway, tools=[TOOL | {"strict": True}])
    assert prompt_of(request).strict_tools == ("add",)


async def test_edits_that_keep_everything(client: httpx.AsyncClient, gateway: Any) -> None:
    edits = [{"type": "clear_thinking_20251015", "keep": "all"}]
    assert await request_of(client, gateway, context_management={"edits": edits})


async def test_a_format_is_a_grammar(client: httpx.AsyncClient, gateway: Any) -> None:
    wanted = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    request = await request_of(client, gateway, output_config=wanted)
    param = "output_config.format.schema"
    assert request.grammar == Grammar(kind="json_schema", text='{"type":"object"}', param=param)


BILLING = "x-anthropic-billing-header: cc_version=2.1; cch=%s;"


@pytest.mark.parametrize("shape", ["block", "line", "first line of a block"])
async def test_claude_codes_billing_header_is_no_prompt(
    client: httpx.AsyncClient, gateway: Any, shape: str
) -> None:
    def system(cch: str) -> Any:
        billing = BILLING % cch
        if shape == "block":
            return [{"type": "text", "text": billing}, {"type": "text", "text": "You are x."}]
        text = f"{billing}\nYou are x."
        return text if shape == "line" else [{"type": "text", "text": text}]

    prompts = [prompt_of(await request_of(client, gateway, system=system(c))) for c in "ab"]
    assert prompts[0] == prompts[1]
    assert prompts[0].messages[0].content == "You are x."
    kept = prompt_of(await request_of(client, gateway, system=f"You are x.\n{BILLING}"))
    assert "x-anthropic-billing-header" in (kept.messages[0].content or "")
