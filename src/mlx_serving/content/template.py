"""Chat templates, rendered as transformers renders them.

A template is Jinja from the model's folder: sandboxed, and bounded in output size, in time
and in the length of a `range`. What goes wrong while it renders is the request's fault as
far as the caller can tell (a role that the template refuses, mostly), so it is an
InvalidRequest on `messages` with the template's own words.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_serving.clock import Clock, monotonic, wall
from mlx_serving.content.bounds import TooMuch, budget
from mlx_serving.content.sandbox import open_environment
from mlx_serving.content.tokenizer import read_json
from mlx_serving.content.turns import fit
from mlx_serving.errors import InvalidRequest, ModelBroken
from mlx_serving.types import ChatPrompt, Message

if TYPE_CHECKING:
    import jinja2

    from mlx_serving.content.control import ControlGuard

MAX_SOURCE_CHARS = 1024 * 1024
MAX_RENDERED_CHARS = 64 * 1024 * 1024
MAX_RENDER_S = 10.0

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""For a model without a template whose vocabulary has ChatML's tokens."""

CHATML_TOOLS = """\
{%- set first = messages[0] %}
{{- '<|im_start|>system\\n' }}
{%- if first.role == 'system' %}{{- first.content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n\\nYou may call one or more functions. Their signatures are within <tools></tools> tags:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\n\\nFor each call, write a JSON object with its name and arguments within tags:\\n<tool_call>\\n{"name": <function>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' }}
{%- for message in messages %}
  {%- if message.role == 'tool' %}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
    {{- '\\n<tool_response>\\n' + (message.content or '') + '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
  {%- elif not (loop.first and message.role == 'system') %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
      {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
      {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
      {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""Tools in Hermes's format, for ChatML models whose own template has no place for them."""

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {}},
    },
}
_PROBE_CALL = {"name": "probe", "arguments": {}}
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """A model's templates by name, `default` and perhaps `tool_use` among them."""

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        *,
        now: Clock = wall,
        clock: Clock = monotonic,
        max_chars: int = MAX_RENDERED_CHARS,
        max_render_s: float = MAX_RENDER_S,
    ) -> None:
        """Raises ModelBroken when a template does not parse."""
        import jinja2
        import jinja2.meta

        environment = open_environment(now)
        self._read: dict[str, frozenset[str]] = {}
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens or {})
        self._clock = clock
        self._max_chars = max_chars
        self._max_render_s = max_render_s
        self._templates: dict[str, jinja2.Template] = {}
        self._taken: dict[tuple[str, tuple[str, ...]], bool] = {}
        for name, source in sources.items():
            if len(source) > MAX_SOURCE_CHARS:
                raise ModelBroken(
                    f"the chat template {name!r} is over {MAX_SOURCE_CHARS} characters"
                )
            try:
                self._templates[name] = environment.from_string(source)
                self._read[name] = frozenset(
                    jinja2.meta.find_undeclared_variables(environment.parse(source))
                )
            except (jinja2.TemplateError, RecursionError) as error:
                raise ModelBroken(f"the chat template {name!r} does not parse: {error}") from error

    def render(self, prompt: ChatPrompt, guard: ControlGuard | None = None) -> str:
        """The conversation as the model's own text, control tokens included; with a guard, those
        that its clients wrote are marked.

        Raises InvalidRequest on `messages` (or `chat_template_kwargs`).
        """
        if not prompt.messages:
            raise InvalidRequest("messages must not be empty", param="messages")
        if clash := _RESERVED & prompt.template_kwargs.keys():
            raise InvalidRequest(
                f"{min(clash)!r} cannot be set here", param=f"chat_template_kwargs.{min(clash)}"
            )
        if prompt.continue_final_message and prompt.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other",
                param="continue_final_message",
            )
        name = self._choose(bool(prompt.tools))
        turns = fit(prompt.messages, functools.partial(self._takes, name))
        absent = self._without_content(name, turns)
        messages = [template_message(message, absent) for message in turns]
        kwargs, tools = dict(prompt.template_kwargs), [dict(tool) for tool in prompt.tools]
        if guard is not None:
            messages = [guard.message(message) for message in messages]
            kwargs, tools = guard.value(kwargs), guard.value(tools)
        if prompt.continue_final_message:
            _tag_final_message(messages)
        text = self._run(
            name,
            {
                **self._special_tokens,
                **self._effort(prompt),
                **kwargs,
                "messages": messages,
                "tools": tools or None,
                "documents": None,
                "add_generation_prompt": prompt.add_generation_prompt,
            },
        )
        return _cut_at_tag(text) if prompt.continue_final_message else text

    @property
    def sources(self) -> Mapping[str, str]:
        """Each template's text by its name."""
        return self._sources

    def source(self, *, tools: bool = False) -> str:
        """The template's text that a request with or without tools is rendered with."""
        return self._sources[self._choose(tools)]

    def reads(self, variable: str, *, tools: bool = False) -> bool:
        """Whether the template has a use for a variable."""
        return variable in self._read[self._choose(tools)]

    def _takes(self, name: str, roles: tuple[str, ...]) -> bool:
        """Whether a template shows every message of a conversation of these roles; found by trying."""
        if (found := self._taken.get((name, roles))) is None:
            messages = [{"role": role, "content": f"probe{i}"} for i, role in enumerate(roles)]
            variables = {
                **self._special_tokens,
                "messages": messages,
                "tools": [_PROBE_TOOL] if name == "tool_use" else None,
                "documents": None,
                "add_generation_prompt": True,
            }
            try:
                text = self._run(name, variables)
            except InvalidRequest:
                text = ""
            found = all(message["content"] in text for message in messages)
            self._taken[name, roles] = found
        return found

    def _without_content(self, name: str, messages: Sequence[Message]) -> str | None:
        """What stands for the content of calls that come alone: nothing, or an empty text where the
        template adds to a text unasked; found by trying."""
        if all(message.content is not None for message in messages):
            return None
        key = (name, ("calls alone",))
        if key not in self._taken:
            self._taken[key] = self._shows_call(name, {}) or not self._shows_call(
                name, {"content": ""}
            )
        return None if self._taken[key] else ""

    def _shows_call(self, name: str, content: Mapping[str, str]) -> bool:
        call = {"id": "call_1", "type": "function", "function": _PROBE_CALL}
        said = {"role": "assistant", **content, "tool_calls": [call]}
        variables = {
            **self._special_tokens,
            "messages": [{"role": "user", "content": "probe"}, said],
            "tools": [_PROBE_TOOL],
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            self._run(name, variables)
        except InvalidRequest:
            return False
        return True

    def _effort(self, prompt: ChatPrompt) -> dict[str, Any]:
        """`reasoning_effort` as the template takes it; some can only switch reasoning off."""
        effort, tools = prompt.reasoning_effort, bool(prompt.tools)
        if effort is None:
            return {}
        if self.reads("reasoning_effort", tools=tools):
            return {"reasoning_effort": effort}
        if effort == "none" and self.reads("enable_thinking", tools=tools):
            return {"enable_thinking": False}
        raise InvalidRequest(
            f"this model's chat template does not know reasoning_effort {effort!r}",
            param="reasoning_effort",
        )

    def _choose(self, tools: bool) -> str:
        if tools and "tool_use" in self._templates:
            return "tool_use"
        if "default" in self._templates:
            return "default"
        raise InvalidRequest(
            f"this model has no default chat template, only {sorted(self._templates)}",
            param="messages",
            code="no_chat_template",
        )

    def _run(self, name: str, variables: Mapping[str, Any]) -> str:
        import jinja2

        chunks: list[str] = []
        size = 0
        try:
            with budget(self._clock, self._max_render_s):
                for chunk in self._templates[name].generate(variables):
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > self._max_chars:
                        raise TooMuch("too much text")
        except (TooMuch, MemoryError) as error:
            raise InvalidRequest(
                f"the chat template makes too much of these messages: {error}", param="messages"
            ) from error
        except (jinja2.TemplateError, ArithmeticError, LookupError, RecursionError) as error:
            raise InvalidRequest(str(error) or type(error).__name__, param="messages") from error
        except (TypeError, ValueError, AttributeError) as error:
            # A template that meets a shape it did not expect, such as no content beside tool calls.
            raise InvalidRequest(
                f"the chat template cannot render these messages: {error}", param="messages"
            ) from error
        return "".join(chunks)


def load_templates(folder: Path) -> dict[str, str]:
    """The templates of a model folder by name; {} when it has none. Raises ModelBroken.

    `chat_template.jinja` and `additional_chat_templates/*.jinja` stand before `chat_template.json`
    and before tokenizer_config.json's `chat_template`, a text or a list of named ones.
    """
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in folder.glob("additional_chat_templates/*.jinja")}
    try:
        found = {name: path.read_text("utf-8") for name, path in files.items() if path.is_file()}
    except (OSError, UnicodeDecodeError) as error:
        raise ModelBroken(f"a chat template in {folder} cannot be read: {error}") from error
    if found:
        return found
    for name in ("chat_template.json", "tokenizer_config.json"):
        if found := _named(read_json(folder / name).get("chat_template")):
            return found
    return {}


