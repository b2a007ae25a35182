"""The OpenAPI document and the page: made from the tables and structs, and true of the application."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import msgspec
import pytest

from mlx_serving.api import fields
from mlx_serving.api.app import ENDPOINTS
from mlx_serving.api.openai_response import usage_fields
from mlx_serving.api.openapi import NESTED, SHAPES, document, page
from mlx_serving.types import Usage

DOCUMENT: dict[str, Any] = json.loads(document(ENDPOINTS))
SCHEMAS = DOCUMENT["components"]["schemas"]


def schema_of(path: str) -> dict[str, Any]:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    return SCHEMAS[content["schema"]["$ref"].rpartition("/")[2]]


@pytest.mark.parametrize("route", SHAPES)
def test_structs_and_tables_agree(route: str) -> None:
    """A honoured field is parsed, and what is parsed is not refused."""
    table = fields.ROUTES[route]
    honoured = {f.name for f in table.values() if f.disposition == "honoured"}
    shown = {f.name for f in table.values() if f.disposition != "refused"}
    parsed = {f.encode_name for f in msgspec.structs.fields(SHAPES[route])}
    assert honoured <= parsed <= shown


def test_every_reference_leads_somewhere() -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            here = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return here + [r for v in value.values() for r in references(v)]
        return [r for v in value for r in references(v)] if isinstance(value, list) else []

    found = references(DOCUMENT)
    assert found
    assert {r.rpartition("/")[2] for r in found} <= SCHEMAS.keys()
    for nested in NESTED.values():
        assert fields.ROUTES.keys() >= set(nested.values())


@pytest.mark.parametrize("path", [p for p in DOCUMENT["paths"] if p in fields.ROUTES])
def test_schemas_are_schemas(path: str) -> None:
    schema = schema_of(path)
    jsonschema.Draft202012Validator.check_schema(schema | {"components": DOCUMENT["components"]})
    shown = {f.name for f in fields.ROUTES[path].values() if f.disposition != "refused"}
    assert schema["properties"].keys() == shown
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("path", "body", "valid"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, True),
        ("/v1/chat/completions", {"messages": [{"role": "wizard", "content": "x"}]}, False),
        ("/v1/chat/completions", {"messages": []}, False),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}, False),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}, True),
        ("/v1/responses", {"input": "x", "reasoning": {"effort": "extreme"}}, False),
        ("/api/chat", {"options": {"temperature": 3}}, False),
        ("/api/chat", {"options": {"temperature": 2}}, True),
        ("/api/generate", {"prompt": "x", "mood": 1}, False),
        ("/detokenize", {"tokens": [-1]}, False),
    ],
)
async def test_the_document_is_true(
    client: httpx.AsyncClient, path: str, body: Any, valid: bool
) -> None:
    schema = schema_of(path) | {"components": DOCUMENT["components"]}
    assert jsonschema.Draft202012Validator(schema).is_valid(body) is valid
    assert ((await client.post(path, json=body)).status_code == 200) is valid


@pytest.mark.parametrize("path", DOCUMENT["paths"])
async def test_paths_and_methods_are_the_applications(client: httpx.AsyncClient, path: str) -> None:
    response = await client.request("PUT", path.replace("{id}", "x").replace("{name}", "x"))
    assert response.status_code == 405
    allowed = {method.lower() for method in response.headers["allow"].split(", ")}
    assert allowed == DOCUMENT["paths"][path].keys()


async def test_errors_have_the_shape_that_is_told(client: httpx.AsyncClient) -> None:
    for path in ("/v1/chat/completions", "/v1/messages", "/api/chat", "/tokenize"):
        told = DOCUMENT["paths"][path]["post"]["responses"]["4XX"]["content"]["application/json"]
        schema = told["schema"] | {"components": DOCUMENT["components"]}
        body = (await client.post(path, json={"mood": 1})).json()
        jsonschema.Draft202012Validator(schema).validate(body)


async def test_the_page_needs_nothing_else(client: httpx.AsyncClient) -> None:
    assert (await client.get("/openapi.json")).json() == DOCUMENT
    response = await client.get("/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.content == page(ENDPOINTS)
    text = response.text
    assert "http:" not in text and "https:" not in text and "<script" not in text
    for path in ("/v1/messages", "/api/chat", "/v1/responses"):
        assert path in text
        for name in fields.ROUTES[path]:
            assert f"<code>{name}</code>" in text


def test_every_answer_is_told() -> None:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            content = operation["responses"]["200"]["content"]
            told = [media.get("schema") for media in content.values()]
            assert told[0], f"{method} {path}: its answer belongs in openapi_answers.ANSWERS"


async def test_the_usage_of_a_shared_answer_is_told(client: httpx.AsyncClient) -> None:
    path, chat = "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}
    told = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]
    schema = told["schema"] | {"components": DOCUMENT["components"]}
    body = (await client.post(path, json=chat)).json()
    usage = usage_fields([Usage(prompt_tokens=1, completion_tokens=2, shared_tokens=2)])
    jsonschema.Draft202012Validator(schema).validate(body | {"usage": usage})
