"""Every dialect's own client against a real server: processes, sockets and the whole way between,
with models that say what they are told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import ollama
import openai
import pydantic
import pytest

from contract.served import serving

AGENT = (
    "<think>Hmm… 🤔</think>Ich addiere.\n"
    '<tool_call>\n{"name": "add", "arguments": {"x": 1, "wo": "Köln"}}\n</tool_call>'
)
TEMPLATE = (
    "{{ tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{# how it writes: <tool_call> <think> </think> #}"
)
ARGUMENTS = {"x": 1, "wo": "Köln"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "wo": {"type": "string"}},
}
MESSAGES: Any = [{"role": "user", "content": "Grüße"}]
# The template that a model without one gets here (ChatML), around one message.
CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
ECHOED = "user\nGrüße\nassistant\n"
"""What the echoing model says: its prompt without control tokens."""


@pytest.fixture(scope="module")
def url(scripted_once: Any) -> Iterator[str]:
    models = [
        scripted_once("agent", text=AGENT, context=4096, chat_template=TEMPLATE),
        scripted_once("echo", mode="echo", context=200_000),
        scripted_once("endless", mode="cycle", token_ids=[97], context=200_000, step_delay_ms=5),
    ]
    with serving(models, "--model-aliases", "claude-*=agent", "--ping-interval-s", "0.2") as url:
        yield url


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


def test_anthropics_client(url: str) -> None:
    sdk = anthropic.Anthropic(base_url=url, api_key="x", max_retries=0, timeout=120)
    tool: Any = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}
    asked: Any = {
        "model": "claude-next",
        "max_tokens": 600,
        "messages": MESSAGES,
        "tools": [tool],
        "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    whole = sdk.messages.create(**asked)
    thinking, text, call = whole.content
    assert (thinking.type, thinking.thinking) == ("thinking", "Hmm… 🤔")
    assert (text.type, text.text.strip()) == ("text", "Ich addiere.")
    assert (call.type, call.name, call.input) == ("tool_use", "add", ARGUMENTS)
    assert (whole.stop_reason, whole.model) == ("tool_use", "claude-next")
    with sdk.messages.stream(**asked) as stream:
        final = stream.get_final_message()

    def content(message: Any) -> list[Any]:
        return [{k: v for k, v in b.to_dict().items() if k != "id"} for b in message.content]

    assert content(final) == content(whole)
    assert final.usage.output_tokens == whole.usage.output_tokens > 0
    counted = sdk.messages.count_tokens(**{k: v for k, v in asked.items() if k != "max_tokens"})
    usage = whole.usage
    read, written = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
    assert read is not None and written is not None
    assert counted.input_tokens == usage.input_tokens + read + written
    assert read + written > 0, "its prompt has a whole block, found or left"

    result = {"type": "tool_result", "tool_use_id": call.id, "content": "2"}
    again = [*MESSAGES, whole.to_param(), {"role": "user", "content": [result]}]
    assert sdk.messages.create(**(asked | {"messages": again})).stop_reason == "tool_use"
    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.create(**(asked | {"model": "gpt-5"}))
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        sdk.messages.create(**(asked | {"max_tokens": 0}))


def test_stop_sequences_and_prefilled_answers(url: str) -> None:
    sdk = anthropic.Anthropic(base_url=url, api_key="x", max_retries=0, timeout=120)
    asked: Any = {"model": "echo", "max_tokens": 600, "messages": MESSAGES}
    assert sdk.messages.create(**asked).content[0].to_dict()["text"] == ECHOED
    stopped = sdk.messages.create(**asked, stop_sequences=["zzz", "ße"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "ße")
    assert stopped.content[0].to_dict()["text"] == "user\nGrü"
    begun = [*MESSAGES, {"role": "assistant", "content": "Also ("}]
    answer = sdk.messages.create(**(asked | {"messages": begun})).content[0].to_dict()["text"]
    assert answer == ECHOED + "Also ("
    cut = sdk.messages.create(**(asked | {"max_tokens": 5}))
    assert (cut.stop_reason, cut.content[0].to_dict()["text"]) == ("max_tokens", "user")


def test_an_agents_long_prompt(http: httpx.Client) -> None:
    """What Claude Code sends: a billing line that differs each time, fields of its own, and a prompt
    of a hundred and fifty thousand tokens."""
    texts = []
    for cch in ("a1", "b2"):
        body = {
            "model": "echo",
            "max_tokens": 64,
            "stream": True,
            "system": [
                {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2; cch={cch};"},
                {"type": "text", "text": "You are x."},
            ],
            "messages": [{"role": "user", "content": "word " * 30_000}],
            "metadata": {"user_id": "u"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "output_config": {"effort": "medium"},
        }
        headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "x", "x-api-key": "x"}
        response = http.post("/v1/messages?beta=true", json=body, headers=headers)
        assert response.status_code == 200, response.text
        assert "event: message_stop" in response.text
        data = [json.loads(x[6:]) for x in response.text.splitlines() if x.startswith("data: ")]
        assert data[-1]["type"] == "message_stop"
        (start,) = [d["message"]["usage"] for d in data if d["type"] == "message_start"]
        assert sum(count for name, count in start.items() if name != "output_tokens") > 150_000
        pieces = [d["delta"].get("text", "") for d in data if d["type"] == "content_block_delta"]
        texts.append("".join(pieces))
    assert texts[0] == texts[1]
    assert texts[0].startswith("system\nYou are x.")


def test_ollamas_client(url: str) -> None:
    sdk = ollama.Client(host=url, timeout=120)
    tool: Any = {
        "type": "function",
        "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA},
    }
    whole = sdk.chat("agent:latest", messages=MESSAGES, tools=[tool], options={"num_predict": 600})
    assert whole.message.thinking == "Hmm… 🤔"
    assert (whole.message.content or "").strip() == "Ich addiere."
    (call,) = whole.message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("add", ARGUMENTS)
    parts = list(sdk.chat("agent", messages=MESSAGES, tools=[tool], stream=True))
    assert "".join(part.message.thinking or "" for part in parts) == "Hmm… 🤔"
    calls = [c.function.arguments for part in parts for c in part.message.tool_calls or ()]
    assert calls == [ARGUMENTS]
    last = parts[-1]
    assert (last.done, last.done_reason) == (True, "stop")
    durations = (last.load_duration, last.prompt_eval_duration, last.eval_duration)
    assert all(isinstance(d, int) and d >= 0 for d in durations)
    assert sum(d or 0 for d in durations) == pytest.approx(last.total_duration, abs=2_000_000)
    again = [*MESSAGES, whole.message, {"role": "tool", "tool_name": "add", "content": "2"}]
    assert sdk.chat("agent", messages=again, tools=[tool]).message.tool_calls

    assert sdk.generate("echo", "Grüße").response == ECHOED
    assert sdk.generate("echo", "Grüße", raw=True).response == "Grüße"
    text = sdk.generate("echo", "x", format={"enum": ["rot", "blau"]}, options={"seed": 3}).response
    assert json.loads(text or "") in ("rot", "blau")
    assert sdk.generate("echo", "").done_reason == "load"
    names = {"agent:latest", "echo:latest", "endless:latest"}
    assert {m.model for m in sdk.list().models} == names == {m.model for m in sdk.ps().models}
    assert sdk.show("echo").modelinfo["scripted.context_length"] == 200_000
    assert sdk.show("agent").capabilities == ["completion", "tools", "thinking"]
    with pytest.raises(ollama.ResponseError, match=r"options\.mirostat"):
        sdk.generate("echo", "x", options={"mirostat": 2})


def test_openais_chat(url: str) -> None:
    sdk = openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0, timeout=120)
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
    asked: Any = {"model": "agent", "messages": MESSAGES, "tools": [tool]}
    whole = sdk.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert (whole.message.content or "").strip() == "Ich addiere."
    assert whole.message.to_dict()["reasoning_content"] == "Hmm… 🤔"
    (call,) = whole.message.to_dict()["tool_calls"]  # type: ignore[misc]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (
        "add",
        ARGUMENTS,
    )
    with sdk.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "tool_calls.function.arguments.delta"} <= kinds
    assert (final.choices[0].message.tool_calls or ())[0].function.name == "add"
    assert final.usage is not None and final.usage.completion_tokens > 0
    result: Any = {"role": "tool", "tool_call_id": call["id"], "content": "2"}
    again = sdk.chat.completions.create(**asked | {"messages": [*MESSAGES, whole.message, result]})
    assert again.choices[0].message.tool_calls

    told = sdk.chat.completions.create(model="echo", messages=MESSAGES, n=2, logprobs=True)
    assert [choice.message.content for choice in told.choices] == [ECHOED] * 2
    assert told.choices[0].logprobs is not None
    texts = sdk.completions.create(model="echo", prompt=["ab", "cd"], max_tokens=9, echo=True)
    assert [choice.text for choice in texts.choices] == ["abab", "cdcd"]
    cut = sdk.chat.completions.create(model="echo", messages=MESSAGES, stop=["ße"], seed=3)
    assert cut.choices[0].message.content == "user\nGrü"
    assert [model.id for model in sdk.models.list()] == ["agent", "echo", "endless"]
    assert sdk.models.retrieve("echo").id == "echo"
    with pytest.raises(openai.BadRequestError) as wrong:
        sdk.chat.completions.create(model="echo", messages=MESSAGES, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        sdk.chat.completions.create(model="gpt-5", messages=MESSAGES)


class Colour(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: Literal["rot", "blau"]
    shade: int = pydantic.Field(ge=0, le=9)


def test_openais_parsed_answers(url: str) -> None:
    sdk = openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0, timeout=120)
    told = sdk.chat.completions.parse(
        model="echo", messages=MESSAGES, response_format=Colour, seed=1, max_tokens=99
    )
    assert isinstance(told.choices[0].message.parsed, Colour)
    with sdk.chat.completions.stream(
        model="echo", messages=MESSAGES, response_format=Colour, seed=1, max_tokens=99
    ) as stream:
        assert (
            stream.get_final_completion().choices[0].message.parsed
            == told.choices[0].message.parsed
        )
    answer = sdk.responses.parse(model="echo", input="Grüße", text_format=Colour)
    assert isinstance(answer.output_parsed, Colour)


def test_openais_responses(url: str) -> None:
    sdk = openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0, timeout=120)
    tool: Any = {"type": "function", "name": "add", "parameters": SCHEMA, "strict": False}
    asked: Any = {"model": "agent", "input": "Grüße", "tools": [tool]}
    whole = sdk.responses.create(**asked)
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert whole.output_text.strip() == "Ich addiere."
    call = whole.output[-1].to_dict()
    assert (call["name"], json.loads(str(call["arguments"]))) == ("add", ARGUMENTS)
    with sdk.responses.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.output_text == whole.output_text
    assert final.usage is not None and whole.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens

    output: Any = [{"type": "function_call_output", "call_id": call["call_id"], "output": "2"}]
    second = sdk.responses.create(
        model="echo", input=output, previous_response_id=whole.id, instructions="Kurz."
    )
    assert second.output_text.startswith("system\nKurz.\nuser\nGrüße\nassistant\n")
    assert second.output_text.endswith("tool\n2\nassistant\n")
    cut = sdk.responses.create(model="echo", input="Grüße", max_output_tokens=5)
    assert (cut.status, cut.output_text) == ("incomplete", "user")
    text: Any = {"format": {"type": "json_schema", "name": "c", "schema": {"enum": ["rot"]}}}
    assert sdk.responses.create(model="echo", input="x", text=text).output_text == '"rot"'


def test_tokens_there_and_back(http: httpx.Client) -> None:
    body = {"model": "echo", "messages": MESSAGES}
    told = http.post("/tokenize", json=body).json()
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), 200_000)
    back = http.post("/detokenize", json={"model": "echo", "tokens": told["tokens"]}).json()
    assert back == {"prompt": CHATML.format("Grüße")}
    chat = http.post("/v1/chat/completions", json=body | {"max_tokens": 1}).json()
    assert chat["usage"]["prompt_tokens"] == told["count"]
    wrong = http.post("/detokenize", json={"model": "echo", "tokens": [259]}).json()
    assert wrong["error"]["param"] == "tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_cancelling(http: httpx.Client, url: str, stream: bool) -> None:
    body = {"model": "endless", "messages": MESSAGES, "max_tokens": 100_000, "stream": stream}
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(
            httpx.post(
                f"{url}/v1/messages", json=body, headers={"x-request-id": "mine"}, timeout=60
            )
        )

    thread = threading.Thread(target=ask)
    thread.start()
    while (cancelled := http.post("/v1/requests/mine/cancel")).status_code == 404:
        assert thread.is_alive(), "it ended by itself"
    assert cancelled.json()["cancelled"] is True
    thread.join(60)
    (answer,) = answers
    assert answer.status_code == (200 if stream and "message_start" in answer.text else 499)
    assert '"code":"cancelled"' in answer.text
    assert http.get("/health").json()["open_requests"] == 0


def test_the_document_and_the_page(http: httpx.Client) -> None:
    assert http.get("/openapi.json").json()["openapi"] == "3.1.0"
    assert http.get("/docs").text.startswith("<!doctype html>")
    assert http.get("/", headers={"user-agent": "ollama/0.13.0"}).text == "Ollama is running"
