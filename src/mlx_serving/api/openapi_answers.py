"""What each route answers, as JSON schemas for the OpenAPI document. Objects are closed: what an
answer has and its schema does not name is a mistake, and schemathesis finds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_serving.types import CacheStats

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
YES_NO: Schema = {"type": "boolean"}
ANYTHING: Schema = {}
OBJECT: Schema = {"type": "object"}


def _null_or(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _map(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _one(*values: str) -> Schema:
    return {"enum": list(values)}


def _object(optional: Mapping[str, Schema] | None = None, /, **required: Schema) -> Schema:
    """Closed: the `required` members, and the `optional` ones."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_FINISH = _null_or(_one("stop", "length", "tool_calls"))
_ENDED = {"stop_reason": {"anyOf": [TEXT, WHOLE]}}
_USAGE = _object(
    {"completion_tokens_details": _object(shared_tokens=COUNT)},
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
    prompt_tokens_details=_object(cached_tokens=COUNT),
)
_CALL = _object(id=TEXT, type=_one("function"), function=_object(name=TEXT, arguments=TEXT))
_ALTERNATIVE = {"token": TEXT, "logprob": NUMBER, "bytes": _null_or(_list(COUNT))}
_CHAT_LOGPROBS = _object(
    content=_null_or(_list(_object(top_logprobs=_list(_object(**_ALTERNATIVE)), **_ALTERNATIVE))),
    refusal=_null_or(TEXT),
)
_TEXT_LOGPROBS = _object(
    tokens=_list(TEXT),
    token_logprobs=_list(_null_or(NUMBER)),
    top_logprobs=_null_or(_list(_null_or(_map(NUMBER)))),
    text_offset=_list(COUNT),
)
_MESSAGE = _object(
    {"reasoning_content": TEXT, "tool_calls": _list(_CALL)},
    role=_one("assistant"),
    content=_null_or(TEXT),
    refusal={"type": "null"},
)


def _completion(kind: str, **choice: Schema) -> Schema:
    return _object(
        id=TEXT,
        object=_one(kind),
        created=WHOLE,
        model=TEXT,
        system_fingerprint=TEXT,
        choices=_list(_object(_ENDED, index=COUNT, finish_reason=_FINISH, **choice)),
        usage=_USAGE,
    )


_MODEL = _object(
    id=TEXT,
    object=_one("model"),
    created=WHOLE,
    owned_by=TEXT,
    status=TEXT,
    reason=_null_or(TEXT),
    cause=_null_or(TEXT),
    aliases=_list(TEXT),
    parent=_null_or(TEXT),
    context_length=_null_or(COUNT),
    pinned={"type": "boolean"},
    expires_in_s=_null_or({"type": "number", "minimum": 0}),
    wired_bytes=COUNT,
    not_wired=_null_or(TEXT),
)
_ANTHROPIC_MODELS = _object(
    data=_list(
        _object(
            type=_one("model"),
            id=TEXT,
            display_name=TEXT,
            created_at=TEXT,
            max_input_tokens=_null_or(COUNT),
        )
    ),
    has_more=YES_NO,
    first_id=_null_or(TEXT),
    last_id=_null_or(TEXT),
)
_BLOCK = {
    "oneOf": [
        _object(type=_one("thinking"), thinking=TEXT, signature=TEXT),
        _object(type=_one("text"), text=TEXT),
        _object(type=_one("tool_use"), id=TEXT, name=TEXT, input=OBJECT),
    ]
}
_ITEM: Schema = {
    "type": "object",
    "properties": {
        "id": TEXT,
        "type": _one("reasoning", "message", "function_call"),
        "status": _one("in_progress", "completed", "incomplete"),
    },
    "required": ["id", "type", "status"],
}
_RESPONSE = {
    "type": "object",
    "properties": {
        "id": TEXT,
        "object": _one("response"),
        "created_at": NUMBER,
        "completed_at": _null_or(NUMBER),
        "status": _one("in_progress", "completed", "incomplete", "failed"),
        "model": TEXT,
        "output": _list(_ITEM),
        "usage": _null_or(OBJECT),
        "error": _null_or(OBJECT),
    },
    "required": ["id", "object", "created_at", "status", "model", "output"],
}
_DURATIONS = {
    "total_duration": COUNT,
    "load_duration": COUNT,
    "prompt_eval_count": COUNT,
    "prompt_eval_duration": COUNT,
    "eval_count": COUNT,
    "eval_duration": COUNT,
}
_OLLAMA_ALTERNATIVE = {"token": TEXT, "logprob": NUMBER, "bytes": _list(COUNT)}
_OLLAMA_END: dict[str, Schema] = {
    "done_reason": _one("stop", "length", "load", "unload"),
    "logprobs": _list(
        _object(top_logprobs=_list(_object(**_OLLAMA_ALTERNATIVE)), **_OLLAMA_ALTERNATIVE)
    ),
    **_DURATIONS,
}
_OLLAMA_CALL = _object(id=TEXT, function=_object(index=COUNT, name=TEXT, arguments=ANYTHING))
_SAID: dict[str, Schema] = {"thinking": TEXT, "tool_calls": _list(_OLLAMA_CALL)}


