"""Structured output over a real worker process: the scripted model's tokens, bent by grammars."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from mlx_serving import Engine, errors
from mlx_serving.api.app import create_app
from mlx_serving.telemetry import events
from mlx_serving.types import Grammar

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
PAIRS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, {"type": "null"}],
        "items": False,
    },
    "minItems": 1,
    "maxItems": 2,
}


def schema_format(schema: Any, strict: bool = True) -> dict[str, Any]:
    json_schema = {"name": "answer", "schema": schema, "strict": strict}
    return {"type": "json_schema", "json_schema": json_schema}


@pytest.fixture
async def client(scripted: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with Engine(str(scripted(mode="hash"))) as engine:
        transport = httpx.ASGITransport(create_app(engine.gateway))
        async with httpx.AsyncClient(transport=transport) as http:
            yield openai.AsyncOpenAI(
                base_url="http://test/v1", api_key="x", http_client=http, max_retries=0
            )


async def ask(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    fields.setdefault("max_tokens", 400)
    return (await client.completions.create(model="scripted", prompt="Hi", **fields)).choices


@pytest.mark.parametrize(
    ("fields", "broken_off"),
    [
        ({"grammar": Grammar(kind="choice", text='["yes", "no"]')}, False),
        ({"grammar": Grammar(kind="regex", text="[a-f]{9}"), "max_tokens": 3}, True),
        ({"grammar": Grammar(kind="regex", text="ab{9}c"), "stop": ["b"]}, True),
        ({"max_tokens": 3}, None),
    ],
)
async def test_it_is_known_whether_an_answer_was_broken_off(
    scripted: Any, fields: dict[str, Any], broken_off: bool | None
) -> None:
    async with Engine(str(scripted(mode="hash"))) as engine:
        ended: list[events.RequestFinished] = []
        engine.on(events.RequestFinished, ended.append)
        await engine.complete("Hi", **{"max_tokens": 40, "logprobs": 0, **fields})
        (finished,) = ended
        assert finished.broken_off is broken_off
        assert finished.logprob is not None and finished.logprob <= 0.0
        await engine.complete("Hi", max_tokens=3)
        assert ended[-1].logprob is None


async def test_mixed_requests_give_what_each_gives_alone(client: openai.AsyncOpenAI) -> None:
    def wish(i: int) -> dict[str, Any]:
        return [
            {"extra_body": {"response_format": schema_format(PERSON, strict=i % 2 == 0)}},
            {"max_tokens": 12},
            {"extra_body": {"guided_json": PAIRS}, "logprobs": 2, "n": 2},
            {"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}, "temperature": 0},
            {"extra_body": {"guided_regex": "[A-F]{2,9}"}, "frequency_penalty": 0.5},
            {"stop": ["\x07", "a"], "max_tokens": 20},
            {"extra_body": {"guided_grammar": 'start: "<" start ">" | "-"'}},
            {"extra_body": {"grammar": 'root ::= "<" root ">" | [-+]+'}, "max_tokens": 5},
        ][i % 8] | {"seed": i}

    together = await asyncio.gather(*(ask(client, **wish(i)) for i in range(32)))
    for i, choices in enumerate(together):
        assert [c.text for c in choices] == [c.text for c in await ask(client, **wish(i))], i
        for choice in choices:
            kind, text = i % 8, choice.text
            if kind in (0, 2):
                jsonschema.validate(json.loads(text), PERSON if kind == 0 else PAIRS)
                assert choice.finish_reason == "stop"
            elif kind == 3:
                assert text in ("yes", "no")
            elif kind == 4:
                assert re.fullmatch("[A-F]{2,9}", text)
            elif kind == 6:
                assert re.fullmatch("(<*)-(>*)", text) and text.count("<") == text.count(">")
    assert len({choices[0].text for choices in together[::8]}) > 1, "seeds must tell"


async def test_a_stream_is_the_same_and_min_tokens_gives_way(client: openai.AsyncOpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "scripted",
        "messages": [{"role": "user", "content": "Hi"}],
        "seed": 5,
        "max_tokens": 300,
        "response_format": schema_format(PERSON),
        "extra_body": {"min_tokens": 299},
    }
    whole = (await client.chat.completions.create(**fields)).choices[0]
    jsonschema.validate(json.loads(whole.message.content or ""), PERSON)
    assert whole.finish_reason == "stop"
    chunks = [c async for c in await client.chat.completions.create(stream=True, **fields)]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


REFUSED = [
    ({"response_format": schema_format({"type": "array", "uniqueItems": True})}, "uniqueItems"),
    ({"response_format": schema_format({"properties": {"a": {"not": {}}}})}, "not"),
    ({"response_format": schema_format({"type": "string", "pattern": "(?=a)"})}, "look-around"),
    ({"response_format": schema_format({"type": "string", "format": "colour"})}, "colour"),
    ({"response_format": schema_format({"enum": ["x" * 70_000]})}, "65536"),
    ({"guided_regex": "("}, "unclosed"),
    ({"guided_grammar": 'root ::= "a"'}, "Expected token"),
    ({"grammar": 'root ::= "a" other'}, "no rule is called 'other'"),
    ({"structured_outputs": {"json": {"$ref": "#/$defs/none"}}}, "none"),
]


@pytest.mark.parametrize(("body", "named"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_come_before_any_token(
    client: openai.AsyncOpenAI, body: dict[str, Any], named: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        await client.chat.completions.create(
            model="scripted",
            messages=[{"role": "user", "content": "Hi"}],
            stream=stream,
            extra_body=body,
        )
    assert named in error.value.message
    assert str(error.value.param).split(".")[0] == next(iter(body))


async def test_the_engine_takes_both_shapes(scripted: Any) -> None:
    async with Engine(str(scripted(mode="hash"))) as engine:
        answer = await engine.complete("Hi", response_format=schema_format(PERSON), max_tokens=300)
        jsonschema.validate(json.loads(answer.text), PERSON)
        assert (await engine.complete("Hi", grammar='start: "a" "b"', max_tokens=9)).text == "ab"
        code = Grammar(kind="regex", text="[0-9]{4}", param="grammar")
        assert (await engine.complete("Hi", grammar=code, max_tokens=9)).text.isdigit()
        with pytest.raises(errors.InvalidRequest) as error:
            await engine.complete("Hi", grammar=code, response_format={"type": "json_object"})
        assert error.value.param == "grammar"
        with pytest.raises(errors.InvalidRequest) as error:
            await engine.complete("Hi", grammar=code, ignore_eos=True)
        assert error.value.param == "ignore_eos"
