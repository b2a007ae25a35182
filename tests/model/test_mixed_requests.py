"""Thirty-two requests at once on SmolLM2: schemas, seeds, log-probabilities, tools, streams, plain. Each
gives what it gives alone; what is constrained is valid, and what a slow oracle samples."""

from __future__ import annotations

import asyncio
import json
import re
import string
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import openai
import pytest
import regex
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from contract.served import serving
from mlx_serving.runtime.backend.loader import load
from mlx_serving.runtime.backend.sampler import base_key
from mlx_serving.worker.wire import ModelOptions

pytestmark = [pytest.mark.slow, pytest.mark.model]

PET: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
PLACE: dict[str, Any] = {
    "type": "array",
    "prefixItems": [{"type": "number", "minimum": -90, "maximum": 90}, {"type": "boolean"}],
    "items": False,
    "minItems": 2,
}
TOOL = {"type": "function", "function": {"name": "adopt", "strict": True, "parameters": PET}}
FORCED = {"type": "function", "function": {"name": "adopt"}}
CHOICES = ["yes", "no", "maybe"]
CODE = "[A-F]{3}-[0-9]{2}"
WHITE_SPACE = r"[ \n\t]{1,20}"
"""The server's bound, as an expression."""


LETTERS = r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4}){0,%d}"'
"""A JSON string."""


