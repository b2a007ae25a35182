"""Adapters beside one model: mlx-lm's tokens for each, whatever the batch holds, and the model's own."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import byte_vocabulary
from mlx_serving import Engine
from mlx_serving.errors import ModelBroken
from mlx_serving.runtime import native
from mlx_serving.runtime.backend.grammar import Grammars
from mlx_serving.runtime.backend.loader import load
from mlx_serving.runtime.backend.model import LoadedModel
from mlx_serving.runtime.backend.runner import MLXRunner
from mlx_serving.runtime.slices import whole
from mlx_serving.types import Grammar, KVBits, SamplingParams
from mlx_serving.worker.wire import ModelOptions
from model import adapters, zoo
from model.driver import Job, run

LENGTHS = (5, 41, 23)
TOKENS = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
KERNELS = ["off", *(["f32"] if native.available() else [])]


def _prompts() -> list[tuple[int, ...]]:
    rng = random.Random(11)
    return [tuple(rng.randrange(1, zoo.VOCAB) for _ in range(n)) for n in LENGTHS]


PROMPTS = _prompts()


def opened(base: Path, kernels: str = "off", **options_: Any) -> LoadedModel:
    options = ModelOptions(max_num_seqs=6, kernels=kernels, memory_budget=1 << 30, **options_)  # type: ignore[arg-type]
    return load("m", base, options, lambda *_: None)


def attach(model: LoadedModel, name: str, path: Path) -> str:
    assert model.adapters is not None
    return whole(model.adapters.load(f"m+{name}", path, model.info)).tag


@pytest.mark.parametrize(
    ("name", "kernels", "keys"),
    [
        ("llama", "off", (*adapters.ATTENTION, "mlp.down_proj")),
        ("gemma3_text", "auto", (*adapters.ATTENTION, "mlp.gate_proj")),
        *(
            pytest.param(name, kernels, keys, marks=pytest.mark.slow)
            for kernels in KERNELS
            for name, keys in (
                ("llama", (*adapters.ATTENTION, "mlp.down_proj")),
                ("qwen3", ("self_attn.k_proj", "mlp.up_proj")),
                ("gemma3_text", (*adapters.ATTENTION, "mlp.gate_proj")),
                ("gemma2", adapters.ATTENTION),
                ("qwen3_next", ("linear_attn.out_proj", *adapters.ATTENTION)),
            )
        ),
    ],
)
def test_tokens_are_those_of_mlx_lm_in_a_batch_of_all(
    tmp_path: Path, name: str, kernels: str, keys: tuple[str, ...]
) -> None:
    base = zoo.write(name, tmp_path)
    folders = [
        adapters.write(tmp_path / "a", base, 1, keys=keys),
        adapters.write(tmp_path / "b", base, 2, keys=keys[:1], rank=8),
    ]
    wanted = [adapters.expected(base, folder, PROMPTS, TOKENS) for folder in (None, *folders)]
    assert wanted[0] != wanted[1] != wanted[2] != wanted[0]
    model = opened(base, kernels)
    tags = [None, *(attach(model, folder.name, folder) for folder in folders)]
    jobs = {
        10 * i + j: Job(prompt, GREEDY, joins=(3 * j + i) % 7, adapter=tag)
        for i, tag in enumerate(tags)
        for j, prompt in enumerate(PROMPTS)
    }
    result = run(model.runner, jobs, rows=6, depth=2)
    for key, outcome in result.outcomes.items():
        assert outcome.tokens == wanted[key // 10][key % 10], key
    assert any(len(plan.decode) > 3 for plan in result.plans)


@pytest.mark.skipif(not native.available(), reason=native.why())
@pytest.mark.parametrize("bits", [None, 4])
def test_bits_do_not_depend_on_who_else_is_in_the_batch(tmp_path: Path, bits: int | None) -> None:
    """Nor those of the model itself, which keeps its fused layers."""
    base = quantised(zoo.write("llama", tmp_path), bits)
    folders = [adapters.write(tmp_path / name, base, i) for i, name in enumerate("ab")]
    model = opened(base, "exact")
    told = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=1)

    def job(tag: str | None, joins: int = 0) -> Job:
        return Job(PROMPTS[1], told, joins=joins, adapter=tag)

    before = run(model.runner, [job(None)], rows=6).outcomes[0].logprobs
    tags = [None, *(attach(model, folder.name, folder) for folder in folders)]
    alone = [run(model.runner, [job(tag)], rows=6).outcomes[0].logprobs for tag in tags]
    assert alone[0] == before and alone[1] != before
    jobs = [job(tag, joins=joins) for joins in (0, 3) for tag in tags]
    together = run(model.runner, jobs, rows=6, prefill_step=64)
    for i, outcome in together.outcomes.items():
        assert outcome.logprobs == alone[i % 3], i


@pytest.mark.parametrize(
    ("dora", "kernels"),
    [
        (True, "auto"),
        (False, "off"),
        *(pytest.param(True, k, marks=pytest.mark.slow) for k in KERNELS),
    ],
)
def test_peft_and_dora_say_the_same(tmp_path: Path, dora: bool, kernels: str) -> None:
    base = quantised(zoo.write("qwen2", tmp_path), 8)
    theirs = adapters.write(tmp_path / "a", base, 5, dora=dora)
    wanted = adapters.expected(base, theirs, PROMPTS, TOKENS)
    assert wanted != adapters.expected(base, None, PROMPTS, TOKENS)
    model = opened(base, kernels)
    for folder in (theirs, adapters.to_peft(theirs, tmp_path / "peft")):
        tag = attach(model, folder.name, folder)
        result = run(model.runner, [Job(p, GREEDY, adapter=tag) for p in PROMPTS], rows=6)
        assert [outcome.tokens for outcome in result.outcomes.values()] == wanted


def quantised(base: Path, bits: int | None) -> Path:
    """The model in `base` with weights of so many bits, in its place."""
    if bits is not None:
        config = json.loads((base / "config.json").read_text())
        model: Any = zoo.build(config["model_type"])
        nn.quantize(model, group_size=32, bits=bits)
        weights = dict(tree_flatten(model.parameters()))
        mx.save_safetensors(str(base / "model.safetensors"), weights)
        config["quantization"] = {"group_size": 32, "bits": bits}
        (base / "config.json").write_text(json.dumps(config))
    return base


def test_an_adapter_leaves_no_trace(tmp_path: Path) -> None:
    """Its memory is given back, its layers are as they were, and another of the name is another."""
    base = zoo.write("llama", tmp_path)
    model = opened(base)
    assert isinstance(model.runner, MLXRunner) and model.adapters is not None
    classes = [type(module) for module in model.runner._model.modules()]
    first = attach(model, "a", adapters.write(tmp_path / "a", base, 1))
    second = attach(model, "a", adapters.write(tmp_path / "b", base, 2))
    assert first != second and first.partition("@")[0] == second.partition("@")[0] == "m+a"
    model.adapters.unload(first)
    left = run(model.runner, [Job(PROMPTS[0], GREEDY, adapter=second)]).outcomes[0].tokens
    assert left == adapters.expected(base, tmp_path / "b", PROMPTS[:1], TOKENS)[0]
    model.adapters.unload(second)
    model.adapters.unload(second)
    assert [type(module) for module in model.runner._model.modules()] == classes


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    base = zoo.write("llama", tmp_path)
    (tmp_path / "other").mkdir()
    other = zoo.write("llama", tmp_path / "other", hidden_size=32)
    model = opened(base)
    assert isinstance(model.runner, MLXRunner)
    classes = [type(module) for module in model.runner._model.modules()]

    def refusal(folder: Path) -> str:
        with pytest.raises(ModelBroken) as refused:
            attach(model, folder.name, folder)
        return refused.value.message

    wrong = adapters.write(tmp_path / "wrong", other, 1)
    assert "is for a layer of 128 to 32 by rank 4; the model's is of 128 to 64" in refusal(wrong)
    head = adapters.write(tmp_path / "head", base, 1, keys=("lm_head",))
    assert attach(model, "head", head)
    embeds = adapters.write(tmp_path / "embeds", base, 1, keys=("model.embed_tokens",))
    assert "is no linear layer but Embedding" in refusal(embeds)
    named = adapters.write(tmp_path / "named", base, 1)
    weights: Any = mx.load(str(named / "adapters.safetensors"))
    renamed = {name.replace("self_attn", "attention"): a for name, a in weights.items()}
    mx.save_safetensors(str(named / "adapters.safetensors"), renamed)
    assert "the model has no layer model.layers.0.attention" in refusal(named)
    cut = adapters.write(tmp_path / "cut", base, 1)
    data = (cut / "adapters.safetensors").read_bytes()
    (cut / "adapters.safetensors").write_bytes(data[: len(data) // 2])
    assert "adapters.safetensors: cannot be read" in refusal(cut)
    model.adapters.unload(next(iter(model.adapters._loaded)))  # type: ignore[union-attr]
    assert [type(module) for module in model.runner._model.modules()] == classes


@pytest.mark.skipif(not native.available(), reason=native.why())
@pytest.mark.parametrize("kv_bits", ["off", "8"])
def test_tokens_that_a_grammar_forces_have_the_adapter_too(tmp_path: Path, kv_bits: KVBits) -> None:
    """Computed together, behind the rows' own lines, or a step each."""
    base = zoo.write("llama", tmp_path, head_dim=32)
    folders = [adapters.write(tmp_path / name, base, i) for i, name in enumerate("ab")]
    (tmp_path / "words").mkdir()
    grammars = Grammars(byte_vocabulary.write(tmp_path / "words", eos=0), zoo.VOCAB, (0,))
    code = Grammar(kind="regex", text=r"[a-f]{3} is the code of [0-9]{8}")
    told = [SamplingParams(temperature=1.5, seed=i, max_tokens=40) for i in range(6)]

    def outcomes(jump_forward: str) -> tuple[list[list[int]], int]:
        model = opened(base, "exact", kv_bits=kv_bits, jump_forward=jump_forward)
        tags = [None, *(attach(model, folder.name, folder) for folder in folders)]
        constraint = grammars.compile(code)
        jobs = [
            Job((65 + i, 66, 67), told[i], joins=i, adapter=tags[i % 3], constraint=constraint)
            for i in range(6)
        ]
        result = run(model.runner, jobs, rows=6, eos=(0,))
        return [outcome.tokens for outcome in result.outcomes.values()], result.forced()

    (jumped, forced), (stepped, none) = outcomes("auto"), outcomes("off")
    assert forced > 0 == none
    assert jumped == stepped and len(set(map(tuple, jumped))) > 3


