"""Names from elsewhere: the table itself, and through the engine and its errors."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_serving import Engine, SyncEngine, errors
from mlx_serving.answers import PARAMS
from mlx_serving.config import FIELDS
from mlx_serving.spellings import (
    OPTIONS,
    SETTINGS,
    Refused,
    Renamed,
    find,
    normalise,
    normalise_settings,
    snake_case,
)

SCHEMA = {"type": "object"}
FORMAT = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}

ACCEPTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # The TypeScript engine's GeneratorParams.
    ({"maxTokens": 5, "topP": 0.5, "topK": 3}, {"max_tokens": 5, "top_p": 0.5, "top_k": 3}),
    ({"minP": 0.1, "repetitionPenalty": 1.2}, {"min_p": 0.1, "repetition_penalty": 1.2}),
    (
        {"presencePenalty": 1, "frequencyPenalty": 2},
        {"presence_penalty": 1, "frequency_penalty": 2},
    ),
    ({"stopSequences": ["a"], "stopTokenIds": [1]}, {"stop": ("a",), "stop_token_ids": [1]}),
    ({"structured": {"schema": SCHEMA, "format": "json"}}, {"response_format": FORMAT}),
    # mlx-engine's create_generator.
    ({"temp": 0, "top_logprobs": 2, "max_tokens": 5}, {"temperature": 0, "logprobs": 2, "max_tokens": 5}),
    ({"stop_strings": "x", "json_schema": '{"type": "object"}'}, {"stop": ("x",), "response_format": FORMAT}),
    ({"speculative_decoding_toggle": False, "images_b64": [], "seed": 3}, {"seed": 3}),
    # What is left open asks for nothing; what is unknown stays for the next to name.
    ({"temp": None, "topP": None, "draftModel": None, "max_tokens": 1}, {"max_tokens": 1}),
    ({"max_tokens": None}, {"max_tokens": None}),
    ({"mood": 1, "moodSwing": 2}, {"mood": 1, "moodSwing": 2}),
    ({"timeoutMs": 1500}, {"timeout_s": 1.5}),
    ({"toolChoice": "auto", "ignoreEos": True}, {"tool_choice": "auto", "ignore_eos": True}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "wanted"), ACCEPTED)
def test_options(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert normalise(given, PARAMS, OPTIONS).values == wanted


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"draftModel": "x"}, "draftModel"),
    ({"num_draft_tokens": 3}, "num_draft_tokens"),
    ({"speculative_decoding_toggle": True}, "speculative_decoding_toggle"),
    ({"repetition_context_size": 20}, "repetition_context_size"),
    ({"timeoutMs": 1000, "timeout_s": 1}, "timeout_s"),
    ({"promptTokens": [1]}, "promptTokens"),
    ({"min_tokens_to_keep": True}, "min_tokens_to_keep"),
    ({"json_schema": "{"}, "json_schema"),
    ({"structured": {"schema": {}, "format": "yaml"}}, "structured.format"),
    ({"structured": "x"}, "structured"),
    # Two spellings of one option, in any order.
    ({"max_tokens": 1, "maxTokens": 1}, "maxTokens"),
    ({"maxTokens": 1, "max_tokens": 1}, "max_tokens"),
    ({"temp": 0, "temperature": 1}, "temperature"),
    ({"stop_strings": ["a"], "stopSequences": ["b"]}, "stopSequences"),
    ({"json_schema": "{}", "response_format": FORMAT}, "response_format"),
]


@pytest.mark.parametrize(("given", "param"), REFUSED)
def test_refused_options_are_named(given: dict[str, Any], param: str) -> None:
    with pytest.raises(errors.InvalidRequest) as error:
        normalise(given, PARAMS, OPTIONS)
    assert error.value.param == param
    assert f"'{param}'" in str(error.value)


def test_settings() -> None:
    given = {"model": "m", "maxNumSeqs": 4, "max_kv_size": 512, "trustRemoteCode": False}
    normal = normalise_settings(given, FIELDS)
    assert normal.values == {"models": ("m",), "max_num_seqs": 4, "context_length": 512}
    assert normal.spelled["max_num_seqs"] == "maxNumSeqs"


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"kv_group_size": 64}, "kv_group_size"),
        ({"quantizedKvStart": 5}, "quantizedKvStart"),
        ({"draftModel": "x"}, "draftModel"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"models": ("a",), "model": "b"}, "model"),
        ({"maxNumSeqs": 1, "max_num_seqs": 1}, "max_num_seqs"),
        ({"maxNumSeqs": 0}, "maxNumSeqs"),
        ({"max_kv_size": "x"}, "max_kv_size"),
    ],
)
def test_refused_settings_are_named(settings: dict[str, Any], param: str) -> None:
    with pytest.raises(errors.ConfigError) as error:
        Engine(**settings)
    assert error.value.param == param
    assert param in str(error.value)


@pytest.mark.parametrize(("table", "ours"), [(SETTINGS, FIELDS), (OPTIONS, PARAMS)])
def test_the_tables_are_consistent(table: Any, ours: Any) -> None:
    for name, spelling in table.items():
        assert name not in ours, f"{name} is ours: the table's row can never be reached"
        assert snake_case(name) == name
        match spelling:
            case Renamed(to):
                assert to in ours
            case Refused(instead):
                assert instead and not instead.endswith(".")
    assert all(find(name, ours, table) == Renamed(name) for name in ours)
    camel = {"".join(w if i == 0 else w.title() for i, w in enumerate(n.split("_"))) for n in ours}
    assert all(find(name, ours, table) is not None for name in camel)


async def test_through_the_engine(scripted: Any) -> None:
    folder = str(scripted(text="one STOP two"))
    async with Engine(modelPath=folder, maxNumSeqs=2) as engine:
        assert engine.config.max_num_seqs == 2
        done = await engine.complete("x", maxTokens=50, stopSequences=["STOP"], temp=0)
        assert done.text == "one "
        (answer,) = (await engine.batch(["x"], maxTokens=3, topLogprobs=1))[0].answers
        assert (answer.text, len(answer.logprobs or ())) == ("one", 3)
        assert (await engine.chat("x", maxTokens=3)).text == "one"
        pieces = [chunk.text async for chunk in engine.generate("x", maxTokens=3)]
        assert "".join(pieces) == "one"
        for wrong, param in (
            ({"topP": 7}, "topP"),
            ({"maxTokens": "x"}, "maxTokens"),
            ({"stopSequences": [""]}, "stopSequences"),
            ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema"),
            ({"moodSwing": 1}, "moodSwing"),
        ):
            with pytest.raises(errors.InvalidRequest) as error:
                await engine.complete([{"role": "user", "content": "x"}], **wrong)
            assert error.value.param == param
            assert error.value.message == str(error.value)


def test_through_the_synchronous_engine(scripted: Any) -> None:
    with SyncEngine(str(scripted(text="Hi.")), maxNumSeqs=3) as engine:
        assert engine.engine.config.max_num_seqs == 3
        assert engine.chat("x", maxTokens=2).text == "Hi"
        assert "".join(chunk.text for chunk in engine.generate("x", maxTokens=2)) == "Hi"
