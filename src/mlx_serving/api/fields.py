"""Every field of a request and what becomes of it: the tables that the parsers and the docs read.

`disposition` says what honoured, advisory and refused mean. OpenAI's tables are here, another
dialect's beside its parser.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from mlx_serving.api import (
    anthropic_fields,
    embeddings_fields,
    inner_fields,
    ollama_fields,
    responses_fields,
    tokens_fields,
)
from mlx_serving.api.disposition import Disposition, Field, Row, Table, check
from mlx_serving.api.disposition import table as _table

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "MESSAGE",
    "ROUTES",
    "STREAM_OPTIONS",
    "Disposition",
    "Field",
    "Table",
    "check",
    "markdown",
]

_SAMPLING = {
    "model": "a served model's id or alias, MODEL+ADAPTER too; default: the first served model",
    "adapters": "an adapter's name, or its folder as configured: short for MODEL+NAME as the model",
    "stream": "server-sent events, one a token",
    "stream_options": "include_usage: a last chunk with usage; only with stream",
    "n": "1 to 16 answers; the prompt is counted once",
    "temperature": "0 to 2, default 1; 0 is greedy",
    "top_p": "above 0, to 1",
    "top_k": "0 or -1: the whole vocabulary",
    "min_p": "0 to 1",
    "repetition_penalty": "above 0, to 100; 1 is off",
    "presence_penalty": "-2 to 2",
    "frequency_penalty": "-2 to 2",
    "logit_bias": "token id to -100 ... 100, up to 1,024 entries",
    "seed": "-2^63 to 2^64-1, taken modulo 2^64; default: drawn, and said in x-mlx-serving-seed",
    "stop": "a string or up to 16, each 1 to 1,024 characters",
    "stop_token_ids": "up to 128 token ids",
    "min_tokens": "no end before this many tokens",
    "ignore_eos": "the end-of-sequence token does not end the answer",
    "include_stop_str_in_output": "the stop string stays in the text",
    "priority": "critical, high, normal, low; or an integer: to -10 critical, -9 to -1 high, 0 normal, above low",
    "timeout": "seconds, up to 86,400, from the request's arrival; an answer that is not complete by then ends with a 504, and is not begun where that is foreseen",
    "response_format": "text, json_object or json_schema, which is followed exactly, strict or not; see docs/structured-output.md",
    "structured_outputs": "one of json, regex, choice, grammar (Lark), json_object",
    "guided_json": "as structured_outputs.json",
    "guided_regex": "as structured_outputs.regex",
    "guided_choice": "as structured_outputs.choice",
    "guided_grammar": "as structured_outputs.grammar",
    "grammar": "GBNF, the notation of llama.cpp's server; empty: none",
    "cache_salt": "1 to 256 characters; requests share cached prefixes only with equal salts",
}
_ADVISORY = {
    "user": "an end user's identifier; keeps them on one variant of a rollout (docs/rollouts.md)",
    "safety_identifier": "an end user's identifier",
    "metadata": "the client's own notes",
    "store": "nothing is stored",
    "service_tier": "there is one tier; see priority",
    "prompt_cache_key": "prefixes are matched by content",
    "prompt_cache_retention": "the prefix cache is bounded by memory",
    "prompt_cache_options": "the prefix cache is bounded by memory",
    "prediction": "a hint for speed",
}
_REFUSED: dict[str, Row] = {
    "prompt_logprobs": "log-probabilities of the prompt are not computed",
    "best_of": ("ask for n answers and choose", (1,)),
    "use_beam_search": ("there is no beam search", (False,)),
    "length_penalty": ("there is no beam search", (1, 1.0)),
    "early_stopping": ("there is no beam search", (False,)),
    "skip_special_tokens": ("special tokens are never part of the text", (True,)),
    "spaces_between_special_tokens": ("special tokens are never part of the text", (True,)),
    "truncate_prompt_tokens": "a prompt over the context is a 400",
    "allowed_token_ids": "use logit_bias",
    "bad_words": ("use logit_bias", ([],)),
    "typical_p": ("not implemented", (1, 1.0)),
    "xtc_probability": ("not implemented", (0, 0.0)),
    "xtc_threshold": ("not implemented", (0, 0.0)),
    "repetition_context_size": "repetition_penalty looks at the whole prompt and output",
    "presence_context_size": "presence_penalty looks at the whole output",
    "frequency_context_size": "frequency_penalty looks at the whole output",
    "request_id": "send it as the header x-request-id",
    "cache_prompt": ("prefixes are always reused; see cache_salt", (True,)),
    "draft_model": "speculation is not built yet",
    "num_draft_tokens": "speculation is not built yet",
    "return_token_ids": ("not implemented", (False,)),
    "return_tokens_as_token_ids": ("not implemented", (False,)),
    "moderation": "there is no moderation",
}

CHAT: Table = _table(
    (
        "honoured",
        {
            "messages": "roles system, developer (as system), user, assistant, tool; text content",
            **_SAMPLING,
            "max_tokens": "default: the server's, or what the context leaves, which -1 asks for",
            "max_completion_tokens": "the same as max_tokens; both only if equal",
            "logprobs": "true: the chosen tokens' log-probabilities",
            "top_logprobs": "0 to 20; only with logprobs",
            "chat_template_kwargs": "variables for the chat template",
            "tools": "up to 128 functions, their schemas up to 65,536 characters and 64 levels; strict ones' arguments keep to their schemas; not with a response_format that constrains",
            "tool_choice": "auto, none, required or a function; the last two where the model's format for calls can be forced",
            "parallel_tool_calls": "false: the answer ends with its first call",
            "reasoning_effort": "none, minimal, low, medium, high or xhigh, where the chat template reads it; none also where it can switch thinking off",
            "add_generation_prompt": "default true, or false with continue_final_message",
            "continue_final_message": "the last message is left open and continued",
        },
    ),
    ("advisory", dict(_ADVISORY)),
    (
        "refused",
        {
            **_REFUSED,
            "functions": ("deprecated by OpenAI in favour of tools", ([],)),
            "function_call": ("deprecated by OpenAI in favour of tools", ("none", "auto")),
            "verbosity": ("ask for it in the prompt", ("medium",)),
            "include_reasoning": ("reasoning is always told apart", (True,)),
            "thinking_token_budget": "thinking ends by itself or at max_tokens",
            "modalities": ("text only", (["text"],)),
            "audio": "text only",
            "web_search_options": "there is no web search",
            "echo": ("only on /v1/completions", (False,)),
            "add_special_tokens": ("the chat template adds them", (False,)),
            "chat_template": "the server's setting, not a request's",
            "documents": ("use chat_template_kwargs", ([],)),
            "role_mapping": "the chat template decides",
        },
    ),
)

COMPLETIONS: Table = _table(
    (
        "honoured",
        {
            "prompt": "a string, token ids, or up to 256 of either",
            **_SAMPLING,
            "max_tokens": "default: the server's, or OpenAI's 16; -1: what the context leaves",
            "logprobs": "0 to 20: the chosen tokens' and that many most likely tokens' log-probabilities",
            "echo": "the prompt's text comes first; not with logprobs",
            "add_special_tokens": "default true: the tokenizer's begin-of-sequence token and the like",
        },
    ),
    ("advisory", dict(_ADVISORY)),
    ("refused", {**_REFUSED, "suffix": ("filling in the middle is not built", ("",))}),
)

STREAM_OPTIONS: Table = _table(
    ("honoured", {"include_usage": "a last chunk with usage and no choices"}),
    ("advisory", {"include_obfuscation": "nothing is padded"}),
    ("refused", {"continuous_usage_stats": ("usage comes once, at the end", (False,))}),
)

MESSAGE: Table = _table(
    (
        "honoured",
        {
            "role": "system, developer, user, assistant or tool",
            "content": "a string or text parts, which are joined by newlines; null where an assistant said nothing",
            "name": "given to the chat template",
            "tool_calls": "an assistant's earlier calls, given to the chat template",
            "tool_call_id": "the call that a tool message answers",
            "reasoning_content": "an assistant's earlier reasoning, given to the chat template",
        },
    ),
    (
        "refused",
        {
            "refusal": "send it as content",
            "audio": "text only",
            "function_call": "deprecated by OpenAI in favour of tool_calls",
            "annotations": ("not part of a prompt", ([],)),
        },
    ),
)

ROUTES: Mapping[str, Table] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "stream_options": STREAM_OPTIONS,
    "messages[]": MESSAGE,
    **inner_fields.ROUTES,
    **responses_fields.ROUTES,
    **embeddings_fields.ROUTES,
    **anthropic_fields.ROUTES,
    **ollama_fields.ROUTES,
    **tokens_fields.ROUTES,
}


def markdown() -> str:
    """The tables as the docs show them, a section a route."""
    lines: list[str] = []
    for route, table in ROUTES.items():
        lines += [f"### `{route}`", "", "| field | | note |", "|---|---|---|"]
        for field in table.values():
            neutral = ", ".join(f"`{msgspec.json.encode(v).decode()}`" for v in field.neutral)
            note = f"{field.note} (accepted: {neutral})" if neutral else field.note
            lines.append(f"| `{field.name}` | {field.disposition} | {note} |")
        lines.append("")
    return "\n".join(lines)
