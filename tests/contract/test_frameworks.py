"""LangChain over its OpenAI package, against a real server with models that say what they are told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import reduce
from operator import add as join
from typing import Any, Literal

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field

from contract.served import serving

WORDS = "Grüße, 🤔 Welt!"
AGENT = (
    "<think>Hm.</think>Let me add.\n"
    '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": 2}}\n</tool_call>'
)
TOOLS = (
    "{{ tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{# <tool_call> #}"
)
THINKING = TOOLS + "{# <think> </think> #}"


class Pet(BaseModel):
    """A pet."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=6)
    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=130)


def add(x: int, y: int) -> int:
    """Adds two numbers."""
    return x + y


@pytest.fixture(scope="module")
def url(scripted_once: Any) -> Iterator[str]:
    models = [
        scripted_once("plain", text=WORDS, context=4096),
        scripted_once("agent", text=AGENT, context=4096, chat_template=THINKING),
        scripted_once("hash", mode="hash", context=4096, chat_template=TOOLS),
    ]
    with serving(models) as url:
        yield url


@pytest.fixture
def chat(url: str) -> Any:
    def chat(model: str, **settings: Any) -> ChatOpenAI:
        settings = {"api_key": "x", "max_retries": 0, "timeout": 60, **settings}
        return ChatOpenAI(model=model, base_url=url + "/v1", **settings)

    return chat


def test_chat_whole_and_streamed(chat: Any, url: str) -> None:
    model = chat("plain", temperature=0, stream_usage=True)
    whole = model.invoke("Hi")
    assert whole.content == WORDS
    assert whole.usage_metadata["output_tokens"] == len(WORDS.encode()) + 1
    streamed = reduce(join, model.stream("Hi"))
    assert isinstance(streamed, AIMessageChunk)
    assert streamed.content == WORDS
    assert streamed.usage_metadata is not None
    assert streamed.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    assert [m.content for m in model.batch(["a", "b"])] == [WORDS] * 2
    cut = chat("plain", stop_sequences=["🤔"]).invoke("Hi")
    assert cut.content == "Grüße, "
    told = chat("hash", logprobs=True, top_logprobs=2, max_tokens=3, seed=1).invoke("x")
    assert len(told.response_metadata["logprobs"]["content"]) == 3
    assert OpenAI(model="plain", base_url=url + "/v1", api_key="x", max_tokens=64).invoke("Hi") == WORDS  # type: ignore[arg-type]  # fmt: skip


async def test_chat_asynchronously(chat: Any) -> None:
    pieces = [piece.content async for piece in chat("plain").astream("Hi")]
    assert "".join(pieces) == WORDS


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_tools(chat: Any, responses: bool) -> None:
    model = chat("agent", use_responses_api=responses).bind_tools([add])
    whole = model.invoke("1 + 2?")
    (call,) = whole.tool_calls
    assert (call["name"], call["args"]) == ("add", {"x": 1, "y": 2})
    assert whole.text.strip() == "Let me add."
    streamed = reduce(join, model.stream("1 + 2?"))
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [("add", {"x": 1, "y": 2})]
    assert streamed.text.strip() == "Let me add."
    answered = [HumanMessage("1 + 2?"), whole, ToolMessage("3", tool_call_id=call["id"])]
    assert model.invoke(answered).tool_calls


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: Any, method: str) -> None:
    model = chat("hash", seed=3, max_tokens=300).with_structured_output(Pet, method=method)
    pet = model.invoke("Which pet?")
    assert isinstance(pet, Pet)
    assert model.invoke("Which pet?") == pet, "the seed counts"
    assert reduce(lambda _, piece: piece, model.stream("Which pet?")) == pet


def test_json_mode(chat: Any) -> None:
    said = chat(
        "hash", seed=3, max_tokens=300, model_kwargs={"response_format": {"type": "json_object"}}
    )
    assert isinstance(json.loads(said.invoke("Which pet?").content), dict)  # fmt: skip
