"""What becomes of every field of OpenAI's /v1/responses."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_serving.api.disposition import Row, Table, table

RESPONSES: Table = table(
    (
        "honoured",
        {
            "input": "a string, or items: messages, function calls and their outputs, reasoning",
            "model": "a served model's id or alias; default: the first served model",
            "instructions": "a system message before the rest; not kept for the next response",
            "previous_response_id": "the conversation so far, if it is still stored",
            "store": "default true: kept in memory, within bounds, for previous_response_id",
            "stream": "server-sent events with sequence numbers",
            "max_output_tokens": "default: the server's, or what the context leaves",
            "temperature": "0 to 2, default 1; 0 is greedy",
            "top_p": "above 0, to 1",
            "top_logprobs": "0 to 20; only with include of message.output_text.logprobs",
            "include": "message.output_text.logprobs; what else it knows is never in an answer",
            "tools": "functions of the client's own, alone or in namespaces, given to the chat template; a web_search is never called",
            "tool_choice": "auto, none, required, or a function",
            "parallel_tool_calls": "false: one call at most, and the answer ends with it",
            "text": "format: text, json_object or json_schema",
            "reasoning": "effort, where the chat template has a place for it",
            "metadata": "said again in the response",
            "seed": "ours: -2^63 to 2^64-1; default: drawn, and said in x-mlx-serving-seed",
        },
    ),
    (
        "advisory",
        {
            "user": "an end user's identifier",
            "client_metadata": "the client's own notes",
            "safety_identifier": "an end user's identifier",
            "service_tier": "there is one tier",
            "prompt_cache_key": "prefixes are matched by content",
            "prompt_cache_retention": "the prefix cache is bounded by memory",
            "prompt_cache_options": "the prefix cache is bounded by memory",
            "max_tool_calls": "the server runs no tools of its own",
            "stream_options": "nothing is padded",
        },
    ),
    (
        "refused",
        {
            "background": ("stream it instead", (False,)),
            "background_options": "stream it instead",
            "conversation": "use previous_response_id",
            "context_management": ("prompts are not edited", ([],)),
            "truncation": ("a prompt over the context is a 400 in any case", ("disabled", "auto")),
            "prompt": "there are no stored prompts",
            "moderation": "there is no moderation",
            "access_programs": "there are none",
            "image": "text only",
        },
    ),
)

TOOL: Table = table(
    (
        "honoured",
        {
            "type": "function",
            "name": "given to the chat template",
            "description": "given to the chat template",
            "parameters": "given to the chat template",
            "strict": "true: calls keep to the schema; default false",
        },
    ),
    (
        "refused",
        {
            "defer_loading": ("every tool is shown to the model", (False,)),
            "allowed_callers": ("only the model calls tools", (["direct"],)),
            "output_schema": "outputs are not checked",
            "async": ("a call is answered in the next request", (False,)),
        },
    ),
)

NAMESPACE: Table = table(
    (
        "honoured",
        {
            "type": "namespace",
            "name": "calls are of NAME__TOOL in the prompt, and name both in the answer",
            "description": "stands before its first tool's",
            "tools": "functions, as above",
        },
    ),
)

WEB_SEARCH: Table = table(
    (
        "advisory",
        dict.fromkeys(
            (
                "type",
                "external_web_access",
                "index_gated_web_access",
                "filters",
                "user_location",
                "search_context_size",
                "search_content_types",
                "return_token_budget",
            ),
            "a search is never made: the model is not shown it",
        ),
    ),
)

TOOL_CHOICE: Table = table(
    ("honoured", {"type": "function", "name": "the function that has to be called"}),
)

FORMAT: Table = table(
    (
        "honoured",
        {
            "type": "text, json_object or json_schema",
            "schema": "what the answer follows; see docs/structured-output.md",
        },
    ),
    (
        "advisory",
        {
            "name": "not shown to the model",
            "description": "not shown to the model",
            "strict": "the schema is followed exactly in any case",
        },
    ),
)

_ITEM: dict[str, Row] = {"id": "an earlier item's name", "status": "what is here is whole"}

ITEMS: Mapping[str, Table] = {
    "message": table(
        (
            "honoured",
            {
                "type": "message, which is also the default",
                "role": "system, developer (as system), user or assistant",
                "content": "a string, or parts",
            },
        ),
        ("advisory", {**_ITEM, "phase": "the client's own note"}),
    ),
    "function_call": table(
        (
            "honoured",
            {
                "type": "function_call",
                "call_id": "the call's name, which its output gives",
                "name": "given to the chat template",
                "namespace": "given to the chat template, before the name",
                "arguments": "JSON, as a text",
            },
        ),
        ("advisory", {**_ITEM, "caller": "only the model calls tools"}),
        ("refused", {"async": ("a call is answered in the next request", (False,))}),
    ),
    "function_call_output": table(
        (
            "honoured",
            {
                "type": "function_call_output",
                "call_id": "the call that it answers",
                "output": "a string, or parts",
            },
        ),
        (
            "advisory",
            {
                **_ITEM,
                "name": "the call has it",
                "namespace": "the call has it",
                "caller": "only the model calls tools",
            },
        ),
    ),
    "reasoning": table(
        (
            "honoured",
            {
                "type": "reasoning",
                "content": "parts, given to the chat template",
                "summary": "parts, given where there is no content",
            },
        ),
        ("advisory", {**_ITEM, "encrypted_content": "only who made it can read it"}),
    ),
}
"""By an item's type; others are refused by it."""

_BESIDE_TEXT: dict[str, Row] = {
    "annotations": "what an earlier text came with",
    "logprobs": "what an earlier text came with",
    "cache_control": "prefixes are matched by content",
    "prompt_cache_breakpoint": "prefixes are matched by content",
}
TEXT_PART: Table = table(
    (
        "honoured",
        {
            "type": "input_text, output_text, text, summary_text or reasoning_text",
            "text": "parts are joined by newlines",
        },
    ),
    ("advisory", dict(_BESIDE_TEXT)),
)
REFUSAL: Table = table(
    ("honoured", {"type": "refusal", "refusal": "as a text"}), ("advisory", dict(_BESIDE_TEXT))
)

TEXT: Table = table(
    ("honoured", {"format": "text, json_object or json_schema"}),
    ("refused", {"verbosity": ("ask for it in the prompt", ("medium",))}),
)

REASONING: Table = table(
    ("honoured", {"effort": "for the chat template; a 400 where it has no place for it"}),
    (
        "advisory",
        {
            "summary": "reasoning is shown as it is",
            "generate_summary": "reasoning is shown as it is",
        },
    ),
    (
        "refused",
        {
            "context": ("the chat template decides", ("auto",)),
            "mode": ("there is one mode", ("standard",)),
        },
    ),
)

ROUTES: Mapping[str, Table] = {
    "/v1/responses": RESPONSES,
    "/v1/responses tools[]": TOOL,
    "/v1/responses namespace in tools[]": NAMESPACE,
    "/v1/responses web_search in tools[]": WEB_SEARCH,
    "/v1/responses tool_choice": TOOL_CHOICE,
    "/v1/responses text": TEXT,
    "/v1/responses text.format": FORMAT,
    "/v1/responses reasoning": REASONING,
    **{f"/v1/responses {kind} item": item for kind, item in ITEMS.items()},
    "/v1/responses text part": TEXT_PART,
    "/v1/responses refusal part": REFUSAL,
}
