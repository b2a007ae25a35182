"""Anthropic's wire bodies → `GenerateRequest`s. Every refusal names its field."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mlx_serving.api import anthropic_fields as fields
from mlx_serving.api.body import (
    MAX_MESSAGES,
    convert,
    read_object,
    refuse,
    seed_in_64_bits,
    spelled,
    stop_strings,
    string_of,
)
from mlx_serving.api.disposition import check
from mlx_serving.content.structured import json_schema
from mlx_serving.content.tools.definitions import ToolUse, tool_use
from mlx_serving.errors import InvalidRequest
from mlx_serving.types import ChatPrompt, GenerateRequest, Grammar, Message, SamplingParams

_MAX_INT = 2**31 - 1
_BILLING = re.compile(r"\A\s*x-anthropic-billing-header:[^\n]*(?:\n+|\Z)")
"""Claude Code puts a line into the system text that differs in every request, so no two prompts
would have a prefix in common."""
_EFFORT = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}


class MessagesCall(msgspec.Struct, frozen=True, kw_only=True):
    request: GenerateRequest
    stream: bool
    show_thinking: bool
    advisory: tuple[str, ...]


class _Prompt(msgspec.Struct, kw_only=True):
    """What both routes honour. None: the client did not say."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MAX_MESSAGES)]
    model: Annotated[str, Meta(min_length=1)] | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None


class _Body(_Prompt, kw_only=True):
    max_tokens: Annotated[int, Meta(ge=1, le=_MAX_INT)]
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=_MAX_INT)] | None = None
    seed: int | None = None


class _Tool(msgspec.Struct, kw_only=True):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class _Thinking(msgspec.Struct, kw_only=True):
    type: Literal["enabled", "adaptive", "disabled"]
    display: Literal["summarized", "omitted"] | None = None


