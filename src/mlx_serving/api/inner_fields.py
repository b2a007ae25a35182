"""What becomes of the fields inside tools, formats and earlier calls, as chat completions have them;
another dialect's are beside its own tables."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_serving.api.disposition import Table, table

_TOOL: Table = table(
    ("honoured", {"type": "function", "function": "what is offered to the model"}),
)
_FUNCTION: Table = table(
    (
        "honoured",
        {
            "name": "1 to 128 letters, digits, _ . : -",
            "description": "given to the chat template",
            "parameters": "the schema of an object; default: no parameters",
            "strict": "true: calls keep to the schema",
        },
    ),
)
_TOOL_CHOICE: Table = table(
    ("honoured", {"type": "function", "function": "the one that has to be called"}),
)
_CHOSEN: Table = table(("honoured", {"name": "a tool's name"}))
_RESPONSE_FORMAT: Table = table(
    (
        "honoured",
        {"type": "text, json_object or json_schema", "json_schema": "only with that type"},
    ),
)
_JSON_SCHEMA: Table = table(
    ("honoured", {"schema": "what the answer follows; see docs/structured-output.md"}),
    (
        "advisory",
        {
            "name": "not shown to the model",
            "description": "not shown to the model",
            "strict": "the schema is followed exactly in any case",
        },
    ),
)
_STRUCTURED_OUTPUTS: Table = table(
    (
        "honoured",
        {
            "json": "a schema, or its text",
            "regex": "the whole answer matches it",
            "choice": "the answer is one of these texts",
            "grammar": "in Lark's notation",
            "json_object": "true: any object",
            "whitespace_pattern": "what may stand between two JSON tokens",
            "disable_any_whitespace": "true: nothing may",
        },
    ),
    ("advisory", {"disable_fallback": "there is nothing to fall back to"}),
)
CALL: Table = table(
    (
        "honoured",
        {
            "id": "the call's name, which its answer gives",
            "type": "function",
            "function": "name and arguments, for the chat template",
        },
    ),
    ("advisory", {"index": "calls are in order"}),
)
CALL_FUNCTION: Table = table(
    ("honoured", {"name": "given to the chat template", "arguments": "JSON, as a text"}),
)
CONTENT: Table = table(
    ("honoured", {"type": "text", "text": "parts are joined by newlines"}),
    (
        "advisory",
        {
            "cache_control": "prefixes are matched by content",
            "prompt_cache_breakpoint": "prefixes are matched by content",
        },
    ),
)

ROUTES: Mapping[str, Table] = {
    "messages[].content[]": CONTENT,
    "messages[].tool_calls[]": CALL,
    "messages[].tool_calls[].function": CALL_FUNCTION,
    "tools[]": _TOOL,
    "tools[].function": _FUNCTION,
    "tool_choice": _TOOL_CHOICE,
    "tool_choice.function": _CHOSEN,
    "response_format": _RESPONSE_FORMAT,
    "response_format.json_schema": _JSON_SCHEMA,
    "structured_outputs": _STRUCTURED_OUTPUTS,
}
"""The parsers that read them (`content/tools/definitions.py`, `content/structured.py`) also serve the
library; a test holds them and these tables to each other."""