def template_message(message: Message, absent: str | None = None) -> dict[str, Any]:
    """A message as templates expect it: absent keys instead of None, arguments as objects. `absent`:
    what stands for no content; None: nothing.

    Reasoning goes by both names that templates read.
    """
    out: dict[str, Any] = {"role": message.role}
    if (content := absent if message.content is None else message.content) is not None:
        out["content"] = content
    if message.reasoning_content is not None:
        out["reasoning_content"] = out["thinking"] = message.reasoning_content
    if message.tool_calls:
        out["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    if message.name is not None:
        out["name"] = message.name
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    return out


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's wire has the arguments as JSON text; templates walk or print an object."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return dict(call)
    if not isinstance(arguments, dict):
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


def _named(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, Mapping):
        return {str(name): source for name, source in value.items() if isinstance(source, str)}
    if isinstance(value, Sequence):
        entries = [entry for entry in value if isinstance(entry, Mapping)]
        return {str(entry.get("name")): str(entry.get("template")) for entry in entries}
    return {}


def _tag_final_message(messages: list[dict[str, Any]]) -> None:
    final = messages[-1]
    if not isinstance(final.get("content"), str):
        raise InvalidRequest(
            "continue_final_message needs a last message with content",
            param=f"messages[{len(messages) - 1}].content",
        )
    final["content"] += _TAG


def _cut_at_tag(text: str) -> str:
    """The text up to the tag. A template that trims contents has trimmed the tag's space: so do we."""
    at = text.rfind(_TAG.strip())
    if at < 0:
        raise InvalidRequest(
            "the chat template leaves the final message out, so it cannot be continued",
            param="continue_final_message",
        )
    head = text[:at]
    return head if text.startswith(_TAG, at) else head.rstrip()
