"""The official clients against a served SmolLM2: one server, and the same answer in every dialect.

instructor and LiteLLM, in an environment of their own: tests/contract/test_foreign_clients.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import add as join
from pathlib import Path
from typing import Any, Literal

import anthropic
import ollama
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

from contract.served import serving

pytestmark = [pytest.mark.slow, pytest.mark.model]

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
PROMPT_TOKENS = 37
"""With SmolLM2's chat template, whose default system message is part of it."""
ANSWER_TOKENS = 8
"""And the token that ends the turn."""


class Pet(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]


@pytest.fixture(scope="module")
def url(model_dir: Path) -> Iterator[str]:
    with serving([model_dir], "--served-model-name", "m", "--model-aliases", "claude-*") as url:
        yield url


def test_openai(url: str) -> None:
    sdk = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=600)
    asked: Any = {"model": "m", "messages": QUESTION, "temperature": 0, "max_tokens": 16}
    whole = sdk.chat.completions.create(**asked, logprobs=True)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (ANSWER, "stop")
    assert whole.usage is not None and whole.choices[0].logprobs is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (PROMPT_TOKENS, ANSWER_TOKENS)  # fmt: skip
    assert all(token.logprob <= 0 for token in whole.choices[0].logprobs.content or ())
    with sdk.chat.completions.stream(**asked) as stream:
        assert stream.get_final_completion().choices[0].message.content == ANSWER
    response = sdk.responses.create(
        model="m", input="What is the capital of France?", temperature=0, max_output_tokens=16
    )
    assert response.output_text == ANSWER
    drawn = [
        sdk.completions.create(model="m", prompt="One, two,", max_tokens=9, seed=s).choices[0].text
        for s in (1, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1, "the seed counts"


def test_anthropic(url: str) -> None:
    sdk = anthropic.Anthropic(base_url=url, api_key="x", max_retries=0, timeout=600)
    asked: Any = {
        "model": "claude-next",
        "messages": QUESTION,
        "max_tokens": 16,
        "extra_body": {"temperature": 0},
    }
    whole = sdk.messages.create(**asked)
    assert [block.to_dict() for block in whole.content] == [{"type": "text", "text": ANSWER}]
    assert (whole.stop_reason, whole.usage.output_tokens) == ("end_turn", ANSWER_TOKENS)
    counted = sdk.messages.count_tokens(model="claude-next", messages=QUESTION)
    assert counted.input_tokens == PROMPT_TOKENS
    with sdk.messages.stream(**asked) as stream:
        assert len(list(stream.text_stream)) > 4
        final = stream.get_final_message()
    assert [block.to_dict() for block in final.content] == [{"type": "text", "text": ANSWER}]
    assert final.usage.output_tokens == ANSWER_TOKENS
    stopped = sdk.messages.create(**asked, stop_sequences=[" is"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " is")
    assert stopped.content[0].to_dict()["text"] == "The capital of France"
    begun: Any = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    answer = sdk.messages.create(**(asked | {"messages": begun}))
    assert answer.content[0].to_dict()["text"] == " Paris."


def test_ollama(url: str) -> None:
    sdk = ollama.Client(host=url, timeout=600)
    options = {"temperature": 0, "num_predict": 16}
    whole = sdk.chat("m:latest", messages=QUESTION, options=options)
    assert (whole.message.content, whole.done_reason) == (ANSWER, "stop")
    assert (whole.prompt_eval_count, whole.eval_count) == (PROMPT_TOKENS, ANSWER_TOKENS)
    parts = list(sdk.chat("m", messages=QUESTION, options=options, stream=True))
    assert "".join(part.message.content or "" for part in parts) == ANSWER and len(parts) > 4
    told = sdk.generate("m", "What is the capital of France?", options=options)
    assert told.response == ANSWER
    pet = sdk.chat("m", messages=QUESTION, format=Pet.model_json_schema(), options=options)
    assert Pet.model_validate_json(pet.message.content or "")
    assert (sdk.show("m").modelinfo or {})["llama.context_length"] == 8192


def test_langchain(url: str) -> None:
    def chat(**settings: Any) -> ChatOpenAI:
        settings = {"temperature": 0, "max_tokens": 16, "timeout": 600, **settings}
        return ChatOpenAI(model="m", base_url=f"{url}/v1", api_key="x", max_retries=0, **settings)  # type: ignore[arg-type]  # fmt: skip

    for responses in (False, True):
        model = chat(use_responses_api=responses)
        assert model.invoke(QUESTION).text == ANSWER
        streamed = reduce(join, model.stream(QUESTION))
        assert streamed.text == ANSWER
    assert [m.text for m in chat().batch([QUESTION] * 3)] == [ANSWER] * 3
    structured = chat(max_tokens=60)
    assert isinstance(structured.with_structured_output(Pet).invoke(QUESTION), Pet)
