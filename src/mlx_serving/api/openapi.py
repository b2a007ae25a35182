"""The OpenAPI 3.1 document and the page at /docs, both made from the parsers' structs (types and
ranges) and the tables of fields (what becomes of each)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from html import escape
from typing import Any

import msgspec

from mlx_serving import __version__
from mlx_serving.api import (
    anthropic_request,
    embeddings_request,
    embeddings_response,
    fields,
    ollama_embed,
    ollama_request,
    openai_request,
    openapi_answers,
    responses_request,
    rollouts,
    settings,
    tokens,
)
from mlx_serving.api.disposition import Table

SHAPES: Mapping[str, type[msgspec.Struct]] = {
    **openai_request.SHAPES,
    **responses_request.SHAPES,
    **anthropic_request.SHAPES,
    **embeddings_request.SHAPES,
    **ollama_request.SHAPES,
    **ollama_embed.SHAPES,
    **tokens.SHAPES,
}
"""The struct behind each table of `fields.ROUTES`."""

NESTED: Mapping[str, Mapping[str, str]] = {
    "/v1/chat/completions": {"messages": "messages[]", "stream_options": "stream_options"},
    "/v1/completions": {"stream_options": "stream_options"},
    "/v1/responses": {"reasoning": "/v1/responses reasoning"},
    "/v1/messages": {
        "tools": "/v1/messages tools[]",
        "tool_choice": "/v1/messages tool_choice",
        "thinking": "/v1/messages thinking",
        "output_config": "/v1/messages output_config",
    },
    "/v1/messages/count_tokens": {
        "tools": "/v1/messages tools[]",
        "tool_choice": "/v1/messages tool_choice",
        "thinking": "/v1/messages thinking",
        "output_config": "/v1/messages output_config",
    },
    "/api/chat": {
        "messages": "/api/chat messages[]",
        "options": "/api/chat and /api/generate options",
    },
    "/api/generate": {"options": "/api/chat and /api/generate options"},
    "/api/embed": {"options": "/api/embed and /api/embeddings options"},
    "/api/embeddings": {"options": "/api/embed and /api/embeddings options"},
}
"""Which table says what is in a field of another."""

ANSWERS: Mapping[str, type[msgspec.Struct]] = {
    **embeddings_response.SHAPES,
    **ollama_embed.ANSWERS,
    **rollouts.ANSWERS,
    **settings.ANSWERS,
}
"""The struct of a route's answer, by path or by method and path, where there is one."""

_REF = "#/components/schemas/{name}"
_ERRORS = {
    "OpenAIError": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {"type": "object", "required": ["message", "type", "param", "code"]}
        },
    },
    "AnthropicError": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {"error": {"type": "object", "required": ["type", "message"]}},
    },
    "OllamaError": {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "string"}},
    },
}


@functools.cache
def document(endpoints: tuple[tuple[str, str], ...]) -> bytes:
    """The document of `endpoints`: pairs of `METHOD /path` and what it is."""
    components: dict[str, Any] = {**_ERRORS, **openapi_answers.COMPONENTS}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint, about in endpoints:
        method, path = endpoint.split(" ")
        operation: dict[str, Any] = {
            "summary": about,
            "operationId": _name(f"{method} {path}"),
            "responses": _responses(endpoint, components),
        }
        if parameters := _parameters(path):
            operation["parameters"] = parameters
        body = rollouts.BODIES.get(endpoint)
        if path in fields.ROUTES or body is not None:
            schema = _of(body, components) if body else _reference(path, components)
            content = {"application/json": {"schema": schema}}
            operation["requestBody"] = {"required": True, "content": content}
        paths.setdefault(path, {})[method.lower()] = operation
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "mlx-serving", "version": __version__},
            "paths": paths,
            "components": {"schemas": components},
        }
    )


def _name(text: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in text).split())


def _parameters(path: str) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    schema = {"type": "string"}
    return [{"name": n, "in": "path", "required": True, "schema": schema} for n in names]


def _responses(endpoint: str, components: dict[str, Any]) -> dict[str, Any]:
    path = endpoint.split(" ")[1]
    error = "OpenAIError"
    if path.startswith("/api/"):
        error = "OllamaError"
    elif path.startswith("/v1/messages"):
        error = "AnthropicError"
    wrong = _told("An error", {"$ref": _REF.format(name=error)})
    responses: dict[str, Any] = {"4XX": wrong, "5XX": wrong}
    if shape := ANSWERS.get(endpoint) or ANSWERS.get(path):
        responses["200"] = _told("The answer", _of(shape, components))
    elif path in openapi_answers.OTHERS:
        page = {openapi_answers.OTHERS[path]: {"schema": _TEXT}}
        responses["200"] = {"description": "The page", "content": page}
    else:
        responses["200"] = _told("The answer", openapi_answers.ANSWERS.get(endpoint, {}))
    if stream := openapi_answers.STREAMS.get(path):
        # No schema: OpenAPI 3.1 has no word for what one event is.
        responses["200"]["content"][stream] = {}
    if path == "/ready":
        responses["503"] = responses["200"]
    return responses


