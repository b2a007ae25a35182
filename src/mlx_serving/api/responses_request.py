"""The body of OpenAI's /v1/responses → a `GenerateRequest`. Every refusal names its field."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mlx_serving.api import responses_fields as fields
from mlx_serving.api import responses_tools
from mlx_serving.api.body import MAX_MESSAGES, convert, read_object, seed_in_64_bits, spelled
from mlx_serving.api.disposition import check
from mlx_serving.api.responses_items import messages_of
from mlx_serving.content import structured
from mlx_serving.errors import InvalidRequest
from mlx_serving.types import (
    MAX_LOGPROBS,
    ChatPrompt,
    GenerateRequest,
    Grammar,
    Message,
    SamplingParams,
)

_MAX_INT = 2**31 - 1
LOGPROBS = "message.output_text.logprobs"

Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponsesCall(msgspec.Struct, frozen=True, kw_only=True):
    request: GenerateRequest
    stream: bool
    store: bool
    messages: tuple[Message, ...]
    """The conversation up to the answer, without instructions."""
    echo: dict[str, Any]
    """What the response says again of the request."""
    namespaces: Mapping[str, tuple[str, str]]
    """The namespace and name of a tool, by the name that the model is shown."""
    advisory: tuple[str, ...]


class _Body(msgspec.Struct, kw_only=True):
    """None: the client did not say."""

    input: str | Annotated[list[dict[str, Any]], Meta(max_length=MAX_MESSAGES)]
    model: Annotated[str, Meta(min_length=1)] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=_MAX_INT)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    include: list[Include] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    seed: int | None = None


class _Reasoning(msgspec.Struct):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


SHAPES: Mapping[str, type[msgspec.Struct]] = {
    "/v1/responses": _Body,
    "/v1/responses reasoning": _Reasoning,
}

Recall = Callable[[str], Sequence[Message] | None]
"""The messages of a stored response."""


def parse_response(data: bytes, *, default_model: str, recall: Recall) -> ResponsesCall:
    """Raises InvalidRequest, UnsupportedParameter."""
    raw = read_object(data)
    advisory = check(fields.RESPONSES, raw)
    body = convert(raw, _Body)
    effort = _effort(body.reasoning, advisory)
    check(fields.TEXT, body.text or {}, at="text.")
    wants_logprobs = LOGPROBS in (body.include or ())
    if body.top_logprobs and not wants_logprobs:
        raise InvalidRequest(f"'top_logprobs' needs '{LOGPROBS}' in 'include'.", param="include")
    offered = responses_tools.offered(body.tools or (), body.tool_choice, body.parallel_tool_calls)
    use = offered.use
    messages = (*_recalled(body.previous_response_id, recall), *messages_of(body.input))
    request = GenerateRequest(
        request_id="resp_" + secrets.token_hex(24),
        model=body.model or default_model,
        prompt=ChatPrompt(
            messages=_with_instructions(body.instructions, messages),
            tools=use.tools,
            tool_choice=use.tool_choice,
            strict_tools=use.strict_tools,
            parallel_tool_calls=use.parallel_tool_calls,
            reasoning_effort=effort,
        ),
        sampling=SamplingParams(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
        ),
        max_tokens=body.max_output_tokens,
        seed=seed_in_64_bits(body.seed),
        grammar=_format(body.text),
    )
    return ResponsesCall(
        request=request,
        stream=bool(body.stream),
        store=body.store is not False,
        messages=messages,
        echo=_echo(body, effort),
        namespaces=offered.namespaces,
        advisory=(*advisory, *offered.advisory),
    )


def _echo(body: _Body, effort: str | None) -> dict[str, Any]:
    text = body.text or {}
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": effort, "summary": None},
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [_told(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
    }


def _told(tool: dict[str, Any]) -> dict[str, Any]:
    return {"strict": False, **tool} if tool.get("type") == "function" else tool


def _effort(raw: dict[str, Any] | None, advisory: list[str]) -> str | None:
    advisory += check(fields.REASONING, raw or {}, at="reasoning.")
    return convert(raw or {}, _Reasoning, at="reasoning").effort


def _format(text: dict[str, Any] | None) -> Grammar | None:
    """The Responses API has the schema beside its type; chat completions one level deeper."""
    given = (text or {}).get("format")
    if given is None:
        return None
    flat = convert(given, dict[str, Any], at="text.format")
    check(fields.FORMAT, flat, at="text.format.")
    flat = {name: value for name, value in flat.items() if name in fields.FORMAT}
    nested = dict(flat)
    if flat.get("type") == "json_schema":
        schema = {k: v for k, v in flat.items() if k != "type"}
        nested = {"type": "json_schema", "json_schema": schema}
    with spelled((".json_schema", "")):
        return structured.response_format(nested, param="text.format")


def _recalled(response_id: str | None, recall: Recall) -> Sequence[Message]:
    if response_id is None:
        return ()
    messages = recall(response_id)
    if messages is None:
        raise InvalidRequest(
            f"Response '{response_id[:100]}' is not stored (any more).",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return messages


def _with_instructions(
    instructions: str | None, messages: tuple[Message, ...]
) -> tuple[Message, ...]:
    """System messages at the beginning become one: chat templates know one at most."""
    count = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    texts = [instructions, *(m.content for m in messages[:count])]
    system = "\n\n".join(text for text in texts if text)
    head = (Message(role="system", content=system),) if system else ()
    return head + messages[count:]
