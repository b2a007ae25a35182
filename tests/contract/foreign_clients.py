"""Run by an environment of its own (test_foreign_clients.py): instructor and LiteLLM, whose pins of
the OpenAI package are not ours. Prints what the clients made of the answers, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import instructor
import litellm
import openai
from pydantic import BaseModel, ConfigDict, Field

PREFIXES = {"openai/": "/v1", "anthropic/": "", "ollama_chat/": "", "ollama/": ""}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
        },
    },
}


class Pet(BaseModel):
    """A pet."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=6)
    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=130)


def pets(url: str, model: str) -> dict[str, Any]:
    """What instructor reads in each of its modes, whole and in parts."""
    found: dict[str, Any] = {}
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        sdk = openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0, timeout=120)
        client = instructor.from_openai(sdk, mode=mode)
        asked: dict[str, Any] = {
            "model": model,
            "response_model": Pet,
            "messages": [{"role": "user", "content": "Which pet?"}],
            "seed": 3,
            "max_tokens": 300,
            "max_retries": 0,
        }
        whole = client.chat.completions.create(**asked)
        *_, last = client.chat.completions.create_partial(**asked)
        found[mode.name] = [whole.model_dump(), last.model_dump()]
    return found


def ask(url: str, prefix: str, model: str, **wishes: Any) -> dict[str, Any]:
    """One answer through LiteLLM; a stream is put together by LiteLLM too."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    answer = litellm.completion(
        model=prefix + model,
        api_base=url + PREFIXES[prefix],
        api_key="x",
        messages=messages,
        timeout=120,
        **wishes,
    )
    if wishes.get("stream"):
        answer = litellm.stream_chunk_builder(list(answer))
    message = answer.choices[0].message
    calls = [[c.function.name, json.loads(c.function.arguments)] for c in message.tool_calls or ()]
    return {
        "content": message.content,
        "reasoning": getattr(message, "reasoning_content", None),
        "calls": calls,
        "finish_reason": answer.choices[0].finish_reason,
    }


def main(url: str, real: str) -> None:
    """`real`: the name of a model that has arithmetic."""
    litellm.suppress_debug_info = True
    wishes: dict[str, dict[str, Any]] = {"whole": {}, "streamed": {"stream": True}}
    told: dict[str, Any] = {"pets": pets(url, "hash"), "real pets": pets(url, real)}
    for name, how in wishes.items():
        for prefix in PREFIXES:
            cut = {"temperature": 0, "max_tokens": 7, "stop": ["Welt"], "top_p": 0.9}
            told[f"{prefix} {name}"] = ask(url, prefix, "plain", **how)
            told[f"{prefix} {name} cut"] = ask(url, prefix, "plain", **how, **cut)
            told[f"{prefix} {name} real"] = ask(
                url, prefix, real, **how, temperature=0, max_tokens=12
            )
            if prefix != "ollama/":  # it asks for JSON in words instead of calling tools
                told[f"{prefix} {name} tools"] = ask(url, prefix, "agent", **how, tools=[TOOL])
    print(json.dumps(told))


main(*sys.argv[1:])