class _Format(msgspec.Struct, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class _OutputConfig(msgspec.Struct, kw_only=True):
    format: _Format | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class _ToolChoice(msgspec.Struct, kw_only=True):
    type: Literal["auto", "none", "any", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _Message(msgspec.Struct, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


SHAPES: Mapping[str, type[msgspec.Struct]] = {
    "/v1/messages": _Body,
    "/v1/messages/count_tokens": _Prompt,
    "/v1/messages tools[]": _Tool,
    "/v1/messages tool_choice": _ToolChoice,
    "/v1/messages thinking": _Thinking,
    "/v1/messages output_config": _OutputConfig,
    "/v1/messages output_config.format": _Format,
    "/v1/messages messages[]": _Message,
}


def parse_messages(data: bytes, *, default_model: str) -> MessagesCall:
    """The body of /v1/messages. Raises InvalidRequest, UnsupportedParameter."""
    raw = read_object(data)
    advisory = check(fields.MESSAGES, raw)
    body = convert(raw, _Body)
    output = _output_config(body.output_config)
    thinking, prompt = _prompt(body, advisory, output.effort)
    given = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k")}
    return MessagesCall(
        request=GenerateRequest(
            request_id="msg_" + secrets.token_hex(12),
            model=body.model or default_model,
            prompt=prompt,
            sampling=SamplingParams(**{k: v for k, v in given.items() if v is not None}),
            max_tokens=body.max_tokens,
            seed=seed_in_64_bits(body.seed),
            stop=stop_strings(body.stop_sequences or [], "stop_sequences"),
            grammar=_grammar(output),
        ),
        stream=bool(body.stream),
        show_thinking=thinking is None or thinking.display != "omitted",
        advisory=tuple(advisory),
    )


def parse_count(data: bytes, *, default_model: str) -> tuple[str, ChatPrompt, list[str]]:
    """The body of /v1/messages/count_tokens: the model, the prompt, the advisory fields."""
    raw = read_object(data)
    advisory = check(fields.COUNT_TOKENS, raw)
    body = convert(raw, _Prompt)
    effort = _output_config(body.output_config).effort
    return body.model or default_model, _prompt(body, advisory, effort)[1], advisory


def _prompt(
    body: _Prompt, advisory: list[str], effort: str | None
) -> tuple[_Thinking | None, ChatPrompt]:
    """The prompt; nested advisory fields are added to `advisory`."""
    kwargs: dict[str, Any] = {"reasoning_effort": _EFFORT[effort]} if effort else {}
    thinking = _thinking(body.thinking, advisory)
    if thinking is not None:
        kwargs["enable_thinking"] = thinking.type != "disabled"
    _check_edits(body.context_management)
    use = _offered(body, advisory)
    messages = [message for message in [_system(body.system)] if message is not None]
    for i, raw in enumerate(body.messages):
        messages += _turn(raw, f"messages[{i}]", advisory)
    continued = messages[-1].role == "assistant"
    if continued and (messages[-1].tool_calls or not messages[-1].content):
        at = f"messages[{len(body.messages) - 1}].content"
        raise InvalidRequest(
            "An assistant's last message is continued and needs text to continue.", param=at
        )
    return thinking, ChatPrompt(
        messages=tuple(messages),
        tools=use.tools,
        tool_choice=use.tool_choice,
        strict_tools=use.strict_tools,
        parallel_tool_calls=use.parallel_tool_calls,
        template_kwargs=kwargs,
        add_generation_prompt=not continued,
        continue_final_message=continued,
    )


def _thinking(raw: dict[str, Any] | None, advisory: list[str]) -> _Thinking | None:
    if raw is None:
        return None
    advisory += check(fields.THINKING, raw, at="thinking.")
    return convert(raw, _Thinking, at="thinking")


def _output_config(raw: dict[str, Any] | None) -> _OutputConfig:
    check(fields.OUTPUT_CONFIG, raw or {}, at="output_config.")
    output = convert(raw or {}, _OutputConfig, at="output_config")
    if raw and output.format:
        check(fields.FORMAT, raw["format"], at="output_config.format.")
    return output


def _grammar(output: _OutputConfig) -> Grammar | None:
    if output.format is None:
        return None
    return json_schema(output.format.schema, param="output_config.format.schema")


def _check_edits(raw: dict[str, Any] | None) -> None:
    """Claude Code asks to keep all thinking; other edits would change the prompt."""
    check(fields.EDITS, raw or {}, at="context_management.")
    edits = (raw or {}).get("edits")
    for i, edit in enumerate(
        convert(edits or [], list[dict[str, Any]], at="context_management.edits")
    ):
        if edit.get("keep") != "all":
            raise refuse(f"context_management.edits[{i}]", "prompts are not edited")
        check(fields.EDIT, edit, at=f"context_management.edits[{i}].")


def _tool(raw: dict[str, Any], at: str, advisory: list[str]) -> dict[str, Any]:
    """A tool in OpenAI's shape."""
    kind = raw.get("type")
    if isinstance(kind, str) and kind != "custom":
        # What else such a tool has is not ours to know.
        raise refuse(f"{at}.type", "tools that Anthropic's servers run are not here")
    advisory += [name for name in check(fields.TOOL, raw, at=at + ".") if name not in advisory]
    tool = convert(raw, _Tool, at=at)
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": function}


def _offered(body: _Prompt, advisory: list[str]) -> ToolUse:
    tools = [_tool(tool, f"tools[{i}]", advisory) for i, tool in enumerate(body.tools or ())]
    check(fields.TOOL_CHOICE, body.tool_choice or {}, at="tool_choice.")
    choice = convert(body.tool_choice or {"type": "auto"}, _ToolChoice, at="tool_choice")
    chosen: Any = {"any": "required"}.get(choice.type, choice.type)
    if choice.type == "tool":
        chosen = {"type": "function", "function": {"name": choice.name}}
    with spelled((".function.parameters", ".input_schema"), (".function", "")):
        return tool_use(tools, chosen, not choice.disable_parallel_tool_use)


def _system(system: str | list[dict[str, Any]] | None) -> Message | None:
    if isinstance(system, list):
        texts = [_text(block, f"system[{i}]") for i, block in enumerate(system)]
    else:
        texts = [system or ""]
    if texts:
        texts[0] = _BILLING.sub("", texts[0])
    text = "\n".join(text for text in texts if text)
    return Message(role="system", content=text) if text else None


_ROLES = {
    "text": ("user", "assistant", "system"),
    "thinking": ("assistant",),
    "redacted_thinking": ("assistant",),
    "tool_use": ("assistant",),
    "tool_result": ("user",),
}


def _block_kind(block: dict[str, Any], at: str) -> str:
    kind = block.get("type")
    if not isinstance(kind, str):
        raise InvalidRequest(f"'{at}.type' must be a string.", param=f"{at}.type")
    if kind not in fields.BLOCKS:
        raise refuse(at, f"blocks of type '{kind[:64]}' are not read, only text and tools")
    check(fields.BLOCKS[kind], block, at=f"{at}.")
    return kind


def _text(block: dict[str, Any], at: str) -> str:
    if _block_kind(block, at) != "text":
        raise refuse(at, "only text can be here")
    return string_of(block, "text", at)


def _turn(raw: dict[str, Any], at: str, advisory: list[str]) -> list[Message]:
    """One of Anthropic's turns; tool results become messages of their own."""
    check(fields.MESSAGE, raw, at=f"{at}.")
    turn = convert(raw, _Message, at=at)
    if isinstance(turn.content, str):
        return [Message(role=turn.role, content=turn.content)]
    kinds = []
    for j, block in enumerate(turn.content):
        where = f"{at}.content[{j}]"
        kind = _block_kind(block, where)
        if turn.role not in _ROLES[kind]:
            raise InvalidRequest(f"A {turn.role}'s turn has no {kind} blocks.", param=where)
        if "cache_control" in block and "cache_control" not in advisory:
            advisory.append("cache_control")
        kinds.append((kind, block, where))
    if not kinds:
        raise InvalidRequest(f"'{at}.content' has no blocks.", param=f"{at}.content")
    return [_assistant(kinds)] if turn.role == "assistant" else _user(turn.role, kinds)


_Blocks = list[tuple[str, dict[str, Any], str]]


def _assistant(blocks: _Blocks) -> Message:
    texts, thoughts, calls = [], [], []
    for kind, block, at in blocks:
        if kind == "text":
            texts.append(string_of(block, "text", at))
        elif kind == "thinking":
            thoughts.append(string_of(block, "thinking", at))
        elif kind == "tool_use":
            calls.append(_tool_use(block, at))
    return Message(
        role="assistant",
        content="\n".join(texts) if texts or not calls else None,
        reasoning_content="\n".join(thoughts) or None,
        tool_calls=tuple(calls),
    )


def _tool_use(block: dict[str, Any], at: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"'{at}.input' must be an object.", param=f"{at}.input")
    function = {
        "name": string_of(block, "name", at),
        "arguments": msgspec.json.encode(arguments).decode(),
    }
    return {"id": string_of(block, "id", at), "type": "function", "function": function}


def _user(role: str, blocks: _Blocks) -> list[Message]:
    messages: list[Message] = []
    texts: list[str] = []

    def flush() -> None:
        if texts:
            messages.append(Message(role=role, content="\n".join(texts)))
            texts.clear()

    for kind, block, at in blocks:
        if kind == "text":
            texts.append(string_of(block, "text", at))
        else:
            flush()
            messages.append(_tool_result(block, at))
    flush()
    return messages


def _tool_result(block: dict[str, Any], at: str) -> Message:
    content = block.get("content")
    if isinstance(content, list):
        parts = convert(content, list[dict[str, Any]], at=f"{at}.content")
        text = "\n".join(_text(part, f"{at}.content[{k}]") for k, part in enumerate(parts))
    elif content is None or isinstance(content, str):
        text = content or ""
    else:
        where = f"{at}.content"
        raise InvalidRequest(f"'{where}' must be a string or blocks.", param=where)
    failed = block.get("is_error")
    if not isinstance(failed, bool | None):
        raise InvalidRequest(f"'{at}.is_error' must be true or false.", param=f"{at}.is_error")
    # Chat templates have no place for it; the text says it.
    text = f"Error: {text}" if failed else text
    return Message(role="tool", content=text, tool_call_id=string_of(block, "tool_use_id", at))