@pytest.mark.slow
async def test_smollm2_with_two_adapters_says_what_mlx_lm_says(
    model_dir: Path, tmp_path: Path
) -> None:
    """Through the engine: both adapters and the model in one batch, alone, and after a worker's death."""
    folders = [adapters.write(tmp_path / n, model_dir, i, size=1.0) for i, n in enumerate("ab")]
    prompts = [(504, 3575, 282, 4649, 314)]
    wanted = [adapters.expected(model_dir, folder, prompts, 6) for folder in (None, *folders)]
    assert wanted[0] != wanted[1] != wanted[2] != wanted[0]
    settings = {"adapter": [f"{folder.name}={folder}" for folder in folders], "max_num_seqs": 8}
    async with Engine([{"model": str(model_dir), "name": "m"}], **settings) as engine:
        names = ("m", "m+a", "m+b")

        async def say(name: str, prompt: tuple[int, ...]) -> list[int]:
            options = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
            chunks = engine.generate(list(prompt), model=name, **options)
            return [token async for chunk in chunks for token in chunk.token_ids]

        asked = [(i % 3, 0) for i in range(6)]
        for turn in range(2):
            answers = await asyncio.gather(*(say(names[i], prompts[j]) for i, j in asked))
            assert answers == [wanted[i][j] for i, j in asked], turn
            os.kill(engine.gateway.health()["workers"][0]["pid"], signal.SIGKILL)
        assert await say("m+b", prompts[0]) == wanted[2][0]
