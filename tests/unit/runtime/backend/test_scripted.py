"""The scripted runner: streams by script, told by the real scheduler, without MLX."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend.loader import load
from mlx_serving.runtime.backend.model import LoadedModel
from mlx_serving.runtime.backend.scripted import Script, ScriptedConfig, ScriptedRunner
from mlx_serving.runtime.core.plan import PrefillChunk, RowStart, StepPlan
from mlx_serving.types import SamplingParams
from mlx_serving.worker.wire import ModelOptions
from model.driver import Job, run

PROMPT = (10, 20, 30)


def folder(tmp_path: Path, **config: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "scripted", **config}))
    return tmp_path


def loaded(tmp_path: Path, **config: Any) -> LoadedModel:
    return load("s", folder(tmp_path, **config), ModelOptions(), lambda phase, detail: None)


def tokens(model: LoadedModel, **sampling: Any) -> list[int]:
    job = Job(PROMPT, SamplingParams(**{"max_tokens": 6, "temperature": 0.0, **sampling}))
    return run(model.runner, [job]).outcomes[0].tokens


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    model = loaded(tmp_path, vocab_size=99, eos_token_id=[1, 2], max_position_embeddings=1000)
    assert (model.info.architecture, model.info.vocab_size) == ("scripted", 99)
    assert model.info.eos_token_ids == model.limits.eos_token_ids == (1, 2)
    assert model.info.context_length == model.limits.context_length == 1000
    assert model.limits.kv_capacity_tokens >= 16 * 1000


def test_scripts(tmp_path: Path) -> None:
    echo = loaded(tmp_path, eos_token_id=1, script={"mode": "echo"})
    assert tokens(echo)[:4] == [10, 20, 30, 1]
    text = loaded(tmp_path, eos_token_id=1, script={"mode": "text", "token_ids": [7, 8]})
    assert tokens(text)[:3] == [7, 8, 1]
    cycle = loaded(tmp_path, script={"mode": "cycle", "token_ids": [7, 8]})
    assert tokens(cycle) == [7, 8, 7, 8, 7, 8]


def test_a_hash_is_a_function_of_the_prefix_and_the_seed(tmp_path: Path) -> None:
    model = loaded(tmp_path, vocab_size=50, eos_token_id=[3, 4])
    first = tokens(model, max_tokens=40)
    assert first == tokens(model, max_tokens=40, seed=9)
    assert not {3, 4} & set(first)
    assert len(set(first)) > 10
    assert tokens(model, temperature=1.0, seed=1) != tokens(model, temperature=1.0, seed=2)


def test_streams_are_the_same_in_any_company(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    prompts = [tuple(range(1, n)) for n in (3, 40, 21, 2, 9)]
    jobs = [
        Job(p, SamplingParams(max_tokens=9, temperature=1.0, seed=i), joins=2 * i)
        for i, p in enumerate(prompts)
    ]
    together = run(model.runner, jobs, depth=3)
    for i, job in enumerate(jobs):
        alone = run(model.runner, [Job(job.prompt, job.sampling)])
        assert together.outcomes[i].tokens == alone.outcomes[0].tokens


def test_logprobs_come_as_asked(tmp_path: Path) -> None:
    model = loaded(tmp_path, script={"logprob": -0.25})
    job = Job(PROMPT, SamplingParams(max_tokens=2, temperature=0.0, logprobs=2))
    for one in run(model.runner, [job]).outcomes[0].logprobs:
        assert one.logprob == -0.25
        assert len(one.top_ids) == len(one.top_logprobs) == 2


def _start(prompt: tuple[int, ...]) -> StepPlan:
    start = RowStart(0, 0, prompt, len(prompt), SamplingParams())
    return StepPlan(0, starts=(start,), prefill=(PrefillChunk(0, 0, prompt, 0, True),))


def test_it_dies_fails_and_waits_on_demand() -> None:
    deaths: list[str] = []
    config = ScriptedConfig(script=Script(die_on=66, fail_on=67, step_delay_ms=20))
    runner = ScriptedRunner(config, die=lambda: deaths.append("dead"))
    runner.launch(_start((1, 2))).wait()
    assert not deaths
    with pytest.raises(RuntimeError, match="67"):
        runner.launch(_start((1, 67)))
    runner.launch(_start((1, 66)))
    assert deaths == ["dead"]


@pytest.mark.parametrize(
    "config",
    [{"script": {"mode": "loud"}}, {"script": {"speed": 3}}, {"vocab_size": 1, "eos_token_id": 0}],
)
def test_a_wrong_script_is_named(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ModelBroken, match=r"config\.json"):
        loaded(tmp_path, **config)


def test_it_needs_no_mlx(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from mlx_serving.runtime.backend.loader import load\n"
        "from mlx_serving.worker.wire import ModelOptions\n"
        f"load('s', Path({str(folder(tmp_path))!r}), ModelOptions(), lambda p, d: None)\n"
        "assert not {m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm', 'numpy')}\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
