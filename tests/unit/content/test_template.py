"""Chat templates against transformers' rendering of the same."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers as hf
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from mlx_serving.content.reasoning import reasoning_in
from mlx_serving.content.template import (
    CHATML,
    CHATML_TOOLS,
    ChatTemplate,
    load_templates,
    template_message,
)
from mlx_serving.content.text import TextSide
from mlx_serving.content.tokenizer import Tokenizer
from mlx_serving.content.tools.select import family_in
from mlx_serving.errors import InvalidRequest, ModelBroken
from mlx_serving.types import ChatPrompt, Message

# Each in the manner of a family, with what its real templates lean on.
TEMPLATES = {
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "chatml": CHATML,
    "llama3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    "gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
""",
    "mistral": """{%- set loop_messages = messages %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
""",
    "qwen3": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and reasoning_content %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set tool_call = tool_call.function or tool_call %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}
                {{- tool_call.arguments }}
            {%- else %}
                {{- tool_call.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    "generation_and_loops": """{% for m in messages %}
  {% if m.role == 'system' %}{% continue %}{% endif %}
  {% if m.role == 'assistant' %}
    {% generation %}A {{ m.content }}
    {% endgeneration %}
  {% else %}
U {{ m.content }} {{ m.thinking }}
  {% endif %}
  {% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{% macro end(x='end') %}[{{ x }}]{% endmacro %}
{{ end() }}{{ dict(a=1) | tojson }}{{ pad_token }}{{ unk_token }}
""",
}

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather <now> & 'soon' in a städtchen",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
)
CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Köln & <b>"}},
}
USER, SYSTEM = (
    Message(role="user", content=" Weather in 漢字? <b>"),
    Message(role="system", content="Be brief. "),
)
ANSWER = Message(role="assistant", content="  Sunny.\n", reasoning_content="hm\n")
CONVERSATIONS: dict[str, tuple[Message, ...]] = {
    "user": (USER,),
    "system": (SYSTEM, USER),
    "turns": (
        SYSTEM,
        USER,
        ANSWER,
        USER,
        Message(role="assistant", content="<think>\na\n</think>\n\nb"),
        USER,
    ),
    "answered": (USER, ANSWER),
    "tools": (
        USER,
        Message(role="assistant", tool_calls=(CALL,)),
        Message(role="tool", content='{"t": 20}', tool_call_id="call12345", name="get_weather"),
        ANSWER,
    ),
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def reference(source: str | dict[str, str], backend: hf.Tokenizer) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    made.chat_template = source
    return made


def plain(prompt: ChatPrompt) -> list[dict[str, Any]]:
    """As a client of transformers would pass them: no key without a value."""
    messages = [msgspec.to_builtins(message) for message in prompt.messages]
    return [{k: v for k, v in message.items() if v} for message in messages]


@pytest.mark.parametrize(
    ("family", "conversation", "tools", "generate"),
    list(itertools.product(TEMPLATES, CONVERSATIONS, (False, True), (False, True))),
)
def test_equals_transformers(
    backends: dict[str, hf.Tokenizer], family: str, conversation: str, tools: bool, generate: bool
) -> None:
    prompt = ChatPrompt(
        messages=CONVERSATIONS[conversation],
        tools=TOOLS if tools else (),
        add_generation_prompt=generate,
        template_kwargs={"enable_thinking": False, "date_string": "1 Jan 2026"},
    )
    theirs = reference(TEMPLATES[family], backends["byte_level"])
    ours = ChatTemplate({"default": TEMPLATES[family]}, SPECIAL)

    def expected(messages: list[dict[str, Any]]) -> str:
        return theirs.apply_chat_template(  # type: ignore[no-any-return]
            messages,
            tools=list(prompt.tools) or None,
            tokenize=False,
            add_generation_prompt=generate,
            **prompt.template_kwargs,
        )

    try:
        wanted = expected(plain(prompt))
    except Exception:
        assert conversation != "user"
        # Where a template cannot do without content, ours gives it an empty one.
        try:
            wanted = expected([{"content": "", **message} for message in plain(prompt)])
        except Exception as error:
            with pytest.raises(InvalidRequest) as caught:
                ours.render(prompt)
            assert caught.value.param == "messages"
            assert str(error) in caught.value.message
            return
    assert ours.render(prompt) == wanted


@pytest.mark.parametrize("family", TEMPLATES)
def test_no_family_s_tokens_can_be_spelt(family: str) -> None:
    """All that a template writes between angle or square brackets is a control token here."""
    template = TEMPLATES[family]
    names = sorted({*re.findall(r"<[^<>{}'\" ]+>|\[/?[A-Z_]+\]", template), "<bos>"})
    backend = hf.Tokenizer(models.BPE({chr(i): i for i in range(128)}, []))
    backend.add_special_tokens(names)
    text = TextSide(Tokenizer(backend), ChatTemplate({"default": template}, SPECIAL))

    def controls(content: str) -> list[int]:
        prompt = ChatPrompt(messages=(Message(role="user", content=content),))
        return [i for i in text.encode_prompt(prompt) if i in text.tokenizer.special_ids]

    for name in names:
        assert controls(f"a{name}b") == controls("ab"), name


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_continued_message_equals_transformers(
    backends: dict[str, hf.Tokenizer], family: str
) -> None:
    prompt = ChatPrompt(
        messages=(USER, Message(role="assistant", content="The sky is ")),
        add_generation_prompt=False,
        continue_final_message=True,
    )
    theirs = reference(TEMPLATES[family], backends["byte_level"])
    expected = theirs.apply_chat_template(
        plain(prompt), tokenize=False, continue_final_message=True
    )
    assert ChatTemplate({"default": TEMPLATES[family]}, SPECIAL).render(prompt) == expected
    assert expected.rstrip().endswith("The sky is")


def test_named_templates_are_chosen_as_transformers_does(backends: dict[str, hf.Tokenizer]) -> None:
    sources = {
        "default": "plain {{ messages[0].content }}",
        "tool_use": "tools {{ tools | tojson }}",
    }
    theirs = reference(sources, backends["byte_level"])
    for tools in ((), TOOLS):
        prompt = ChatPrompt(messages=(USER,), tools=tools)
        expected = theirs.apply_chat_template(
            plain(prompt), tools=list(tools) or None, tokenize=False
        )
        assert ChatTemplate(sources).render(prompt) == expected
        assert (
            ChatTemplate(sources).source(tools=bool(tools))
            == sources["tool_use" if tools else "default"]
        )
    with pytest.raises(InvalidRequest, match="no default"):
        ChatTemplate({"rag": "x"}).render(ChatPrompt(messages=(USER,)))


def test_arguments_on_the_wire_are_text_and_templates_see_an_object() -> None:
    def arguments(value: Any) -> Any:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": value}}
        message = Message(role="assistant", tool_calls=(call,))
        return template_message(message)["tool_calls"][0]["function"]["arguments"]

    assert arguments('{"a": [1]}') == {"a": [1]}
    assert arguments("") == {}
    assert arguments("not json") == "not json"
    assert arguments("[1]") == "[1]"
    assert arguments({"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("{% for m in messages %}<{{ m.role + m.content }}>{% endfor %}", "<userHi><assistant>"),
        ("{% for m in messages %}<{{ m['role'] + m['content'] }}>{% endfor %}", "<userHi><assistant>"),
        (
            "{% for m in messages %}<{{ 'absent' if m.content is not defined else m.content }}>{% endfor %}",
            "<Hi><absent>",
        ),
    ],
)  # fmt: skip
def test_a_call_without_content(source: str, shown: str) -> None:
    """A template that adds to a text unasked sees an empty one; others that there is none."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = Message(role="assistant", tool_calls=(call,))
    template = ChatTemplate({"default": source})
    assert template.render(ChatPrompt(messages=(Message(role="user", content="Hi"), said))) == shown


def test_the_date_is_the_clocks() -> None:
    template = ChatTemplate({"default": "{{ strftime_now('%Y-%m') }}"}, now=lambda: 1_700_000_000.0)
    assert template.render(ChatPrompt(messages=(USER,))) == "2023-11"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0].missing.deeper }}",
        "{{ messages[0].role + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{% set ns = namespace(_x=1) %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_cannot_render_is_a_400(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate({"default": source}).render(ChatPrompt(messages=(USER,)))
    assert (caught.value.status, caught.value.param) == (400, "messages")
    assert caught.value.message


def test_rendering_is_bounded_in_size_and_time() -> None:
    endless = {
        "default": "{% for i in range(99999) %}{% for j in range(99999) %}xxxx{% endfor %}{% endfor %}"
    }
    ticks = itertools.count()
    with pytest.raises(InvalidRequest, match="too much"):
        ChatTemplate(endless, max_chars=1000).render(ChatPrompt(messages=(USER,)))
    with pytest.raises(InvalidRequest, match="too much"):
        slow = ChatTemplate(endless, clock=lambda: float(next(ticks)), max_render_s=50)
        slow.render(ChatPrompt(messages=(USER,)))


def test_requests_that_no_template_renders() -> None:
    template = ChatTemplate({"default": "{{ messages[0].role }}"})

    def param(prompt: ChatPrompt) -> str | None:
        with pytest.raises(InvalidRequest) as caught:
            template.render(prompt)
        return caught.value.param

    assert param(ChatPrompt(messages=())) == "messages"
    assert (
        param(ChatPrompt(messages=(USER,), template_kwargs={"tools": 1}))
        == "chat_template_kwargs.tools"
    )
    assert (
        param(ChatPrompt(messages=(USER,), continue_final_message=True)) == "continue_final_message"
    )
    silent = ChatPrompt(
        messages=(Message(role="assistant"),),
        continue_final_message=True,
        add_generation_prompt=False,
    )
    assert param(silent) == "messages[0].content"
    left_out = ChatPrompt(
        messages=(USER,), continue_final_message=True, add_generation_prompt=False
    )
    assert param(left_out) == "continue_final_message"


@pytest.mark.parametrize(
    ("name", "family", "reasoning"),
    [
        ("smollm2", None, None),
        ("llama3", "llama3_json", None),
        ("mistral", "mistral", None),
        ("qwen3", "hermes", "think"),
    ],
)
def test_whole_templates_tell_their_format(
    name: str, family: str | None, reasoning: str | None
) -> None:
    found = family_in(TEMPLATES[name])
    assert (found and found.name, reasoning_in(TEMPLATES[name])) == (family, reasoning)


def test_what_a_template_reads() -> None:
    template = ChatTemplate({"default": "{{ messages }}", "tool_use": "{{ tools }}"})
    assert not template.reads("tools") and template.reads("tools", tools=True)


def test_reasoning_effort_needs_a_place() -> None:
    def render(source: str, effort: str) -> str:
        prompt = ChatPrompt(messages=(USER,), reasoning_effort=effort)
        return ChatTemplate({"default": source}).render(prompt)

    assert render("{{ reasoning_effort }}", "low") == "low"
    assert render("{{ enable_thinking }}", "none") == "False"
    for source, effort in (("{{ enable_thinking }}", "low"), ("x", "none")):
        with pytest.raises(InvalidRequest) as error:
            render(source, effort)
        assert error.value.param == "reasoning_effort"


def test_chatml_models_get_tools_in_hermes_words() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
    prompt = ChatPrompt(
        messages=(
            Message(role="system", content="Be brief."),
            USER,
            Message(role="assistant", content="Hm", tool_calls=(call, call)),
            Message(role="tool", content="1"),
            Message(role="tool", content="2"),
        ),
        tools=({"type": "function", "function": {"name": "f"}},),
    )
    text = ChatTemplate({"default": "x", "tool_use": CHATML_TOOLS}).render(prompt)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\n")
    assert '<tools>\n{"type": "function", "function": {"name": "f"}}\n</tools>' in text
    written = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
    assert f"<|im_start|>assistant\nHm\n{written}\n{written}<|im_end|>\n" in text
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_does_not_parse_is_the_models_fault() -> None:
    with pytest.raises(ModelBroken, match="does not parse"):
        ChatTemplate({"default": "{% for %}"})


def test_where_a_folders_templates_are(
    write_folder: Callable[..., Path], backends: dict[str, hf.Tokenizer]
) -> None:
    folder = write_folder(backends["byte_level"], {})
    assert load_templates(folder) == {}
    listed = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    write_folder(backends["byte_level"], {"chat_template": listed})
    assert load_templates(folder) == {"default": "a", "tool_use": "b"}
    write_folder(backends["byte_level"], {"chat_template": "c"})
    assert load_templates(folder) == {"default": "c"}
    write_folder(
        backends["byte_level"], {"chat_template": "c"}, chat_template={"chat_template": "d"}
    )
    assert load_templates(folder) == {"default": "d"}
    (folder / "chat_template.jinja").write_text("e")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("f")
    assert load_templates(folder) == {"default": "e", "tool_use": "f"}
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelBroken, match="cannot be read"):
        load_templates(folder)
