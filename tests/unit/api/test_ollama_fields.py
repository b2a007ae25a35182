"""Every field of Ollama's routes, through HTTP: honoured, advisory or refused as the tables say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import ollama
import pytest

from mlx_serving.api import ollama_fields as fields
from mlx_serving.types import ChatPrompt, GenerateRequest, Grammar, Message, TextPrompt

Read = Callable[[GenerateRequest], Any]
CHAT, GENERATE = "/api/chat", "/api/generate"
MINIMUM: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    GENERATE: {"prompt": "Hi"},
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def prompt_of(request: GenerateRequest) -> ChatPrompt:
    assert isinstance(request.prompt, ChatPrompt)
    return request.prompt


def texts(request: GenerateRequest) -> list[tuple[str, str | None]]:
    return [(m.role, m.content) for m in prompt_of(request).messages]


SHARED: dict[str, tuple[Any, Read, Any]] = {
    "keep_alive": ("5m", lambda r: r.keep_alive_s, 300.0),
    "model": ("org/big:4bit", lambda r: r.model, "org/big:4bit"),
    "format": ("json", lambda r: r.grammar, Grammar(kind="json_object", param="format")),
    "options": ({"seed": 3}, lambda r: r.seed, 3),
    "think": (
        "low",
        lambda r: prompt_of(r).template_kwargs,
        {"enable_thinking": True, "reasoning_effort": "low"},
    ),
    "logprobs": (True, lambda r: r.sampling.logprobs, 0),
}
HONOURED: dict[str, dict[str, tuple[Any, Read, Any]]] = {
    CHAT: {
        **SHARED,
        "messages": ([{"role": "user", "content": "Yo"}], texts, [("user", "Yo")]),
        "tools": ([TOOL], lambda r: prompt_of(r).tools, (TOOL,)),
    },
    GENERATE: {
        **SHARED,
        "prompt": ("Yo", texts, [("user", "Yo")]),
        "system": ("Be brief.", texts, [("system", "Be brief."), ("user", "Hi")]),
        "raw": (True, lambda r: r.prompt, TextPrompt(text="Hi")),
    },
}
ELSEWHERE = {
    "stream": "test_ollama_shapes.py::test_golden_chat",
    "top_logprobs": "test_ollama_fields.py::test_schemas_and_logprobs",
}
OPTIONS: dict[str, tuple[Any, Read, Any]] = {
    "num_predict": (9, lambda r: r.max_tokens, 9),
    "temperature": (0, lambda r: r.sampling.temperature, 0.0),
    "top_k": (7, lambda r: r.sampling.top_k, 7),
    "top_p": (0.25, lambda r: r.sampling.top_p, 0.25),
    "min_p": (0.05, lambda r: r.sampling.min_p, 0.05),
    "seed": (5, lambda r: r.seed, 5),
    "stop": (["a", "b"], lambda r: r.stop, ("a", "b")),
    "repeat_penalty": (1.3, lambda r: r.sampling.repetition_penalty, 1.3),
    "repeat_last_n": (9, lambda r: r.sampling.penalty_window, 9),
    "presence_penalty": (-2, lambda r: r.sampling.presence_penalty, -2.0),
    "frequency_penalty": (2, lambda r: r.sampling.frequency_penalty, 2.0),
}


@pytest.mark.parametrize(
    ("last_n", "wanted"), [(None, (1.3, 64)), (-1, (1.3, None)), (0, (1.0, None))]
)
async def test_how_far_penalties_look_back(
    client: httpx.AsyncClient, gateway: Any, last_n: int | None, wanted: tuple[float, int | None]
) -> None:
    """As Ollama has it: 64 tokens unless told otherwise, 0 for none."""
    options = {"repeat_penalty": 1.3, "repeat_last_n": last_n}
    sampling = (await request_of(client, gateway, CHAT, options=options)).sampling
    assert (sampling.repetition_penalty, sampling.penalty_window) == wanted


async def send(client: httpx.AsyncClient, route: str, **body: Any) -> httpx.Response:
    return await client.post(route, json={**MINIMUM[route], "stream": False, **body})


async def request_of(
    client: httpx.AsyncClient, gateway: Any, route: str, **body: Any
) -> GenerateRequest:
    response = await send(client, route, **body)
    assert response.status_code == 200, response.text
    request: GenerateRequest = gateway.requests[-1]
    return request


async def refused(answer: Any, param: str, code: str | None = None) -> None:
    response = await answer
    assert response.status_code == 400, response.text
    body = response.json()
    assert isinstance(body["error"], str)
    assert body["param"] == param
    if code is not None:
        assert body["code"] == code


@pytest.mark.parametrize("route", [CHAT, GENERATE])
def test_every_honoured_field_has_a_case(route: str) -> None:
    honoured = {f.name for f in fields.ROUTES[route].values() if f.disposition == "honoured"}
    assert honoured - ELSEWHERE.keys() == HONOURED[route].keys()
    options = {f.name for f in fields.OPTIONS.values() if f.disposition == "honoured"}
    assert options == OPTIONS.keys()


@pytest.mark.parametrize(("route", "name"), [(r, n) for r in HONOURED for n in HONOURED[r]])
async def test_honoured(client: httpx.AsyncClient, gateway: Any, route: str, name: str) -> None:
    value, read, wanted = HONOURED[route][name]
    assert read(await request_of(client, gateway, route)) != wanted, "the case must differ"
    assert read(await request_of(client, gateway, route, **{name: value})) == wanted


@pytest.mark.parametrize("route", [CHAT, GENERATE])
@pytest.mark.parametrize("name", OPTIONS)
async def test_options_honoured(
    client: httpx.AsyncClient, gateway: Any, route: str, name: str
) -> None:
    value, read, wanted = OPTIONS[name]
    assert read(await request_of(client, gateway, route)) != wanted, "the case must differ"
    assert read(await request_of(client, gateway, route, options={name: value})) == wanted


async def test_defaults_are_ollamas(client: httpx.AsyncClient, gateway: Any) -> None:
    request = await request_of(client, gateway, CHAT)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.8, 40, 0.9)
    assert (request.max_tokens, request.seed, request.grammar) == (None, None, None)
    for nothing in ({"num_predict": -1}, {"num_predict": -2}, {"seed": -1}):
        request = await request_of(client, gateway, CHAT, options=nothing)
        assert (request.max_tokens, request.seed) == (None, None)


@pytest.mark.parametrize("route", [CHAT, GENERATE])
async def test_null_is_the_default_of_every_field(client: httpx.AsyncClient, route: str) -> None:
    nulls: dict[str, Any] = {n: None for n in fields.ROUTES[route] if n not in MINIMUM[route]}
    assert (await send(client, route, **nulls)).status_code == 200
    response = await send(client, route, options=dict.fromkeys(fields.OPTIONS))
    assert response.status_code == 200
    assert "x-mlx-serving-advisory" not in response.headers


def of_disposition(disposition: str) -> list[tuple[str, Any]]:
    return [
        (route, field)
        for route in (CHAT, GENERATE)
        for field in fields.ROUTES[route].values()
        if field.disposition == disposition
    ]


@pytest.mark.parametrize(("route", "field"), of_disposition("refused"))
async def test_refused_fields_are_named(client: httpx.AsyncClient, route: str, field: Any) -> None:
    await refused(send(client, route, **{field.name: {"a": 1}}), field.name)
    for neutral in (None, *field.neutral):
        assert (await send(client, route, **{field.name: neutral})).status_code == 200


@pytest.mark.parametrize(
    "field", [f for f in fields.OPTIONS.values() if f.disposition != "honoured"]
)
async def test_other_options_are_named(client: httpx.AsyncClient, field: Any) -> None:
    answer = send(client, CHAT, options={field.name: 12345})
    at = f"options.{field.name}"
    if field.disposition == "refused":
        await refused(answer, at, "unsupported_parameter")
        for neutral in field.neutral:
            assert (await send(client, CHAT, options={field.name: neutral})).status_code == 200
    else:
        assert (await answer).headers["x-mlx-serving-advisory"] == at


@pytest.mark.parametrize(
    ("keep_alive", "seconds"),
    [
        ("5m", 300),
        ("1h30m", 5400),
        ("1m0.5s", 60.5),
        ("-1", -1),
        ("-1m", -60),
        ("250ms", 0.25),
        (-1, -1),
        (0, 0),
        (300, 300),
        (2.5, 2.5),
    ],
)
async def test_keep_alive_is_a_duration(
    client: httpx.AsyncClient, gateway: Any, keep_alive: Any, seconds: float
) -> None:
    response = await send(client, CHAT, keep_alive=keep_alive)
    assert response.status_code == 200
    assert gateway.requests[-1].keep_alive_s == seconds


@pytest.mark.parametrize(
    ("params", "table"),
    [
        (ollama._types.ChatRequest, fields.CHAT),
        (ollama._types.GenerateRequest, fields.GENERATE),
        (ollama.Options, fields.OPTIONS),
        (ollama.Message, fields.MESSAGE),
    ],
)
def test_every_field_of_the_client_has_a_disposition(params: Any, table: Any) -> None:
    assert set(params.model_fields) - table.keys() == set()


CHAT_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "messages[0].images"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": "x",
                    "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
                }
            ]
        },
        "messages[0].tool_calls",
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
                }
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "web", "function": {"name": "x"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"format": "xml"}, "format"),
    ({"format": 3}, "format"),
    ({"think": "extreme"}, "think"),
    ({"keep_alive": "soon"}, "keep_alive"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"options": {"temperature": 3}}, "options.temperature"),
    ({"options": {"num_predict": 0}}, "options.num_predict"),
    ({"options": {"num_predict": -3}}, "options.num_predict"),
    ({"options": {"top_k": -1}}, "options.top_k"),
    ({"options": {"seed": 2**64}}, "options.seed"),
    ({"options": {"stop": ["a", ""]}}, "options.stop[1]"),
    ({"options": {"temprature": 1}}, "options.temprature"),
    ({"options": []}, "options"),
    ({"stream": 1}, "stream"),
    ({"max_tokens": 3}, "max_tokens"),
]


@pytest.mark.parametrize(("body", "param"), CHAT_REFUSALS)
async def test_refusals_name_the_field(
    client: httpx.AsyncClient, gateway: Any, body: dict[str, Any], param: str
) -> None:
    await refused(send(client, CHAT, **body), param)
    assert gateway.requests == [], "nothing reaches the gateway"


async def test_a_raw_prompt_has_no_system(client: httpx.AsyncClient) -> None:
    await refused(send(client, GENERATE, raw=True, system="x"), "system")
    await refused(send(client, GENERATE, raw=True, think=True), "think")
    await refused(send(client, GENERATE, suffix="x"), "suffix")


async def test_names_may_have_a_tag(client: httpx.AsyncClient, gateway: Any) -> None:
    for name in ("tiny:latest", "small:latest", "small"):
        response = await send(client, CHAT, model=name)
        assert (gateway.requests[-1].model, response.json()["model"]) == ("tiny", name)


async def test_schemas_and_logprobs(client: httpx.AsyncClient, gateway: Any) -> None:
    request = await request_of(
        client, gateway, GENERATE, format={"type": "object"}, logprobs=True, top_logprobs=3
    )
    assert request.grammar == Grammar(kind="json_schema", text='{"type":"object"}', param="format")
    assert request.sampling.logprobs == 3


async def test_turns_become_what_the_template_sees(client: httpx.AsyncClient, gateway: Any) -> None:
    def call(name: str, **more: Any) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": {"x": 1}}, **more}

    request = await request_of(
        client,
        gateway,
        CHAT,
        messages=[
            {"role": "user", "content": "Go."},
            {
                "role": "assistant",
                "content": "",
                "thinking": "Hm.",
                "tool_calls": [call("a"), call("b"), call("c", id="own")],
            },
            {"role": "tool", "content": "B", "tool_name": "b"},
            {"role": "tool", "content": "C", "tool_call_id": "own"},
            {"role": "tool", "content": "A"},
            {"role": "tool", "content": "?"},
        ],
    )
    messages = prompt_of(request).messages
    assert messages[0] == Message(role="user", content="Go.")
    assert messages[1].reasoning_content == "Hm."
    assert [c["id"] for c in messages[1].tool_calls] == ["call_1_0", "call_1_1", "own"]
    assert messages[1].tool_calls[0]["function"] == {"name": "a", "arguments": '{"x":1}'}
    assert [m.tool_call_id for m in messages[2:]] == ["call_1_1", "own", "call_1_0", None]
    assert messages[2].name == "b"
