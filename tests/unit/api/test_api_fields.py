"""Every field in the disposition tables, through HTTP: honoured, advisory or refused as it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai.types
import openai.types.chat
import pytest

from mlx_serving.api import fields
from mlx_serving.types import (
    ChatPrompt,
    GenerateRequest,
    Grammar,
    Priority,
    TextPrompt,
    TokenPrompt,
)

Read = Callable[[GenerateRequest], Any]


def chat_prompt(request: GenerateRequest) -> ChatPrompt:
    assert isinstance(request.prompt, ChatPrompt)
    return request.prompt


SHARED: dict[str, tuple[Any, Read, Any]] = {
    "model": ("small", lambda r: r.model, "small"),
    "adapters": ("fr", lambda r: r.model.rpartition("+")[2], "fr"),
    "n": (3, lambda r: r.n, 3),
    "temperature": (0, lambda r: r.sampling.temperature, 0.0),
    "top_p": (0.25, lambda r: r.sampling.top_p, 0.25),
    "top_k": (40, lambda r: r.sampling.top_k, 40),
    "min_p": (0.05, lambda r: r.sampling.min_p, 0.05),
    "repetition_penalty": (1.3, lambda r: r.sampling.repetition_penalty, 1.3),
    "presence_penalty": (-2, lambda r: r.sampling.presence_penalty, -2.0),
    "frequency_penalty": (2, lambda r: r.sampling.frequency_penalty, 2.0),
    "logit_bias": ({"7": -100, "0": 5.5}, lambda r: r.sampling.logit_bias, {7: -100.0, 0: 5.5}),
    "seed": (2**64 - 1, lambda r: r.seed, 2**64 - 1),
    "stop": (["a", "b"], lambda r: r.stop, ("a", "b")),
    "stop_token_ids": ([2, 3], lambda r: r.sampling.stop_token_ids, (2, 3)),
    "min_tokens": (2, lambda r: r.sampling.min_tokens, 2),
    "ignore_eos": (True, lambda r: r.sampling.ignore_eos, True),
    "include_stop_str_in_output": (True, lambda r: r.include_stop_str, True),
    "priority": ("high", lambda r: r.priority, Priority.HIGH),
    "timeout": (2.5, lambda r: r.timeout_s, 2.5),
    "cache_salt": ("tenant", lambda r: r.cache_salt, "tenant"),
    "max_tokens": (9, lambda r: r.max_tokens, 9),
    "response_format": (
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}},
        lambda r: r.grammar,
        Grammar(kind="json_schema", text='{"type":"null"}'),
    ),
    "structured_outputs": (
        {"json_object": True, "whitespace_pattern": " "},
        lambda r: r.grammar,
        Grammar(kind="json_object", param="structured_outputs.json_object", white_space=" "),
    ),
    "guided_json": (
        '{"type": "null"}',
        lambda r: r.grammar,
        Grammar(kind="json_schema", text='{"type":"null"}', param="guided_json"),
    ),
    "guided_regex": (
        "[a-z]+",
        lambda r: r.grammar,
        Grammar(kind="regex", text="[a-z]+", param="guided_regex"),
    ),
    "guided_choice": (
        ["yes", "no"],
        lambda r: r.grammar,
        Grammar(kind="choice", text='["yes","no"]', param="guided_choice"),
    ),
    "guided_grammar": (
        'start: "a"',
        lambda r: r.grammar,
        Grammar(kind="lark", text='start: "a"', param="guided_grammar"),
    ),
    "grammar": (
        "root ::= [ab]",
        lambda r: r.grammar,
        Grammar(kind="lark", text="start: T0\nT0: /[a-b]/", param="grammar"),
    ),
}
CHAT: dict[str, tuple[Any, Read, Any]] = {
    **SHARED,
    "messages": (
        [{"role": "user", "content": "Yo"}],
        lambda r: [(m.role, m.content) for m in chat_prompt(r).messages],
        [("user", "Yo")],
    ),
    "max_completion_tokens": (8, lambda r: r.max_tokens, 8),
    "logprobs": (True, lambda r: r.sampling.logprobs, 0),
    "chat_template_kwargs": (
        {"enable_thinking": False},
        lambda r: chat_prompt(r).template_kwargs,
        {"enable_thinking": False},
    ),
    "tools": (
        [{"type": "function", "function": {"name": "f", "strict": True}}],
        lambda r: (
            [t["function"]["name"] for t in chat_prompt(r).tools],
            chat_prompt(r).strict_tools,
        ),
        (["f"], ("f",)),
    ),
    "parallel_tool_calls": (False, lambda r: chat_prompt(r).parallel_tool_calls, False),
    "reasoning_effort": ("high", lambda r: chat_prompt(r).reasoning_effort, "high"),
    "add_generation_prompt": (False, lambda r: chat_prompt(r).add_generation_prompt, False),
    "continue_final_message": (
        True,
        lambda r: (chat_prompt(r).continue_final_message, chat_prompt(r).add_generation_prompt),
        (True, False),
    ),
}
COMPLETIONS: dict[str, tuple[Any, Read, Any]] = {
    **SHARED,
    "prompt": ([1, 2, 3], lambda r: r.prompt, TokenPrompt(token_ids=(1, 2, 3))),
    "logprobs": (5, lambda r: r.sampling.logprobs, 5),
    "add_special_tokens": (
        False,
        lambda r: r.prompt,
        TextPrompt(text="Hi", add_special_tokens=False),
    ),
}
ELSEWHERE = {
    "stream": "test_api_shapes.py::test_golden_chat_stream",
    "stream_options": "test_api_shapes.py::test_golden_completion_stream_with_usage",
    "echo": "test_api_shapes.py::test_echo_puts_the_prompt_first",
    "top_logprobs": "test_api_fields.py::test_top_logprobs_come_with_logprobs_only",
    "tool_choice": "../test_tools_http.py::test_required_and_named_calls_are_forced",
}


@pytest.mark.parametrize(
    ("table", "cases"), [(fields.CHAT, CHAT), (fields.COMPLETIONS, COMPLETIONS)]
)
def test_every_honoured_field_has_a_case(table: fields.Table, cases: dict[str, Any]) -> None:
    honoured = {f.name for f in table.values() if f.disposition == "honoured"}
    assert honoured - ELSEWHERE.keys() == cases.keys()


@pytest.mark.parametrize("name", CHAT)
async def test_chat_honours(chat: Any, name: str) -> None:
    value, read, wanted = CHAT[name]
    assert read(await chat.request_of()) != wanted, "the case must differ from the default"
    assert read(await chat.request_of(**{name: value})) == wanted


@pytest.mark.parametrize("name", COMPLETIONS)
async def test_completions_honour(chat: Any, name: str) -> None:
    value, read, wanted = COMPLETIONS[name]
    assert read(await chat.completion_request_of()) != wanted, "the case must differ"
    assert read(await chat.completion_request_of(**{name: value})) == wanted


async def test_top_logprobs_come_with_logprobs_only(chat: Any) -> None:
    assert (await chat.request_of(logprobs=True, top_logprobs=20)).sampling.logprobs == 20
    await refused(chat.post(top_logprobs=2), "top_logprobs")
    await refused(chat.post(top_logprobs=2, logprobs=False), "top_logprobs")


async def test_defaults_are_openais(chat: Any) -> None:
    request = await chat.request_of()
    assert (request.model, request.sampling.temperature, request.sampling.top_p) == ("tiny", 1, 1)
    assert (request.max_tokens, request.seed, request.n, request.stop) == (None, None, 1, ())
    assert request.sampling.logprobs is None
    assert (await chat.completion_request_of()).max_tokens == 16


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
async def test_null_is_the_default_of_every_field(chat: Any, route: str) -> None:
    nulls = {name: None for name in fields.ROUTES[route] if name not in ("messages", "prompt")}
    if route == "/v1/completions":
        assert await chat.completion_request_of(**nulls)
    else:
        assert await chat.request_of(**nulls)


async def refused(answer: Any, param: str | None, code: str | None = None) -> None:
    response = await answer
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code


def of_disposition(disposition: str) -> list[tuple[str, fields.Field]]:
    return [
        (route, field)
        for route in ("/v1/chat/completions", "/v1/completions")
        for field in fields.ROUTES[route].values()
        if field.disposition == disposition
    ]


def send(chat: Any, route: str, **body: Any) -> Any:
    return chat.complete(**body) if route == "/v1/completions" else chat.post(**body)


@pytest.mark.parametrize(("route", "field"), of_disposition("refused"))
async def test_refused_fields_are_named(chat: Any, route: str, field: fields.Field) -> None:
    await refused(
        send(chat, route, **{field.name: {"asks": "for it"}}), field.name, "unsupported_parameter"
    )


@pytest.mark.parametrize(("route", "field"), of_disposition("refused"))
async def test_refused_fields_may_ask_for_nothing(
    chat: Any, route: str, field: fields.Field
) -> None:
    for neutral in (None, *field.neutral):
        assert (await send(chat, route, **{field.name: neutral})).status_code == 200


@pytest.mark.parametrize(("route", "field"), of_disposition("advisory"))
async def test_advisory_fields_are_named_in_a_header(
    chat: Any, route: str, field: fields.Field
) -> None:
    response = await send(chat, route, **{field.name: "anything"})
    assert response.status_code == 200
    assert response.headers["x-mlx-serving-advisory"] == field.name


async def test_no_advisory_fields_no_header(chat: Any) -> None:
    assert "x-mlx-serving-advisory" not in (await chat.post(user=None)).headers
    both = await chat.post(user="u", store=True)
    assert both.headers["x-mlx-serving-advisory"] == "user, store"


@pytest.mark.parametrize(
    ("params", "table"),
    [
        (openai.types.chat.completion_create_params.CompletionCreateParamsBase, fields.CHAT),
        (openai.types.completion_create_params.CompletionCreateParamsBase, fields.COMPLETIONS),
    ],
)
def test_every_field_of_the_openai_client_has_a_disposition(
    params: Any, table: fields.Table
) -> None:
    assert set(params.__annotations__) - table.keys() == set()


async def test_unknown_fields_are_refused_with_a_suggestion(chat: Any) -> None:
    await refused(chat.post(maxtokens=3), "maxtokens", "unknown_parameter")
    assert "max_tokens" in (await chat.post(maxtokens=3)).json()["error"]["message"]
    await refused(chat.post(**{"x" * 50_000: 3}), "x" * 64 + "...", "unknown_parameter")


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CHAT_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": ["Hi"]}, "messages[0]"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "function", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["Hi"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
    ({"messages": [{"role": "assistant", "content": "x", "audio": {}}]}, "messages[0].audio"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
        "messages[0].tool_calls[0].function",
    ),
    (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
        "messages[0].tool_calls",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        "messages[0].content[0].text",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}]},
        "messages[0].content[0].b",
    ),
    (
        {
            "messages": [{"role": "assistant", "tool_calls": [CALL]}],
            "continue_final_message": True,
        },
        "messages[0].content",
    ),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": True}, "n"),
    ({"n": 1.0}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a", 1]}, "stop[1]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "x" * 1025}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"logit_bias": {"dog": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"1": True}}, "logit_bias.1"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"logprobs": 5}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"priority": "urgent"}, "priority"),
    ({"priority": "HIGH"}, "priority"),
    ({"priority": 0.5}, "priority"),
    ({"timeout": 0}, "timeout"),
    ({"timeout": 86401}, "timeout"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"model": ""}, "model"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    (
        {"add_generation_prompt": True, "continue_final_message": True},
        "add_generation_prompt",
    ),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json"),
    ({"guided_json": {"contains": {}}}, "guided_json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", 1]}, "guided_choice"),
    ({"guided_grammar": ""}, "guided_grammar"),
    ({"grammar": 'start: "a"'}, "grammar"),
    ({"grammar": 'root ::= "a"', "guided_regex": "a"}, "grammar"),
    ({"best_of": True}, "best_of"),
]


@pytest.mark.parametrize(("body", "param"), CHAT_REFUSALS)
async def test_chat_refusals_name_the_field(
    chat: Any, gateway: Any, body: dict[str, Any], param: str
) -> None:
    await refused(chat.post(**body), param)
    assert gateway.requests == [], "nothing reaches the gateway"


COMPLETION_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt[1]"),
    ({"prompt": ["a", 1]}, "prompt[1]"),
    ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": [1, -1]}, "prompt[1]"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [[1], []]}, "prompt[1]"),
    ({"prompt": [[1], [2, 0.5]]}, "prompt[1][1]"),
    ({"prompt": [[1], "a"]}, "prompt[1]"),
    ({"prompt": [{}]}, "prompt[0]"),
    ({"prompt": ["a"] * 257}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"echo": True, "max_tokens": 0}, "max_tokens"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"suffix": "end"}, "suffix"),
    ({"messages": []}, "messages"),
]


@pytest.mark.parametrize(("body", "param"), COMPLETION_REFUSALS)
async def test_completion_refusals_name_the_field(
    chat: Any, body: dict[str, Any], param: str
) -> None:
    await refused(chat.complete(**body), param)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", None])
async def test_parts_that_are_no_text_are_named(chat: Any, kind: str | None) -> None:
    parts = [{"type": "text", "text": "What is it?"}, {"type": kind, "x": 1}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    await refused(chat.post(messages=messages), "messages[1].content[1]", "unsupported_parameter")


async def test_messages_become_what_the_template_sees(chat: Any) -> None:
    request = await chat.request_of(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "name": "ann",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ]
    )
    messages = chat_prompt(request).messages
    assert [(m.role, m.content) for m in messages] == [
        ("system", "Be brief."),
        ("user", "a\nb"),
        ("assistant", None),
        ("tool", "2"),
    ]
    assert messages[1].name == "ann"
    assert messages[2].tool_calls == (CALL,)
    assert messages[3].tool_call_id == "c1"


@pytest.mark.parametrize(
    ("priority", "wanted"),
    [
        ("critical", Priority.CRITICAL),
        ("low", Priority.LOW),
        (-10, Priority.CRITICAL),
        (-1, Priority.HIGH),
        (0, Priority.NORMAL),
        (1, Priority.LOW),
    ],
)
async def test_priorities(chat: Any, priority: object, wanted: Priority) -> None:
    assert (await chat.request_of(priority=priority)).priority == wanted


async def test_small_readings(chat: Any) -> None:
    assert (await chat.request_of(top_k=-1)).sampling.top_k == 0
    assert (await chat.request_of(seed=-1)).seed == 2**64 - 1
    assert (await chat.request_of(seed=0)).seed == 0
    assert (await chat.request_of(stop="x")).stop == ("x",)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a", [TextPrompt(text="a")]),
        (["a", "b"], [TextPrompt(text="a"), TextPrompt(text="b")]),
        ([5, 6], [TokenPrompt(token_ids=(5, 6))]),
        ([[5], [6, 7]], [TokenPrompt(token_ids=(5,)), TokenPrompt(token_ids=(6, 7))]),
    ],
)
async def test_prompts(chat: Any, gateway: Any, prompt: Any, wanted: list[Any]) -> None:
    await chat.completion_request_of(prompt=prompt)
    assert [request.prompt for request in gateway.requests] == wanted
    assert len({request.request_id for request in gateway.requests}) == len(wanted)


def test_the_table_prints() -> None:
    text = fields.markdown()
    for table in fields.ROUTES.values():
        for name in table:
            assert f"| `{name}` |" in text


def test_the_document_shows_the_table() -> None:
    document = Path(__file__).parents[3] / "docs" / "api.md"
    assert fields.markdown().rstrip() in document.read_text(), (
        "docs/api.md: paste fields.markdown()"
    )