_TEXT = {"type": "string"}


def _told(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _of(shape: type[msgspec.Struct], components: dict[str, Any]) -> dict[str, Any]:
    """The schema of a struct, whose parts are among `components` then."""
    (schema,), parts = msgspec.json.schema_components([shape], ref_template=_REF)
    components.update(parts)
    return schema


def _reference(route: str, components: dict[str, Any]) -> dict[str, str]:
    """A reference to the schema of a table's fields, which is among `components` then."""
    name = _name(route)
    if name not in components:
        components[name] = {}
        components[name] = _schema(route, components)
    return {"$ref": _REF.format(name=name)}


def _schema(route: str, components: dict[str, Any]) -> dict[str, Any]:
    """Types and ranges are the struct's; what a field means is the table's. Refused fields are left
    out; what asks for nothing in them is accepted all the same."""
    shape = SHAPES.get(route)
    given: dict[str, Any] = {}
    required: list[str] = []
    if shape is not None:
        (ref,), parts = msgspec.json.schema_components([shape], ref_template=_REF)
        name = ref["$ref"].rpartition("/")[2]
        whole = parts.pop(name)
        components.update(parts)
        given, required = whole["properties"], whole.get("required", [])
    properties: dict[str, Any] = {}
    for field in fields.ROUTES[route].values():
        if field.disposition == "refused":
            continue
        schema = dict(given.get(field.name, {}))
        if nested := NESTED.get(route, {}).get(field.name):
            schema = _with_nested(schema, _reference(nested, components))
        note = field.note if field.disposition == "honoured" else f"Advisory: {field.note}"
        properties[field.name] = schema | {"description": note}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {})


def _with_nested(schema: dict[str, Any], reference: dict[str, str]) -> dict[str, Any]:
    """`schema` with its objects, or its arrays' items, told by `reference`."""
    if "anyOf" in schema:
        options = [_with_nested(option, reference) for option in schema["anyOf"]]
        return schema | {"anyOf": options}
    if schema.get("type") == "array":
        return schema | {"items": reference}
    return dict(reference) if schema.get("type") == "object" else schema


# ------------------------------------------------------------------- the page

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mlx-serving {version}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
code {{ font-family: ui-monospace, monospace; font-size: 13px }}
details {{ border-top: 1px solid #8885; padding: .4rem 0 }}
summary {{ cursor: pointer }}
table {{ border-collapse: collapse; margin: .5rem 0; width: 100% }}
td {{ border-top: 1px solid #8883; padding: .2rem .6rem .2rem 0; vertical-align: top }}
.refused {{ opacity: .6 }}
</style></head><body>
<h1>mlx-serving {version}</h1>
<p>The machine-readable form is <a href="/openapi.json">/openapi.json</a>. A field is
<em>honoured</em>, <em>advisory</em> (it cannot change the tokens; named in a response header) or
<em>refused</em> with a 400 that names it. Any other field is refused as unknown.</p>
{sections}
</body></html>
"""


@functools.cache
def page(endpoints: tuple[tuple[str, str], ...]) -> bytes:
    """The page of `endpoints`: everything in it, nothing to fetch."""
    sections = [_section(endpoint, about) for endpoint, about in endpoints]
    return _PAGE.format(version=__version__, sections="\n".join(sections)).encode()


def _section(endpoint: str, about: str) -> str:
    head = f"<code><b>{escape(endpoint)}</b></code> {escape(about)}"
    path = endpoint.split(" ")[1]
    if path not in fields.ROUTES:
        return f"<details open><summary>{head}</summary></details>"
    tables = [_rows(fields.ROUTES[path])]
    for name, nested in NESTED.get(path, {}).items():
        tables.append(f"<h4><code>{escape(name)}</code></h4>{_rows(fields.ROUTES[nested])}")
    return f"<details><summary>{head}</summary>{''.join(tables)}</details>"


def _rows(table: Table) -> str:
    rows = [
        f'<tr class="{f.disposition}"><td><code>{escape(f.name)}</code><td>{f.disposition}'
        f"<td>{escape(f.note)}"
        for f in table.values()
    ]
    return f"<table>{''.join(rows)}</table>"
