"""For every table of fields whose dialect has no list of its own: where its object is in a body, and
other values for its honoured fields."""

from __future__ import annotations

from typing import Any, NamedTuple

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}}}
HI = [{"role": "user", "content": "Hi"}]
MARK = {"type": "ephemeral"}
Path_ = tuple[str | int, ...]


class Place(NamedTuple):
    """Where a table's object is in a body, and another value for each of its honoured fields."""

    path: str
    body: dict[str, Any]
    at: Path_
    changed: dict[str, Any]


CHAT: dict[str, Any] = {
    "messages": [
        {"role": "user", "name": "me", "content": [{"type": "text", "text": "Hi"}]},
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ],
    "tools": [
        {
            "type": "function",
            "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True},
        },
        {"type": "function", "function": {"name": "g"}},
    ],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
}
FORMAT: dict[str, Any] = {
    "messages": HI,
    "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
}
OUTPUTS: dict[str, Any] = {"messages": HI, "structured_outputs": {"json": SCHEMA}}
MESSAGES: dict[str, Any] = {
    "max_tokens": 9,
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm."},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "tool_use", "id": "c", "name": "f", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c", "content": "1", "is_error": False}
            ],
        },
    ],
    "tools": [{"name": "f", "input_schema": SCHEMA}, {"name": "g", "input_schema": SCHEMA}],
    "tool_choice": {"type": "tool", "name": "f"},
    "thinking": {"type": "enabled"},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
    "context_management": {"edits": [{"keep": "all"}]},
}
FUNCTION = {"type": "function", "name": "f", "parameters": SCHEMA}
RESPONSES: dict[str, Any] = {
    "input": [
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "Hi"}],
        },
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
    ],
    "tools": [
        FUNCTION,
        FUNCTION | {"name": "g"},
        {"type": "namespace", "name": "n", "description": "d", "tools": [FUNCTION]},
        {"type": "web_search"},
    ],
    "tool_choice": {"type": "function", "name": "f"},
    "text": {"format": {"type": "json_schema", "schema": SCHEMA}},
    "reasoning": {"effort": "low"},
}
SUMMARY: dict[str, Any] = {
    "input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}]
}
OLLAMA: dict[str, Any] = {
    "stream": False,
    "messages": [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "",
            "thinking": "Hm.",
            "tool_calls": [
                {"id": "a", "function": {"name": "f", "arguments": {}}},
                {"function": {"name": "g", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "1", "tool_name": "f"},
    ],
    "options": {"seed": 1},
}
OTHER = {"type": "object", "properties": {"b": {"type": "null"}}}
KIND = {"type": "mood"}
RERANK = {"query": "q", "documents": [{"text": "a"}, "b c"], "top_n": 2}
RANKED: dict[str, Any] = {
    "model": "small",
    "query": "Q",
    "documents": ["x"],
    "top_n": 1,
    "return_documents": False,
    "max_tokens_per_doc": 3,
    "truncate_prompt_tokens": 4,
    "instruction": "Find it.",
    "priority": "low",
}
INPUT = ("input",)
TOLD = {"model": "small", "keep_alive": 60}

PLACES: dict[str, Place] = {
    "stream_options": Place(
        "/v1/chat/completions",
        {"messages": HI, "stream": True, "stream_options": {}},
        ("stream_options",),
        {},
    ),
    "messages[]": Place(
        "/v1/chat/completions",
        CHAT,
        ("messages", 1),
        {
            "role": "mood",
            "content": "Yo",
            "name": "you",
            "tool_calls": [],
            "tool_call_id": "d",
            "reasoning_content": "Ah.",
        },
    ),
    "messages[].content[]": Place(
        "/v1/chat/completions", CHAT, ("messages", 0, "content", 0), {**KIND, "text": "Yo"}
    ),
    "messages[].tool_calls[]": Place(
        "/v1/chat/completions",
        CHAT,
        ("messages", 1, "tool_calls", 0),
        {**KIND, "id": "d", "function": {"name": "g", "arguments": "{}"}},
    ),
    "messages[].tool_calls[].function": Place(
        "/v1/chat/completions",
        CHAT,
        ("messages", 1, "tool_calls", 0, "function"),
        {"name": "g", "arguments": '{"a":"b"}'},
    ),
    "tools[]": Place(
        "/v1/chat/completions",
        CHAT,
        ("tools", 0),
        {**KIND, "function": {"name": "f", "description": "e"}},
    ),
    "tools[].function": Place(
        "/v1/chat/completions",
        CHAT,
        ("tools", 1, "function"),
        {"name": "h", "description": "e", "parameters": OTHER, "strict": True},
    ),
    "tool_choice": Place(
        "/v1/chat/completions", CHAT, ("tool_choice",), {**KIND, "function": {"name": "g"}}
    ),
    "tool_choice.function": Place(
        "/v1/chat/completions", CHAT, ("tool_choice", "function"), {"name": "g"}
    ),
    "response_format": Place(
        "/v1/chat/completions",
        FORMAT,
        ("response_format",),
        {**KIND, "json_schema": {"schema": OTHER}},
    ),
    "response_format.json_schema": Place(
        "/v1/chat/completions", FORMAT, ("response_format", "json_schema"), {"schema": OTHER}
    ),
    "structured_outputs": Place(
        "/v1/chat/completions",
        OUTPUTS,
        ("structured_outputs",),
        {"json": OTHER, "whitespace_pattern": " ?", "disable_any_whitespace": True},
    ),
    "/v1/responses tools[]": Place(
        "/v1/responses",
        RESPONSES,
        ("tools", 1),
        {**KIND, "name": "h", "description": "e", "parameters": OTHER, "strict": True},
    ),
    "/v1/responses namespace in tools[]": Place(
        "/v1/responses",
        RESPONSES,
        ("tools", 2),
        {**KIND, "name": "m", "description": "e", "tools": []},
    ),
    "/v1/responses web_search in tools[]": Place("/v1/responses", RESPONSES, ("tools", 3), {}),
    "/v1/responses tool_choice": Place(
        "/v1/responses", RESPONSES, ("tool_choice",), {**KIND, "name": "n__f"}
    ),
    "/v1/responses text": Place(
        "/v1/responses", RESPONSES, ("text",), {"format": {"type": "json_object"}}
    ),
    "/v1/responses text.format": Place(
        "/v1/responses", RESPONSES, ("text", "format"), {**KIND, "schema": OTHER}
    ),
    "/v1/responses reasoning": Place(
        "/v1/responses", RESPONSES, ("reasoning",), {"effort": "high"}
    ),
    "/v1/responses message item": Place(
        "/v1/responses", RESPONSES, (*INPUT, 0), {**KIND, "role": "system", "content": "Yo"}
    ),
    "/v1/responses function_call item": Place(
        "/v1/responses",
        RESPONSES,
        (*INPUT, 3),
        {**KIND, "call_id": "d", "name": "g", "namespace": "n", "arguments": "[]"},
    ),
    "/v1/responses function_call_output item": Place(
        "/v1/responses", RESPONSES, (*INPUT, 4), {**KIND, "call_id": "d", "output": "2"}
    ),
    "/v1/responses reasoning item": Place(
        "/v1/responses", SUMMARY, (*INPUT, 0), {**KIND, "content": "Ah.", "summary": "Ah."}
    ),
    "/v1/responses text part": Place(
        "/v1/responses", RESPONSES, (*INPUT, 0, "content", 0), {**KIND, "text": "Yo"}
    ),
    "/v1/responses refusal part": Place(
        "/v1/responses", RESPONSES, (*INPUT, 2, "content", 0), {**KIND, "refusal": "Never"}
    ),
    "/v1/embeddings": Place(
        "/v1/embeddings",
        {"input": "Hi"},
        (),
        {
            "model": "small",
            "input": "Yo",
            "encoding_format": "base64",
            "dimensions": 1,
            "normalize": False,
            "truncate_prompt_tokens": 3,
            "prompt_name": "query",
            "priority": "low",
        },
    ),
    "/v1/rerank": Place("/v1/rerank", RERANK, (), RANKED),
    "/v2/rerank": Place("/v2/rerank", RERANK, (), RANKED),
    "/rerank": Place("/rerank", RERANK, (), RANKED),
    "/v1/rerank documents[]": Place("/v1/rerank", RERANK, ("documents", 0), {"text": "x"}),
    "/v1/messages/count_tokens": Place(
        "/v1/messages/count_tokens",
        {k: v for k, v in MESSAGES.items() if k != "max_tokens"},
        (),
        {
            "model": "small",
            "messages": HI,
            "system": "Be brief.",
            "tools": [],
            "tool_choice": {"type": "none"},
            "thinking": {"type": "disabled"},
            "output_config": {},
            "context_management": {"edits": [KIND]},
        },
    ),
    "/v1/messages tools[]": Place(
        "/v1/messages",
        MESSAGES,
        ("tools", 1),
        {"name": "h", "description": "e", "input_schema": OTHER, "strict": True},
    ),
    "/v1/messages tool_choice": Place(
        "/v1/messages",
        MESSAGES,
        ("tool_choice",),
        {"type": "none", "name": "g", "disable_parallel_tool_use": True},
    ),
    "/v1/messages thinking": Place(
        "/v1/messages", MESSAGES, ("thinking",), {"type": "disabled", "display": "mood"}
    ),
    "/v1/messages output_config": Place(
        "/v1/messages", MESSAGES, ("output_config",), {"effort": "high", "format": None}
    ),
    "/v1/messages output_config.format": Place(
        "/v1/messages", MESSAGES, ("output_config", "format"), {**KIND, "schema": OTHER}
    ),
    "/v1/messages context_management": Place(
        "/v1/messages", MESSAGES, ("context_management",), {"edits": [KIND]}
    ),
    "/v1/messages context_management.edits[]": Place(
        "/v1/messages", MESSAGES, ("context_management", "edits", 0), {"keep": "mood"}
    ),
    "/v1/messages messages[]": Place(
        "/v1/messages", MESSAGES, ("messages", 0), {"role": "system", "content": "Yo"}
    ),
    "/v1/messages text block": Place(
        "/v1/messages", MESSAGES, ("messages", 0, "content", 0), {**KIND, "text": "Yo"}
    ),
    "/v1/messages thinking block": Place(
        "/v1/messages", MESSAGES, ("messages", 1, "content", 0), {**KIND, "thinking": "Ah."}
    ),
    "/v1/messages redacted_thinking block": Place(
        "/v1/messages", MESSAGES, ("messages", 1, "content", 1), KIND
    ),
    "/v1/messages tool_use block": Place(
        "/v1/messages",
        MESSAGES,
        ("messages", 1, "content", 2),
        {**KIND, "id": "d", "name": "g", "input": {"a": "b"}},
    ),
    "/v1/messages tool_result block": Place(
        "/v1/messages",
        MESSAGES,
        ("messages", 2, "content", 0),
        {**KIND, "tool_use_id": "d", "content": "2", "is_error": True},
    ),
    "/api/chat messages[]": Place(
        "/api/chat",
        OLLAMA,
        ("messages", 2),
        {
            "role": "user",
            "content": "2",
            "thinking": "Ah.",
            "tool_name": "g",
            "tool_call_id": "z",
            "tool_calls": [{"function": {}}],
        },
    ),
    "/api/chat messages[].tool_calls[]": Place(
        "/api/chat",
        OLLAMA,
        ("messages", 1, "tool_calls", 0),
        {"id": "z", "function": {"name": "h", "arguments": {}}},
    ),
    "/api/chat messages[].tool_calls[].function": Place(
        "/api/chat",
        OLLAMA,
        ("messages", 1, "tool_calls", 0, "function"),
        {"name": "h", "arguments": {"a": 1}},
    ),
    "/api/embed": Place(
        "/api/embed",
        {"input": "Hi"},
        (),
        {**TOLD, "input": "Yo", "truncate": False, "dimensions": 1},
    ),
    "/api/embeddings": Place("/api/embeddings", {"prompt": "Hi"}, (), {**TOLD, "prompt": "Yo"}),
    "/api/embed and /api/embeddings options": Place(
        "/api/embed", {"input": "Hi", "options": {}}, ("options",), {}
    ),
    "/tokenize": Place(
        "/tokenize",
        {"messages": HI, "add_generation_prompt": False},
        (),
        {
            "model": "small",
            "messages": [{"role": "user", "content": "Yo"}],
            "prompt": "Hi",
            "add_special_tokens": True,
            "add_generation_prompt": True,
            "continue_final_message": True,
            "chat_template_kwargs": {"a": 1},
            "tools": CHAT["tools"],
        },
    ),
    "/detokenize": Place("/detokenize", {"tokens": [65]}, (), {"model": "no", "tokens": [66]}),
}