def _ollama(optional: Mapping[str, Schema], /, **said: Schema) -> Schema:
    end = _OLLAMA_END | dict(optional)
    return _object(end, model=TEXT, created_at=TEXT, done=YES_NO, **said)


_DETAILS = _object(
    parent_model=TEXT,
    format=TEXT,
    family=TEXT,
    families=_list(TEXT),
    parameter_size=TEXT,
    quantization_level=TEXT,
)
_ENTRY = {"name": TEXT, "model": TEXT, "modified_at": TEXT, "size": COUNT, "digest": TEXT}
_HEALTH: Schema = {
    "type": "object",
    "properties": {
        "status": _one("starting", "ready", "degraded", "draining"),
        "workers": _list(OBJECT),
    },
    "required": ["status", "workers"],
}

COMPONENTS: Mapping[str, Schema] = {
    "ChatCompletion": _completion(
        "chat.completion", message=_MESSAGE, logprobs=_null_or(_CHAT_LOGPROBS)
    ),
    "Completion": _completion("text_completion", text=TEXT, logprobs=_null_or(_TEXT_LOGPROBS)),
    "Response": _RESPONSE,
    "Message": _object(
        id=TEXT,
        type=_one("message"),
        role=_one("assistant"),
        model=TEXT,
        content=_list(_BLOCK),
        usage=_map(COUNT),
        stop_reason=_one("end_turn", "max_tokens", "stop_sequence", "tool_use"),
        stop_sequence=_null_or(TEXT),
    ),
    "Model": _MODEL,
    "Health": _HEALTH,
}
"""Schemas that the document names."""

_CACHES = _object(
    object=_one("cache.stats"),
    models=_list(
        _object(model=TEXT, prefix=_object(**dict.fromkeys(CacheStats.__struct_fields__, COUNT)))
    ),
)

ANSWERS: Mapping[str, Schema] = {
    "POST /v1/chat/completions": _ref("ChatCompletion"),
    "POST /v1/completions": _ref("Completion"),
    "POST /v1/responses": _ref("Response"),
    "GET /v1/responses/{id}": _ref("Response"),
    "DELETE /v1/responses/{id}": _object(
        id=TEXT, object=_one("response.deleted"), deleted={"const": True}
    ),
    "POST /v1/messages": _ref("Message"),
    "POST /v1/messages/count_tokens": _object(input_tokens=COUNT),
    "POST /api/chat": _ollama({}, message=_object(_SAID, role=_one("assistant"), content=TEXT)),
    "POST /api/generate": _ollama(_SAID, response=TEXT),
    "GET /api/tags": _object(models=_list(_object(details=_DETAILS, **_ENTRY))),
    "GET /api/ps": _object(
        models=_list(
            _object(
                details=_DETAILS, expires_at=TEXT, size_vram=COUNT, context_length=COUNT, **_ENTRY
            )
        )
    ),
    "POST /api/show": {
        "type": "object",
        "properties": {
            "details": _DETAILS,
            "model_info": OBJECT,
            "capabilities": _list(TEXT),
            "modified_at": TEXT,
        },
        "required": ["details", "model_info", "capabilities", "modified_at"],
    },
    "GET /api/version": _object(version=TEXT, mlx_serving=TEXT),
    "POST /tokenize": _object(
        count=COUNT, max_model_len=_null_or(COUNT), tokens=_list(COUNT), token_strs={"type": "null"}
    ),
    "POST /detokenize": _object(prompt=TEXT),
    "POST /v1/requests/{id}/cancel": _object(
        id=TEXT, object=_one("request"), cancelled={"const": True}
    ),
    "GET /v1/models": {
        "anyOf": [_object(object=_one("list"), data=_list(_ref("Model"))), _ANTHROPIC_MODELS]
    },
    "GET /v1/models/{id}": _ref("Model"),
    **{
        f"POST /v1/models/{{id}}/{act}": _ref("Model") for act in ("load", "unload", "pin", "unpin")
    },
    "GET /v1/cache/stats": _CACHES,
    "DELETE /v1/cache": _CACHES,
    "GET /health": _ref("Health"),
    "GET /ready": _ref("Health"),
    "GET /openapi.json": OBJECT,
}
"""By endpoint: what a 200 has, where it is JSON."""

STREAMS: Mapping[str, str] = {
    "/v1/chat/completions": "text/event-stream",
    "/v1/completions": "text/event-stream",
    "/v1/responses": "text/event-stream",
    "/v1/messages": "text/event-stream",
    "/api/chat": "application/x-ndjson",
    "/api/generate": "application/x-ndjson",
}
"""What `stream` makes of an answer."""

OTHERS: Mapping[str, str] = {"/metrics": "text/plain", "/docs": "text/html"}
"""Pages that are not JSON."""
