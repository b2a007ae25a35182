"""The default model itself, through the loader and the runner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mlx_serving.runtime.backend.loader import load
from mlx_serving.types import Grammar, SamplingParams
from mlx_serving.worker.wire import ModelOptions
from model.driver import Job, run

QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.model
def test_its_answer_can_be_held_to_a_schema(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    model = load("smollm2-135m", model_dir, ModelOptions(), lambda phase, detail: None)
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 12}, "sure": {"type": "boolean"}},
        "required": ["capital", "sure"],
        "additionalProperties": False,
    }
    grammar = Grammar(kind="json_schema", text=json.dumps(schema), white_space=" ?")
    assert model.grammars is not None
    constraint = model.grammars.compile(grammar)
    eos = model.info.eos_token_ids
    prompt = tuple(tokenizer.encode(QUESTION, add_special_tokens=False).ids)
    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=0)
    job = Job(prompt, params, constraint=constraint)
    outcome = run(model.runner, [job], prefill_step=64, depth=2, eos=eos).outcomes[0]
    answer = json.loads(tokenizer.decode(outcome.tokens, skip_special_tokens=True))
    assert outcome.reason == "stop" and isinstance(answer["sure"], bool)
    assert answer["capital"] == "Paris"
    assert min(p.logprob for p in outcome.logprobs) < -3, "logprobs are the unmasked model's"


@pytest.mark.model
def test_france_has_a_capital(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    model = load("smollm2-135m", model_dir, ModelOptions(), lambda phase, detail: None)
    prompt = tuple(tokenizer.encode(QUESTION, add_special_tokens=False).ids)
    job = Job(prompt, SamplingParams(temperature=0.0, max_tokens=8))
    tokens = run(model.runner, [job], prefill_step=64, depth=2).outcomes[0].tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "The capital of France is Paris."
