"""Tokens that a grammar forces are computed several at once, and nothing else changes: the same tokens
on every kind of store, at every depth, beside any neighbours."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import byte_vocabulary
from mlx_serving.runtime import native
from mlx_serving.runtime.backend.grammar import Grammars
from mlx_serving.runtime.backend.kv_layers import KVLayer, MakeKVLayer
from mlx_serving.runtime.backend.runner import MLXRunner
from mlx_serving.types import Grammar, SamplingParams
from model import zoo
from model.driver import Job, Run, make_runner, run

EOS = 0
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "identity": {"type": "integer", "minimum": 0, "maximum": 9999},
        "kind": {"enum": ["category", "catalogue", None]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 2},
    },
    "required": ["identity", "kind", "tags"],
    "additionalProperties": False,
}
OBJECT = Grammar(kind="json_schema", text=json.dumps(SCHEMA), white_space="")
CODE = Grammar(kind="regex", text=r"[a-f]{3}-constant-part-of-it-[0-9]{4}")
PROMPT = (17, 80, 3, 200, 41)
IN_PLACE = ("llama", "gemma3_text")
"""Fused on the native kernels."""
LAYERED = ("qwen3_moe",)
"""Layer by layer on the native kernels, which read KV in place."""
PLAIN = ("llama", "qwen3_next", "deepseek_v3")
"""Stock MLX: a run has a forward pass to itself."""


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    path = byte_vocabulary.write(tmp_path_factory.mktemp("vocabulary"), eos=EOS)
    return Grammars(path, zoo.VOCAB, (EOS,))


@lru_cache(maxsize=1)
def accelerated(name: str) -> tuple[Any, MakeKVLayer]:
    from mlx_serving.runtime.backend.in_place import InPlaceLayer
    from mlx_serving.runtime.native.install import accelerate

    model = zoo.build(name)
    report = accelerate(model)
    assert report.every_product and report.is_fused == (name in IN_PLACE)
    return model, KVLayer if report.is_fused else InPlaceLayer


def runner_of(name: str, *, ragged: bool, foresight: bool) -> MLXRunner:
    if not ragged:
        return make_runner(zoo.build(name), zoo.VOCAB, eos=(EOS,), foresight=foresight)
    model, attention = accelerated(name)
    runner = make_runner(
        model, zoo.VOCAB, eos=(EOS,), attention=attention, in_place=True, foresight=foresight
    )
    assert runner.store.ragged
    return runner


def jobs(grammars: Grammars) -> list[Job]:
    def job(i: int, grammar: Grammar | None, **wishes: Any) -> Job:
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 90, **wishes})
        constraint = None if grammar is None else grammars.compile(grammar)
        return Job((i + 1, *PROMPT), params, joins=i, constraint=constraint)

    return [
        job(0, CODE, temperature=1.0, seed=1),
        job(1, None, max_tokens=40),
        job(2, OBJECT, temperature=1.5, seed=7, logprobs=2),
        job(3, OBJECT, repetition_penalty=1.3, frequency_penalty=0.5, temperature=0.7, seed=4),
        job(4, OBJECT, temperature=0.8, top_k=40, top_p=0.95, seed=2**63 + 9),
        job(5, CODE, max_tokens=11),
        job(6, CODE, ignore_eos=True, max_tokens=40, temperature=1.0, seed=5),
        job(7, CODE, stop_token_ids=(ord("p"),)),
        job(8, CODE, min_tokens=60, temperature=1.0, seed=5),
    ]


def tokens(result: Run) -> list[tuple[list[int], str | None]]:
    return [(one.tokens, one.reason) for one in result.outcomes.values()]


def cases() -> list[Any]:
    kernels = pytest.mark.skipif(not native.available(), reason=native.why())
    ragged = [pytest.param(name, True, marks=kernels) for name in (*IN_PLACE, *LAYERED)]
    return ragged + [pytest.param(name, False) for name in PLAIN]


@pytest.mark.parametrize(("name", "ragged"), cases())
def test_the_same_tokens_in_fewer_steps(name: str, ragged: bool, grammars: Grammars) -> None:
    wanted = run(runner_of(name, ragged=ragged, foresight=False), jobs(grammars), eos=(EOS,))
    assert wanted.forced() == 0
    runner = runner_of(name, ragged=ragged, foresight=True)
    for depth in (1, 2, 3) if name == "llama" else (2,):
        together = run(runner, jobs(grammars), depth=depth, eos=(EOS,))
        assert tokens(together) == tokens(wanted), f"depth {depth}"
        assert together.forced() > 60 and len(together.plans) < len(wanted.plans)


@pytest.mark.skipif(not native.available(), reason=native.why())
def test_a_forced_sequence_alone_preempted_and_resumed(grammars: Grammars) -> None:
    runner = runner_of("llama", ragged=True, foresight=True)
    for job in jobs(grammars):
        alone = run(runner, [replace(job, joins=0)], depth=2, eos=(EOS,)).outcomes[0].tokens
        for cut in {1, len(alone) // 2, len(alone) - 1} - {0, len(alone)}:
            resumed = replace(job, joins=0, output=tuple(alone[:cut]))
            rest = run(runner, [resumed], depth=2, eos=(EOS,)).outcomes[0].tokens
            assert rest == alone[cut:]
    wanted = tokens(run(runner, jobs(grammars), depth=2, eos=(EOS,)))
    tight = run(runner, jobs(grammars), depth=2, capacity_tokens=144, eos=(EOS,))
    starts = [start for plan in tight.plans for start in plan.starts]
    assert any(len(start.token_ids) > start.prompt_len for start in starts), "none was preempted"
    assert tokens(tight) == wanted


@pytest.mark.skipif(not native.available(), reason=native.why())
@pytest.mark.parametrize("name", [*IN_PLACE, *LAYERED])
def test_lines_of_one_row_have_a_chunks_bits(name: str) -> None:
    runner = runner_of(name, ragged=True, foresight=True)
    model, store = runner._model, runner.store
    prompts = [
        [1 + (7 * i + row) % (zoo.VOCAB - 1) for i in range(9 + 3 * row)] for row in range(3)
    ]
    runs = {0: [5, 6, 7, 8], 1: [9], 2: [3, 4]}

    def begin() -> None:
        runner.reset()
        for row, prompt in enumerate(prompts):
            store.start(row, len(prompt))
            mx.eval(runner.forward_row(row, mx.array([prompt]), 0))

    begin()
    chunks = [
        np.array(runner.forward_row(row, mx.array([run]), len(prompts[row])))[0]
        for row, run in runs.items()
    ]
    begin()
    ahead = {row: len(run) - 1 for row, run in runs.items() if len(run) > 1}
    lines = [run[-1] for run in runs.values()]
    lines += [token for run in runs.values() for token in run[:-1]]
    positions = {row: len(prompt) for row, prompt in enumerate(prompts)}
    logits = model(mx.array(lines)[:, None], cache=store.batch_view(positions, 3, ahead))
    for row, chunk in enumerate(chunks):
        assert (np.array(logits[row, -1]) == chunk).all()
    # What was written goes on as if it had been computed one by one.
    assert [store.length(row) for row in range(3)] == [len(p) + len(runs[r]) for r, p in enumerate(prompts)]  # fmt: skip
