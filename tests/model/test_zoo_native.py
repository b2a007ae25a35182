"""The zoo again on the native kernels: mlx-lm's tokens, and bits that neighbours and cuts leave alone."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_serving.runtime import native
from mlx_serving.runtime.backend.arch import make_store
from mlx_serving.runtime.backend.kv import KVStore
from mlx_serving.runtime.backend.kv_layers import KVLayer
from mlx_serving.runtime.native import ops
from mlx_serving.types import SamplingParams
from model import zoo
from model.driver import Job, make_runner, run

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why())

LENGTHS = (5, 41, 1, 23)
TOKENS = 10
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
EVERY_PRODUCT = ("llama", "llama_sliding", "qwen2", "qwen3", "qwen3_moe", "gemma3_text")
DENSE = {"first_k_dense_replace": 4, "qk_nope_head_dim": 32}
"""deepseek_v3 without experts, whose choice MLX computes."""
ARRAY_MASKS = ("gemma2", "mamba2", "rwkv7")
"""Models that compute with masks themselves, or have no attention."""


def _prompts() -> list[tuple[int, ...]]:
    rng = random.Random(8)
    return [tuple(rng.randrange(1, zoo.VOCAB) for _ in range(n)) for n in LENGTHS]


PROMPTS = _prompts()


def _attention(model: Any, report: Any) -> type[KVLayer]:
    from mlx_serving.runtime.backend.in_place import InPlaceLayer, attends_in_place

    def stores(attention: type[KVLayer]) -> KVStore:
        kind = model.model_type
        return make_store(model, kind, 2, bucket=16, exact_batch=False, attention=attention)

    return InPlaceLayer if report.row_mask and attends_in_place(model, stores) else KVLayer


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_greedy_tokens_are_those_of_mlx_lm(name: str) -> None:
    from mlx_serving.runtime.native.install import accelerate

    model = zoo.build(name)
    expected = [
        [t for t, _ in generate_step(mx.array(p), model, max_tokens=TOKENS)] for p in PROMPTS
    ]
    report = accelerate(model, "f32", fused=False)
    assert not report.left
    attention = _attention(model, report)
    in_place = attention is not KVLayer
    assert in_place == (name not in ARRAY_MASKS)
    assert report.every_product == (name in (*EVERY_PRODUCT, "gemma2"))
    runner = make_runner(model, zoo.VOCAB, attention=attention, space=ops)
    jobs = [Job(p, GREEDY, joins=2 * i) for i, p in enumerate(PROMPTS)]
    jobs[0] = Job(PROMPTS[0], GREEDY, leaves=9)
    for depth, chunk in ((2, 16), (3, 64)):
        result = run(runner, jobs, depth=depth, prefill_step=chunk)
        assert result.moves() > 0
        for i, outcome in result.outcomes.items():
            assert outcome.tokens == expected[i][: len(outcome.tokens)], f"{i}, depth {depth}"
        assert all(len(result.outcomes[i].tokens) == TOKENS for i in (1, 2, 3))


def _chosen(_path: str, module: nn.Module) -> bool:
    """Not embeddings: of mxfp4, one would make MLX's activations bfloat16. Nor what has no whole groups."""
    kinds = nn.Linear, SwitchLinear, MultiLinear
    return isinstance(module, kinds) and module.weight.shape[-1] % 32 == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "f32"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_greedy_tokens_of_quantised_models_are_those_of_mlx_lm(name: str, mode: Any) -> None:
    """Fused where there are fused layers."""
    from mlx_serving.runtime.native.install import accelerate

    model = zoo.build(name)
    nn.quantize(model, 32, 4, class_predicate=_chosen)
    expected = [
        [t for t, _ in generate_step(mx.array(p), model, max_tokens=TOKENS)] for p in PROMPTS
    ]
    report = accelerate(model, mode)
    assert not report.left and report.replaced["QuantizedLinear"]
    attention = KVLayer if report.is_fused else _attention(model, report)
    runner = make_runner(model, zoo.VOCAB, attention=attention)
    jobs = [Job(p, GREEDY, joins=2 * i) for i, p in enumerate(PROMPTS)]
    result = run(runner, jobs, depth=2, prefill_step=16)
    assert [result.outcomes[i].tokens for i in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("name", [*EVERY_PRODUCT, "deepseek_v3"])
def test_bits_do_not_depend_on_neighbours_or_cuts(name: str, quantised: bool) -> None:
    """Logits of one sequence layer by layer: alone in one chunk, and cut at random beside others."""
    from mlx_serving.runtime.native.install import accelerate

    model = zoo.build(name, **DENSE if name == "deepseek_v3" else {})
    if quantised:
        nn.quantize(model, group_size=32, bits=4)
    report = accelerate(model, fused=False)
    assert report.every_product
    runner = make_runner(model, zoo.VOCAB, attention=_attention(model, report), space=ops)
    tokens = [1 + 7 * i % (zoo.VOCAB - 1) for i in range(48)]

    def logits(cuts: list[int], row: int) -> list[np.ndarray]:
        """After each cut; between them the row's neighbours go on."""
        store, rng = runner.store, random.Random(row)
        store.start(row, len(tokens))
        out, start = [], 0
        for end in cuts:
            out.append(np.array(runner.forward_row(row, mx.array([tokens[start:end]]), start)))
            for other in range(row):
                length = rng.randrange(1, 9)
                if not store.length(other):
                    store.start(other, 60)
                new = [[rng.randrange(zoo.VOCAB) for _ in range(length)]]
                runner.forward_row(other, mx.array(new), store.length(other))
            start = end
        positions = {r: store.length(r) for r in range(row + 1)}
        step = mx.array([[rng.randrange(zoo.VOCAB)] for _ in range(row)] + [[9]])
        batch = model(step, cache=store.batch_view(positions, row + 1))[row, -1]
        out.append(np.array(batch[None]))
        runner.reset()
        return out

    whole = logits([20, 48], 0)
    parts = logits([3, 4, 20, 21, 37, 48], 3)
    assert (parts[2] == whole[0]).all()
    assert (parts[5] == whole[1]).all()
    assert (parts[6] == whole[2]).all()


FORMS = [(32, 3, "affine"), (32, 6, "affine"), (32, 4, "mxfp4"), (16, 4, "nvfp4"), (32, 8, "mxfp8")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_quantised_models_have_mlx_lms_logits(name: str, form: tuple[int, int, str]) -> None:
    from mlx_serving.runtime.native.install import accelerate

    group, bits, mode = form
    # Its heads' own 16 inputs have no whole groups.
    changes = {"qk_nope_head_dim": 32} if name == "deepseek_v3" else {}
    model = zoo.build(name, **changes)

    nn.quantize(model, group, bits, mode=mode, class_predicate=_chosen)
    tokens = mx.array([PROMPTS[1], PROMPTS[1][::-1]])
    want = np.array(model(tokens))
    report = accelerate(model, "f32", fused=False)
    assert not report.left
    assert ("QuantizedSwitchLinear" in report.replaced) == (name != "llama")
    assert report.replaced.get("QuantizedMultiLinear", 0) == (8 if name == "deepseek_v3" else 0)
    got = np.array(model(tokens))
    assert np.abs(got - want).max() <= 1e-3 * np.abs(want).max()
