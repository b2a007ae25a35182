"""What becomes of every field of Anthropic's routes."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_serving.api.disposition import Row, Table, table

_PROMPT: dict[str, Row] = {
    "model": "a served model's id, alias, or a name that --model-aliases matches; default: the first served model",
    "messages": "roles user, assistant and system; the last one, if the assistant's, is continued",
    "system": "a string or text blocks; Claude Code's x-anthropic-billing-header line is left out",
    "tools": "tools of the client's own, given to the chat template",
    "tool_choice": "auto, any, tool, or none: no tools are shown to the model",
    "thinking": "enabled, adaptive or disabled: the chat template's enable_thinking, if it has one",
    "output_config": "effort: the chat template's reasoning_effort, if it has one; format: a schema that the answer follows",
    "context_management": "edits that keep everything",
}
_PROMPT_ADVISORY: dict[str, Row] = {
    "cache_control": "prefixes are matched by content",
    "user_profile_id": "an end user's identifier",
    "workspace_id": "there are no workspaces",
}
_PROMPT_REFUSED: dict[str, Row] = {
    "speed": ("there is one speed", ("standard",)),
    "mcp_servers": ("the client calls its tools", ([],)),
}

MESSAGES: Table = table(
    (
        "honoured",
        {
            **_PROMPT,
            "max_tokens": "required; at most what the context leaves",
            "stream": "server-sent events",
            "stop_sequences": "up to 16, each 1 to 1,024 characters",
            "temperature": "0 to 2, default 1; 0 is greedy",
            "top_p": "above 0, to 1",
            "top_k": "0: the whole vocabulary",
            "seed": "ours: -2^63 to 2^64-1; default: drawn, and said in x-mlx-serving-seed",
        },
    ),
    (
        "advisory",
        {
            **_PROMPT_ADVISORY,
            "metadata": "the client's own notes",
            "service_tier": "there is one tier",
            "diagnostics": "none are made",
        },
    ),
    (
        "refused",
        {
            **_PROMPT_REFUSED,
            "container": "the client runs its tools",
            "inference_geo": "it runs where this server runs",
        },
    ),
)

COUNT_TOKENS: Table = table(
    ("honoured", dict(_PROMPT)), ("advisory", dict(_PROMPT_ADVISORY)), ("refused", _PROMPT_REFUSED)
)

TOOL: Table = table(
    (
        "honoured",
        {
            "name": "given to the chat template",
            "description": "given to the chat template",
            "input_schema": "given to the chat template",
            "strict": "true: calls keep to the schema",
        },
    ),
    (
        "advisory",
        {
            "cache_control": "prefixes are matched by content",
            "eager_input_streaming": "arguments stream as they come",
        },
    ),
    (
        "refused",
        {
            "type": ("tools that Anthropic's servers run are not here", ("custom",)),
            "defer_loading": ("every tool is shown to the model", (False,)),
            "allowed_callers": ("only the model calls tools", (["direct"],)),
            "input_examples": ("write them into the description", ([],)),
        },
    ),
)

TOOL_CHOICE: Table = table(
    (
        "honoured",
        {
            "type": "auto, any (at least one call), tool (calls of that tool only) or none",
            "name": "the tool that has to be called",
            "disable_parallel_tool_use": "true: one call at most, and the answer ends with it",
        },
    ),
)

THINKING: Table = table(
    (
        "honoured",
        {
            "type": "enabled, adaptive or disabled",
            "display": "summarized: the thinking itself; omitted: none of its text",
        },
    ),
    ("advisory", {"budget_tokens": "a target; thinking ends by itself or at max_tokens"}),
)

OUTPUT_CONFIG: Table = table(
    (
        "honoured",
        {
            "effort": "low, medium, high; xhigh and max are the template's high",
            "format": "json_schema with a schema that the answer follows",
        },
    ),
)

FORMAT: Table = table(
    ("honoured", {"type": "json_schema", "schema": "what the answer follows"}),
)

EDITS: Table = table(
    ("honoured", {"edits": "edits that keep everything"}),
)

EDIT: Table = table(
    ("honoured", {"keep": "all; other edits are refused"}),
    ("advisory", {"type": "all kinds keep the same then"}),
)

MESSAGE: Table = table(
    (
        "honoured",
        {"role": "user, assistant or system", "content": "a string, or blocks"},
    ),
)

_CACHED: dict[str, Row] = {"cache_control": "prefixes are matched by content"}
_TOOLSET: dict[str, Row] = {"toolset_name": "tools have no sets"}

BLOCKS: Mapping[str, Table] = {
    "text": table(
        ("honoured", {"type": "text", "text": "blocks are joined by newlines"}),
        ("advisory", {**_CACHED, "citations": "what an earlier text came with"}),
    ),
    "thinking": table(
        ("honoured", {"type": "thinking", "thinking": "given to the chat template"}),
        ("advisory", {"signature": "no signature is checked"}),
    ),
    "redacted_thinking": table(
        ("honoured", {"type": "redacted_thinking"}),
        ("advisory", {"data": "only who made it can read it"}),
    ),
    "tool_use": table(
        (
            "honoured",
            {
                "type": "tool_use",
                "id": "the call's name, which its result gives",
                "name": "given to the chat template",
                "input": "given to the chat template",
            },
        ),
        ("advisory", {**_CACHED, "caller": "only the model calls tools"}),
        ("refused", dict(_TOOLSET)),
    ),
    "tool_result": table(
        (
            "honoured",
            {
                "type": "tool_result",
                "tool_use_id": "the call that it answers",
                "content": "a string, or text blocks",
                "is_error": "true: the text then begins with Error:",
            },
        ),
        ("advisory", dict(_CACHED)),
        ("refused", dict(_TOOLSET)),
    ),
}
"""By a block's type. `system` and a tool result's content have text blocks only; images, documents
and what Anthropic's servers would run are refused by the block's place."""

ROUTES: Mapping[str, Table] = {
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": COUNT_TOKENS,
    "/v1/messages tools[]": TOOL,
    "/v1/messages tool_choice": TOOL_CHOICE,
    "/v1/messages thinking": THINKING,
    "/v1/messages output_config": OUTPUT_CONFIG,
    "/v1/messages output_config.format": FORMAT,
    "/v1/messages context_management": EDITS,
    "/v1/messages context_management.edits[]": EDIT,
    "/v1/messages messages[]": MESSAGE,
    **{f"/v1/messages {kind} block": block for kind, block in BLOCKS.items()},
}
