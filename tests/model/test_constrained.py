"""Grammars on real (tiny, random) models: against a slow oracle, in a batch, resumed, preempted."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

import byte_vocabulary
from mlx_serving.runtime.backend.grammar import CompiledGrammar, Grammars
from mlx_serving.runtime.backend.sampler import base_key
from mlx_serving.types import Grammar, SamplingParams
from model import zoo
from model.driver import Job, Outcome, make_runner, run

EOS = 0
CHOICES = ["red", "reddish", "green \U0001f34f", "blue"]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 9999},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 2},
    },
    "required": ["id", "kind", "tags"],
    "additionalProperties": False,
}
CHOICE = Grammar(kind="choice", text=json.dumps(CHOICES))
OBJECT = Grammar(kind="json_schema", text=json.dumps(SCHEMA), white_space="")
CODE = Grammar(kind="regex", text=r"[a-f]{3}-[0-9]{4}")
PROMPT = (17, 80, 3, 200, 41)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_vocabulary.write(tmp_path_factory.mktemp("vocabulary"), eos=EOS)


@pytest.fixture(scope="module")
def grammars(vocabulary: Path) -> Grammars:
    return Grammars(vocabulary, zoo.VOCAB, (EOS,))


@lru_cache(maxsize=1)
def built(name: str) -> Any:
    return zoo.build(name)


def jobs(grammars: Grammars) -> list[Job]:
    """Constrained, plain and seeded sequences that join at different steps."""

    def job(i: int, grammar: Grammar | None, **wishes: Any) -> Job:
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 60, **wishes})
        constraint = None if grammar is None else grammars.compile(grammar)
        return Job((i + 1, *PROMPT), params, joins=i, constraint=constraint)

    return [
        job(0, CHOICE),
        job(1, None, max_tokens=24),
        job(2, OBJECT, temperature=1.5, seed=7, logprobs=2),
        job(3, None, temperature=0.9, seed=3, max_tokens=24, logprobs=2),
        job(4, CODE, repetition_penalty=1.4, frequency_penalty=0.5),
        job(5, OBJECT, temperature=0.8, top_k=40, top_p=0.95, seed=2**63 + 9),
        job(6, CODE, min_tokens=40, temperature=1.0, seed=5),
    ]


def text(outcome: Outcome) -> str:
    assert outcome.reason == "stop" and outcome.tokens[-1] == EOS, outcome
    return bytes(outcome.tokens[:-1]).decode()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama", "qwen3_next", "deepseek_v3"])
def test_a_mixed_batch_gives_what_each_gives_alone(
    name: str, depth: int, grammars: Grammars
) -> None:
    runner = make_runner(built(name), zoo.VOCAB, eos=(EOS,))
    together = run(runner, jobs(grammars), depth=depth, eos=(EOS,)).outcomes
    for i, job in enumerate(jobs(grammars)):
        alone = run(runner, [job], eos=(EOS,)).outcomes[0]
        assert together[i].tokens == alone.tokens, f"job {i}"
        for a, b in zip(together[i].logprobs, alone.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert text(together[0]) in CHOICES
    for i in (2, 5):
        jsonschema.validate(json.loads(text(together[i])), SCHEMA)
    for i in (4, 6):
        assert len(text(together[i])) == 8, "it ends although min_tokens asks for more"


def oracle(model: Any, job: Job, grammar: Grammar, vocabulary: Path) -> list[int]:
    """One whole forward a token, a matcher that begins anew for each, and no batch."""
    p, out = job.sampling, list[int]()
    while len(out) < p.max_tokens and EOS not in out:
        logits = np.array(model(mx.array([[*job.prompt, *out]]))[0, -1], np.float32)
        allowed = allows(grammar, out, vocabulary)
        masked = np.where(allowed, logits, -np.inf)
        if p.temperature > 0:
            high, low = base_key(p.seed, p.choice)
            at = len(job.prompt) + len(out)
            key = mx.array([high, low ^ at], dtype=mx.uint32)
            noise = np.array(mx.random.gumbel((zoo.VOCAB,), key=key))
            masked = masked / p.temperature + noise
        out.append(int(masked.argmax()))
    return out


def allows(grammar: Grammar, output: list[int], vocabulary: Path) -> np.ndarray:
    if grammar is CHOICE:
        so_far = bytes(output)
        ways = [c.encode() + b"\0" for c in CHOICES if (c.encode() + b"\0").startswith(so_far)]
        return np.isin(np.arange(zoo.VOCAB), [w[len(so_far)] for w in ways if len(w) > len(so_far)])
    tokenizer = LLTokenizer(vocabulary.read_text(), n_vocab=zoo.VOCAB, eos_token=EOS)
    options: Any = {"whitespace_flexible": False}
    schema = LLMatcher.grammar_from_json_schema(grammar.text, overrides=options)
    matcher = LLMatcher(tokenizer, schema)
    assert matcher.consume_tokens(output)
    return np.frombuffer(matcher.compute_logit_bias(), np.uint8)[: zoo.VOCAB] > 0


@pytest.mark.parametrize("grammar", [CHOICE, OBJECT], ids=["choice", "object"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_tokens_are_the_slow_oracles(
    grammar: Grammar, temperature: float, grammars: Grammars, vocabulary: Path
) -> None:
    model = built("llama")
    params = SamplingParams(temperature=temperature, seed=11, max_tokens=48)
    job = Job(PROMPT, params, constraint=grammars.compile(grammar))
    runner = make_runner(model, zoo.VOCAB, eos=(EOS,))
    outcome = run(runner, [job], depth=2, eos=(EOS,)).outcomes[0]
    assert outcome.tokens == oracle(model, job, grammar, vocabulary)


def test_resumed_and_preempted_sequences_go_on_in_their_grammar(grammars: Grammars) -> None:
    runner = make_runner(built("llama"), zoo.VOCAB, eos=(EOS,))
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=60)
    job = Job(PROMPT, params, constraint=grammars.compile(OBJECT))
    whole = run(runner, [job], eos=(EOS,)).outcomes[0].tokens
    for cut in (1, 7, len(whole) - 1):
        resumed = Job(PROMPT, params, constraint=job.constraint, output=tuple(whole[:cut]))
        assert run(runner, [resumed], depth=2, eos=(EOS,)).outcomes[0].tokens == whole[cut:]
    # Room for less than all of them: rows are given up and computed again.
    others = [Job((9 + i, *PROMPT * 4), params, constraint=job.constraint) for i in range(4)]
    tight = run(runner, others, depth=2, capacity_tokens=96, eos=(EOS,))
    starts = [start for plan in tight.plans for start in plan.starts]
    assert any(len(start.token_ids) > start.prompt_len for start in starts), "none was preempted"
    for i, other in enumerate(others):
        assert tight.outcomes[i].tokens == run(runner, [other], eos=(EOS,)).outcomes[0].tokens


def test_a_grammar_that_gives_up_ends_its_own_sequence_only(grammars: Grammars) -> None:
    class Fragile(CompiledGrammar):
        """One whose matcher is in error from its third token on."""

        def matcher(self, output: Any) -> Any:
            matcher = super().matcher(output)
            matcher.accept(ord("!")) if len(output) else None
            return matcher

    runner = make_runner(built("llama"), zoo.VOCAB, eos=(EOS,))
    good = grammars.compile(CODE)
    fragile = Fragile(good._prototype, frozenset({EOS}), "guided_regex")
    params = SamplingParams(temperature=0.0, max_tokens=30)
    both = [
        Job(PROMPT, params, constraint=good),
        Job(PROMPT, params, constraint=fragile, output=(ord("a"),)),
    ]
    outcomes = run(runner, both, depth=2, eos=(EOS,)).outcomes
    assert len(text(outcomes[0])) == 8
    assert outcomes[1].reason == "error" and outcomes[1].tokens == []
    assert outcomes[1].error is not None and outcomes[1].error.param == "guided_regex"
