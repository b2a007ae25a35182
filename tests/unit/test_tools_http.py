"""Tools and reasoning over HTTP with OpenAI's own client, against a model that says what it is told."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from mlx_serving import Engine, errors
from mlx_serving.api.app import create_app

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Now.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 8},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
USER = [{"role": "user", "content": "Hi"}]
TWO_CALLS = (
    "Ich schaue. 🌦\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln 日", "unit": "C"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)

Serve = Callable[..., AbstractAsyncContextManager[openai.AsyncOpenAI]]


@pytest.fixture
def serve(scripted: Any) -> Serve:
    """A client of a server whose model is made by `scripted`."""

    @contextlib.asynccontextmanager
    async def open_client(*, settings: Any = None, **model: Any) -> AsyncIterator[Any]:
        model.setdefault("context", 4096)
        async with Engine(str(scripted(**model)), supervise=False, **(settings or {})) as engine:
            transport = httpx.ASGITransport(create_app(engine.gateway))
            async with httpx.AsyncClient(transport=transport) as http:
                yield openai.AsyncOpenAI(
                    base_url="http://test/v1", api_key="x", http_client=http, max_retries=0
                )

    return open_client


async def ask(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    fields = {"model": "scripted", "messages": USER, "max_tokens": 600, **fields}
    return await client.chat.completions.create(**fields)


async def streamed(client: openai.AsyncOpenAI, **fields: Any) -> tuple[Any, list[Any]]:
    """The message that the deltas add up to, and the deltas."""
    text, thoughts, calls, deltas, reasons = "", "", [], [], []
    async for chunk in await ask(client, stream=True, **fields):
        (choice,) = chunk.choices
        deltas.append(choice.delta)
        reasons.append(choice.finish_reason)
        text += choice.delta.content or ""
        thoughts += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or ():
            if call.id is not None:
                assert (call.index, call.type) == (len(calls), "function")
                calls.append([call.function.name, ""])
            else:
                assert call.function.name is None
            calls[call.index][1] += call.function.arguments
    assert all(reason is None for reason in reasons[:-1])
    return (text, thoughts, calls, reasons[-1]), deltas


def whole(answer: Any) -> Any:
    (choice,) = answer.choices
    message = choice.message
    calls = [[c.function.name, c.function.arguments] for c in message.tool_calls or ()]
    thoughts = getattr(message, "reasoning_content", None) or ""
    return message.content or "", thoughts, calls, choice.finish_reason


async def test_calls_streamed_and_not(serve: Serve) -> None:
    # A token is a byte, so every character, tag and string is cut everywhere.
    async with serve(text=TWO_CALLS, step_delay_ms=1) as client:
        answer = await ask(client, tools=TOOLS)
        message, deltas = await streamed(client, tools=TOOLS)
    assert (
        whole(answer)
        == message
        == (
            "Ich schaue. 🌦",
            "",
            [["get_weather", '{"city": "Köln 日", "unit": "C"}'], ["now", "{}"]],
            "tool_calls",
        )
    )
    ids = [call.id for call in answer.choices[0].message.tool_calls]
    assert len(set(ids)) == 2 and all(i.startswith("call_") for i in ids)
    pieces = [c for d in deltas for c in d.tool_calls or () if c.index == 0]
    assert len(pieces) > 3, "arguments stream"
    assert not any("<" in (d.content or "") for d in deltas)


async def test_no_content_is_null(serve: Serve) -> None:
    async with serve(text='<tool_call>{"name": "now", "arguments": {}}</tool_call>') as client:
        message = (await ask(client, tools=TOOLS)).choices[0].message
    assert message.content is None and message.tool_calls[0].function.arguments == "{}"


async def test_choices_are_parsed_apart(serve: Serve) -> None:
    async with serve(text=TWO_CALLS) as client:
        answer = await ask(client, tools=TOOLS, n=2, logprobs=True)
    for choice in answer.choices:
        assert len(choice.message.tool_calls) == 2 and choice.finish_reason == "tool_calls"
        # They are of tokens, also of those that became calls, and of the end of sequence.
        assert len(choice.logprobs.content) == len(TWO_CALLS.encode()) + 1


async def test_plain_answers_and_what_resembles_markup(serve: Serve) -> None:
    text = "a <b> {\n} [TOOL_CALLS] <tool_calls> </tool_call>\n <tool_call> I think \n"
    async with serve(text=text) as client:
        expected = (text, "", [], "stop")
        assert whole(await ask(client, tools=TOOLS)) == expected
        assert (await streamed(client, tools=TOOLS))[0] == expected
        assert whole(await ask(client)) == expected


async def test_without_tools_or_with_none_markup_is_text(serve: Serve) -> None:
    async with serve(text=TWO_CALLS) as client:
        for fields in ({}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}):
            assert whole(await ask(client, **fields)) == (TWO_CALLS, "", [], "stop")


async def test_length_cuts_a_call(serve: Serve) -> None:
    async with serve(text=TWO_CALLS) as client:
        _, _, calls, reason = whole(await ask(client, tools=TOOLS, max_tokens=90))
    assert reason == "length"
    assert calls[0][0] == "get_weather" and calls[0][1].startswith('{"city": "K')


async def test_one_call_when_not_parallel(serve: Serve) -> None:
    async with serve(text=TWO_CALLS) as client:
        fields = {"tools": TOOLS, "parallel_tool_calls": False}
        answer = await ask(client, **fields)
        message, _ = await streamed(client, **fields)
    assert whole(answer) == message
    assert [name for name, _ in message[2]] == ["get_weather"] and message[3] == "tool_calls"
    # It ends with the token that completes the arguments, however rows came.
    cut = TWO_CALLS.index('"C"}') + len('"C"}')
    assert answer.usage.completion_tokens == len(TWO_CALLS[:cut].encode())


async def test_the_client_can_answer_calls(serve: Serve) -> None:
    async with serve(mode="echo") as client:
        call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
        history = [
            *USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        ]
        text = (
            (await ask(client, tools=TOOLS, messages=history, max_tokens=2000))
            .choices[0]
            .message.content
        )
    assert "<tool_response>\nnoon\n</tool_response>" in text
    assert '"name": "get_weather"' in text, "the model sees the tools"


THINKING = "{{ messages[0].content }}{{ tools }}{# <tool_call> </think> #}<think>"


async def test_reasoning_that_the_template_opens(serve: Serve) -> None:
    text = "Hm, ü.\n</think>\n\nJa. " + TWO_CALLS
    async with serve(text=text, chat_template=THINKING + "</think>") as client:
        # The template's last line is markup here, so that nothing has been opened.
        assert whole(await ask(client))[1] == ""
    async with serve(name="two", text=text, chat_template=THINKING) as client:
        plain = whole(await ask(client, model="two"))
        called, deltas = await streamed(client, model="two", tools=TOOLS)
    assert plain == ("Ja. " + TWO_CALLS, "Hm, ü.", [], "stop")
    assert called[:2] == ("Ja. Ich schaue. 🌦", "Hm, ü.") and len(called[2]) == 2
    assert not any(d.content and getattr(d, "reasoning_content", None) for d in deltas)


async def test_reasoning_effort_reaches_the_template_or_is_refused(serve: Serve) -> None:
    async with serve(mode="echo", chat_template="<think>{{ reasoning_effort }}") as client:
        answer = whole(await ask(client, reasoning_effort="low", max_tokens=64))
    assert answer[1] == "low"
    async with serve(name="two", text="x") as client:
        with pytest.raises(openai.BadRequestError) as error:
            await ask(client, model="two", reasoning_effort="low")
    assert error.value.param == "reasoning_effort"


async def test_markup_of_special_tokens_is_parsed_and_the_rest_hidden(serve: Serve) -> None:
    specials = ("[TOOL_CALLS]", "[ARGS]", "[OTHER]")
    text = 'So[OTHER]. [TOOL_CALLS]now[ARGS]{"a": "é"}<|im_end|>'
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}[TOOL_CALLS][ARGS]"
    async with serve(text=text, specials=specials, chat_template=template) as client:
        assert whole(await ask(client, tools=TOOLS)) == (
            "So.",
            "",
            [["now", '{"a": "é"}']],
            "tool_calls",
        )
        assert whole(await ask(client)) == ('So. now{"a": "é"}', "", [], "stop")


async def test_parsers_can_be_named(serve: Serve) -> None:
    text = "<think>Hm</think>[now()]"
    settings = {"tool_parser": "llama_pythonic", "reasoning_parser": "think"}
    async with serve(text=text, settings=settings) as client:
        assert whole(await ask(client, tools=TOOLS)) == ("", "Hm", [["now", "{}"]], "tool_calls")
    none = {"tool_parser": "none", "reasoning_parser": "none"}
    async with serve(name="two", text=text, settings=none) as client:
        assert whole(await ask(client, model="two", tools=TOOLS))[0] == text


@pytest.mark.parametrize("seed", [1, 2])
async def test_required_and_named_calls_are_forced(serve: Serve, seed: int) -> None:
    async with serve(mode="hash") as client:
        required = whole(await ask(client, tools=TOOLS, tool_choice="required", seed=seed))
        named = {"type": "function", "function": {"name": "get_weather"}}
        forced = whole(await ask(client, tools=TOOLS, tool_choice=named, seed=seed))
    for text, _, calls, _ in (required, forced):
        assert text == "" and calls
        for name, arguments in calls:
            if name == "get_weather":
                jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])
            else:
                assert (name, json.loads(arguments)) == ("now", {})
    assert [name for name, _ in forced[2]] == ["get_weather"] and forced[3] == "tool_calls"


@pytest.mark.parametrize(
    "parser",
    [
        "deepseek",
        "deepseek_v32",
        "glm",
        "harmony",
        "kimi",
        "llama3_json",
        "minimax",
        "mistral",
        "qwen3_coder",
    ],
)
async def test_forced_calls_are_read_again(serve: Serve, parser: str) -> None:
    schema = {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}, "days": {"enum": [1, 2]}},
        "required": ["unit"],
    }
    tools = [NOW, {"type": "function", "function": {"name": "get", "parameters": schema}}]
    named = {"type": "function", "function": {"name": "get"}}
    async with serve(mode="hash", settings={"tool_parser": parser}) as client:
        for choice in ("required", named):
            text, _, calls, _ = whole(
                await ask(client, tools=tools, tool_choice=choice, seed=3, max_tokens=1500)
            )
            assert text == "" and calls
            for name, arguments in calls[:-1] if choice == "required" else calls:
                jsonschema.validate(json.loads(arguments), schema if name == "get" else {})


async def test_strict_functions_hold_a_call_to_its_schema(serve: Serve) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    wrong = '<tool_call>\n{"name": "get_weather", "arguments": {"city": 5}}\n</tool_call>'
    async with serve(text="Ok. " + wrong) as client:
        loose = whole(await ask(client, tools=TOOLS))
        held = whole(await ask(client, tools=[strict, NOW]))
    assert loose[2] == [["get_weather", '{"city": 5}']]
    assert held[0].startswith("Ok.")
    jsonschema.validate(json.loads(held[2][0][1]), WEATHER["function"]["parameters"])


@pytest.mark.parametrize("seed", [1, 2])
async def test_reasoning_comes_before_a_constrained_answer(serve: Serve, seed: int) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    formats = [
        {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        {"type": "json_object"},
    ]
    async with serve(text="Hm, ü.</think>No JSON", chat_template=THINKING) as client:
        for form in formats:
            answer = whole(await ask(client, response_format=form, seed=seed, max_tokens=400))
            assert answer[1] == "Hm, ü."
            if form is formats[0]:
                jsonschema.validate(json.loads(answer[0]), schema)
            assert answer[0].startswith("{")
        extra = {"structured_outputs": {"choice": ["yes", "no"]}}
        answer = whole(await ask(client, extra_body=extra, seed=seed))
        assert answer[0] in ("yes", "no") and answer[1] == "Hm, ü."
        extra = {"structured_outputs": {"grammar": 'start: "a" x\nx: "b"'}}
        assert whole(await ask(client, extra_body=extra))[:2] == ("ab", "Hm, ü.")
        impossible = {"type": "json_schema", "json_schema": {"name": "a", "schema": False}}
        with pytest.raises(openai.BadRequestError):
            await ask(client, response_format=impossible)


def function(**fields: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f", **fields}}]


DEEP: dict[str, Any] = {}
for _ in range(70):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [7]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": function(name="a b")}, "tools[0].function.name"),
    ({"tools": function(name="")}, "tools[0].function.name"),
    ({"tools": [NOW, NOW]}, "tools[1].function.name"),
    ({"tools": function(colour=1)}, "tools[0].function.colour"),
    ({"tools": function(strict="yes")}, "tools[0].function.strict"),
    ({"tools": function(description=1)}, "tools[0].function.description"),
    ({"tools": function(parameters=[])}, "tools[0].function.parameters"),
    ({"tools": function(parameters={"type": "array"})}, "tools[0].function.parameters"),
    ({"tools": function(parameters=DEEP)}, "tools[0].function.parameters"),
    ({"tools": function(parameters={"title": "x" * 70_000})}, "tools[0].function.parameters"),
    ({"tools": [NOW] * 129}, "tools"),
    (
        {"tools": function(strict=True, parameters={"type": "object", "not": {}})},
        "tools[0].function.parameters",
    ),
    ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice.function.name",
    ),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
    ({"reasoning_effort": "enormous"}, "reasoning_effort"),
]


async def test_refusals_name_the_field(serve: Serve) -> None:
    async with serve(text="x") as client:
        for fields, param in REFUSED:
            with pytest.raises(openai.BadRequestError) as error:
                await ask(client, **fields)
            assert error.value.param == param, fields


async def test_what_a_model_cannot_do_is_refused(serve: Serve) -> None:
    async with serve(
        text="x", chat_template="{{ messages }}{{ tools }}<|tool_call><tool_call|>"
    ) as client:
        for fields, param in (
            ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
            ({"tools": function(strict=True)}, "tools"),
        ):
            with pytest.raises(openai.BadRequestError) as error:
                await ask(client, **fields)
            assert error.value.param == param


@pytest.mark.parametrize("thinks", [True, False])
async def test_ollamas_think_needs_a_model_that_thinks(scripted: Any, thinks: bool) -> None:
    folder = scripted(text="Hm.</think>Ja.", chat_template=THINKING if thinks else "{{ messages }}")
    async with Engine(str(folder), supervise=False) as engine:
        transport = httpx.ASGITransport(create_app(engine.gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            body = {"model": "scripted", "messages": USER, "stream": False}
            answers = [
                await http.post("/api/chat", json=body | {"think": think})
                for think in (True, "low", False)
            ]
    if thinks:
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        return
    told = {"error": '"scripted" does not support thinking', "param": "think"}
    assert [answer.status_code for answer in answers] == [400, 400, 200]
    assert all(told.items() <= answer.json().items() for answer in answers[:2])


async def test_the_engine_tells_calls_and_reasoning(scripted: Any) -> None:
    folder = scripted(text="<think>Hm</think>" + TWO_CALLS, context=4096)
    async with Engine(str(folder), supervise=False, reasoning_parser="think") as engine:
        done = await engine.chat("Hi", tools=TOOLS, max_tokens=600)
        chunks = [c async for c in engine.generate(USER, tools=TOOLS, max_tokens=600)]
        with pytest.raises(errors.InvalidRequest) as error:
            await engine.complete("Hi", tools=TOOLS)
    assert (done.text, done.reasoning) == ("Ich schaue. 🌦", "Hm")
    assert [call.name for call in done.tool_calls] == ["get_weather", "now"]
    assert json.loads(done.tool_calls[0].arguments) == {"city": "Köln 日", "unit": "C"}
    assert "".join(c.reasoning for c in chunks) == "Hm"
    assert sum(len(c.tool_calls) for c in chunks) >= 2
    assert chunks[-1].finish_reason == "tool_calls"
    assert error.value.param == "tools"