def schema_of(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def wish(i: int) -> dict[str, Any]:
    """The i-th request: every eighth is of one kind."""
    return {
        "messages": [{"role": "user", "content": f"Tell me about pet number {i}."}],
        "seed": 100 + i,
        "max_tokens": 100,
        "temperature": 0 if i < 8 else 0.9,
        **[
            {"response_format": schema_of(PET)},
            {"max_tokens": 24},
            {"response_format": schema_of(PLACE), "logprobs": True, "top_logprobs": 3, "n": 2},
            {"extra_body": {"guided_choice": CHOICES}},
            {"extra_body": {"guided_regex": CODE}, "frequency_penalty": 0.7},
            {"max_tokens": 24, "stop": ["the"], "logprobs": True, "top_p": 0.9},
            {"tools": [TOOL], "tool_choice": FORCED, "max_tokens": 160},
            {"response_format": schema_of(PET), "stream": True},
        ][i % 8],
    }


Answer = list[tuple[str, str, Any]]
"""Of each choice: its text or its call's arguments, how it ended, its log-probabilities."""


@pytest.fixture(scope="module")
def url(model_dir: Path) -> Iterator[str]:
    with serving([model_dir], "--served-model-name", "real", "--max-num-seqs", "32") as url:
        yield url


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client:
        yield client


async def ask(client: openai.AsyncOpenAI, i: int) -> Answer:
    told: Any = await client.chat.completions.create(model="real", **wish(i))
    if wish(i).get("stream"):
        chunks = [chunk async for chunk in told]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return [(text, chunks[-1].choices[0].finish_reason, None)]
    return [_choice(choice) for choice in told.choices]


def _choice(choice: Any) -> tuple[str, str, Any]:
    calls, logprobs = choice.message.tool_calls, choice.logprobs
    text = calls[0].function.arguments if calls else choice.message.content
    values = [entry.logprob for entry in logprobs.content] if logprobs else None
    return text, choice.finish_reason, values


def check(i: int, answer: Answer) -> None:
    """What a constrained answer promises."""
    for text, ended, logprobs in answer:
        match i % 8:
            case 0 | 2 | 6 | 7:
                jsonschema.validate(json.loads(text), PLACE if i % 8 == 2 else PET)
                assert ended == ("tool_calls" if i % 8 == 6 else "stop")
            case 3:
                assert text in CHOICES
            case 4:
                assert re.fullmatch(CODE, text)
            case 5:
                assert "the" not in text and len(logprobs) <= 24


async def test_thirty_two_at_once(client: openai.AsyncOpenAI) -> None:
    together = await asyncio.gather(*(ask(client, i) for i in range(32)))
    for i, answer in enumerate(together):
        check(i, answer)
    for i, answer in enumerate(together):
        alone = await ask(client, i)
        assert [c[:2] for c in alone] == [c[:2] for c in answer], wish(i)
        for (_, _, a), (_, _, b) in zip(alone, answer, strict=True):
            assert a == b or np.allclose(a, b, atol=1e-3)
    assert len({answer[0][0] for answer in together[::8]}) > 1, "seeds and prompts must tell"


ALPHABET = string.printable + "\u00e9"
BLANK = r"(?:[ \n\t]{1,20})?"
PATTERNS = {
    "pet": BLANK.join(
        [
            r"\{", '"name"', ":", LETTERS % 8, ",", '"age"', ":", "(?:[0-9]|[12][0-9]|30)", ",",
            '"kind"', ":", '(?:"cat"|"dog")', ",", '"tags"', ":", r"\[",
            f"(?:{LETTERS % 6}{BLANK}(?:,{BLANK}{LETTERS % 6}{BLANK})?)?" r"\]", r"\}",
        ]
    ),
    "choice": "|".join(CHOICES),
    "code": CODE,
}  # fmt: skip
"""What may be said, without our compiler or its library."""


def _forced(pattern: str, so_far: str) -> str:
    """The text that has to follow."""
    text = ""
    while not regex.fullmatch(pattern, so_far + text):
        ways = [c for c in ALPHABET if regex.fullmatch(pattern, so_far + text + c, partial=True)]
        if len(ways) != 1:
            break
        text += ways[0]
    return text


class Oracle:
    """One whole forward a token, no batch, no cache, no mask: the likeliest token that leaves what was
    said the beginning of something that the request allows."""

    def __init__(self, folder: Path) -> None:
        loaded = load("oracle", folder, ModelOptions(max_num_seqs=1), lambda phase, detail: None)
        self._model: Any = loaded.runner._model
        self._eos = loaded.info.eos_token_ids
        self._vocab = loaded.info.vocab_size
        text = (folder / "tokenizer.json").read_text()
        self._spell = Tokenizer.from_str(text)
        self._pieces = [self._spell.decode([i]) for i in range(self._vocab)]
        self._vocabulary = LLTokenizer(text, n_vocab=self._vocab, eos_token=list(self._eos))

    def answer(self, prompt: list[int], i: int, choice: int) -> str:
        out: list[int] = []
        while not set(out) & set(self._eos):
            logits = np.array(self._model(mx.array([[*prompt, *out]]))[0, -1], np.float32)
            wished = wish(i)
            penalty = wished.get("frequency_penalty", 0.0)
            logits -= np.float32(penalty) * np.bincount(out, minlength=self._vocab)
            if (temperature := wished["temperature"]) > 0:
                high, low = base_key(wished["seed"], choice)
                key = mx.array([high, low ^ (len(prompt) + len(out))], dtype=mx.uint32)
                noise = np.array(mx.random.gumbel((self._vocab,), key=key))
                logits = logits / np.float32(temperature) + noise
            best = (int(token) for token in np.argsort(-logits, kind="stable"))
            may_come = self._place(out) if i % 8 == 2 else self._spelled(i, out)
            out.append(next(token for token in best if may_come(token)))
        return str(self._spell.decode(out[:-1]))

    def _spelled(self, i: int, out: list[int]) -> Callable[[int], bool]:
        """By the pattern, which is independent of what compiles grammars."""
        pattern = PATTERNS[{3: "choice", 4: "code"}.get(i % 8, "pet")]
        so_far = self._spell.decode(out)
        ids = self._spell.encode(_forced(pattern, so_far), add_special_tokens=False).ids

        def may_come(token: int) -> bool:
            if token in self._eos:
                return regex.fullmatch(pattern, so_far) is not None
            if len(ids) > 1:
                # Text that is forced has the tokens that it would have in a prompt.
                return token == ids[0]
            piece = self._pieces[token]
            return bool(piece) and bool(regex.fullmatch(pattern, so_far + piece, partial=True))

        return may_come

    def _place(self, out: list[int]) -> Callable[[int], bool]:
        """By a matcher that begins anew for each token: ranges of decimals make no short pattern."""
        options: Any = {"whitespace_pattern": WHITE_SPACE, "item_separator": ",", "key_separator": ":"}  # fmt: skip
        grammar = LLMatcher.grammar_from_json_schema(PLACE, overrides=options)
        matcher = LLMatcher(self._vocabulary, grammar)
        assert matcher.consume_tokens(out)
        allowed = np.frombuffer(matcher.compute_logit_bias(), np.uint8)
        return lambda token: bool(allowed[token])


CHECKED = (0, 3, 4, 8, 11)
"""Schemas, choices and expressions, at either temperature."""


async def test_constrained_answers_are_the_oracles(
    client: openai.AsyncOpenAI, model_dir: Path
) -> None:
    oracle = Oracle(model_dir)
    together = await asyncio.gather(*(ask(client, i) for i in CHECKED))
    for i, told in zip(CHECKED, together, strict=True):
        body = {"model": "real", "messages": wish(i)["messages"]}
        prompt: Any = await client.post("/../tokenize", body=body, cast_to=object)
        for choice, (text, _, _) in enumerate(told):
            assert oracle.answer(prompt["tokens"], i, choice) == text, (i, choice)
