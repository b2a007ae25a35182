"""Reused prefixes: for every kind of architecture the tokens, and the bits, of computing them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence as Items
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_serving.runtime import native
from mlx_serving.runtime.backend.kv import RowSlots
from mlx_serving.runtime.backend.kv_layers import KVLayer, MakeKVLayer
from mlx_serving.runtime.backend.runner import MLXRunner
from mlx_serving.runtime.core import invariants
from mlx_serving.runtime.core.plan import Limits, PrefillChunk, Publish, RowStart, StepPlan
from mlx_serving.runtime.core.scheduler import Emitted, Scheduler
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.runtime.native import install, ops
from mlx_serving.types import SamplingParams
from model import zoo
from model.driver import BUCKET, make_runner

STEP = 16
ROWS = 4
PLAIN = Limits(
    max_num_seqs=ROWS,
    prefill_step_size=STEP,
    context_length=512,
    kv_capacity_tokens=4096,
    kv_bucket_tokens=BUCKET,
)
WHOLE_CHUNKS = dataclasses.replace(
    PLAIN, prefix_blocks=8, prefix_block_tokens=STEP, prefix_whole_chunks=True
)
ANYWHERE = dataclasses.replace(PLAIN, prefix_blocks=40, prefix_block_tokens=4)
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=2)

Answer = tuple[list[int], list[Any], int]
"""Tokens, log-probabilities, cached tokens."""


class Server:
    """A scheduler and a runner that outlive their sequences."""

    def __init__(self, model: Any, limits: Limits, attention: MakeKVLayer = KVLayer) -> None:
        self.scheduler = Scheduler(limits)
        self.runner: MLXRunner = make_runner(model, zoo.VOCAB, rows=ROWS, attention=attention)
        if limits.prefix_blocks:
            self.runner.store.open_pool(limits.prefix_blocks, limits.prefix_block_tokens)
        self.prefilled = self.chunks = 0
        self._seq_id = 0

    def answer(self, *prompts: Items[int], salt: str | None = None) -> list[Answer]:
        """All of them at once, two steps deep."""
        first = self._seq_id
        for prompt in prompts:
            self.scheduler.add(
                Sequence(
                    seq_id=self._seq_id,
                    tokens=list(prompt),
                    prompt_len=len(prompt),
                    sampling=GREEDY,
                    salt=salt,
                )
            )
            self._seq_id += 1
        emitted: list[Emitted] = []
        pending = []
        while self.scheduler.has_work:
            plan = self.scheduler.schedule(0.0) if len(pending) < 2 else None
            if plan is None:
                emitted += self.scheduler.apply(pending.pop(0).wait())
            else:
                self.prefilled += plan.prefill_tokens
                self.chunks += len(plan.prefill)
                pending.append(self.runner.launch(plan))
            invariants.check(self.scheduler)
        answers: list[Answer] = []
        for seq_id in range(first, self._seq_id):
            mine = [one for one in emitted if one.seq_id == seq_id]
            tokens = [token for one in mine for token in one.token_ids]
            logprobs = [value for one in mine for value in one.logprobs or []]
            answers.append((tokens, logprobs, mine[0].cached_tokens))
        return answers


@lru_cache(maxsize=1)
def _model(name: str) -> Any:
    return zoo.build(name)


@lru_cache(maxsize=2)
def _native_model(name: str) -> Any:
    model = zoo.build(name)
    report = install.accelerate(model)
    assert report.fused in {"llama", "qwen2", "qwen3", "gemma3"}, report
    return model


def _tokens(seed: int, count: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(1, zoo.VOCAB) for _ in range(count))


@st.composite
def _conversations(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Prompts that branch off one trunk, or off each other, at random points."""
    prompts = [_tokens(0, 60)]
    for seed in range(1, draw(st.integers(3, 5))):
        origin = draw(st.sampled_from(prompts))
        cut = draw(st.integers(0, len(origin)))
        prompts.append((*origin[:cut], *_tokens(seed, draw(st.integers(1, 20)))))
    return prompts


def _same(got: Answer, expected: Answer) -> bool:
    return got[:2] == expected[:2]


@pytest.mark.parametrize("name", zoo.each_kind())
def test_a_hit_gives_the_bits_of_a_miss(name: str) -> None:
    model = _model(name)

    @settings(max_examples=2, deadline=None)
    @given(_conversations())
    def check(prompts: list[tuple[int, ...]]) -> None:
        sharing, plain = Server(model, WHOLE_CHUNKS), Server(model, PLAIN)
        # The first again: at least one hit, whatever was drawn and evicted.
        for prompt in (*prompts, prompts[-1], prompts[0], prompts[0]):
            (got,), (expected,) = sharing.answer(prompt), plain.answer(prompt)
            assert _same(got, expected), f"after {got[2]} cached tokens"
        assert got[2] == 48
        assert isinstance(sharing.runner.store, RowSlots)
        recurrent = name in zoo.RECURRENT
        assert sharing.runner.store.prefix_reuse == ("snapshots" if recurrent else "blocks")

    check()


@pytest.mark.parametrize("name", zoo.each_kind())
def test_sequences_that_arrive_together_compute_a_prefix_once(name: str) -> None:
    model = _model(name)
    trunk = _tokens(1, 3 * STEP)
    prompts = [(*trunk, *_tokens(2 + i, 5)) for i in range(ROWS)]
    sharing, plain = Server(model, WHOLE_CHUNKS), Server(model, PLAIN)
    together = sharing.answer(*prompts)
    assert sharing.prefilled == len(trunk) + 5 * ROWS
    assert [answer[2] for answer in together] == [0, *[len(trunk)] * (ROWS - 1)]
    for got, prompt in zip(together, prompts, strict=True):
        assert got[0] == plain.answer(prompt)[0][0]


@pytest.mark.skipif(not native.available(), reason="needs the native kernels")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_with_the_native_kernels_a_hit_at_any_block_gives_the_bits_of_a_miss(name: str) -> None:
    """Blocks that were decoded too, and cuts that no prompt's own chunks would have."""
    model = _native_model(name)

    @settings(max_examples=4, deadline=None)
    @given(_conversations(), st.integers(1, 59))
    def check(prompts: list[tuple[int, ...]], cut: int) -> None:
        sharing, plain = Server(model, ANYWHERE), Server(model, PLAIN)
        for prompt in (*prompts, prompts[-1], prompts[0][:cut], prompts[0]):
            (got,), (expected,) = sharing.answer(prompt), plain.answer(prompt)
            assert _same(got, expected), f"after {got[2]} cached tokens"
            goes_on = (*prompt, *got[0], 7)
            (got,), (expected,) = sharing.answer(goes_on), plain.answer(goes_on)
            assert _same(got, expected), f"after {got[2]} cached tokens"
        assert got[2] >= len(goes_on) - 8, "an answer is part of the next prompt's prefix"

    check()


@pytest.mark.skipif(not native.available(), reason="needs the native kernels")
def test_chunks_cut_for_running_streams_change_no_token() -> None:
    model = _native_model("llama")
    limits = dataclasses.replace(ANYWHERE, prefill_step_size=64, max_itl_s=0.001, prefill_grain=8)
    short, long = _tokens(20, 5), _tokens(21, 150)
    server = Server(model, limits)
    answers = server.answer(short, long)
    assert server.prefilled == 155 and server.chunks > 6, "cut while the other decodes"
    for got, prompt in zip(answers, (short, long), strict=True):
        assert _same(got, Server(model, PLAIN).answer(prompt)[0])


def test_other_salts_share_nothing() -> None:
    server = Server(_model("llama"), WHOLE_CHUNKS)
    prompt = _tokens(5, 40)
    cached = [server.answer(prompt, salt=salt)[0][2] for salt in (None, "a", "", "a", None)]
    assert cached == [0, 0, 0, 32, 32]


@pytest.mark.parametrize("name", ["llama", "falcon_h1", "deepseek_v3"])
def test_a_reset_forgets_the_blocks(name: str) -> None:
    server = Server(_model(name), WHOLE_CHUNKS)
    prompt = _tokens(6, 40)
    (expected,) = server.answer(prompt)
    server.runner.reset()
    server.scheduler.reset()
    assert isinstance(server.runner.store, RowSlots)
    assert server.runner.store.pool.arrays == []
    (got,) = server.answer(prompt)
    assert _same(got, expected) and got[2] == 0


def test_blocks_anywhere_in_the_pool_are_copied_in_order() -> None:
    server = Server(_model("llama"), dataclasses.replace(ANYWHERE, prefix_block_tokens=8))
    prompt = _tokens(7, 33)
    (expected,) = server.answer(prompt)
    store = server.runner.store
    store.start(0, 40)
    store.copy_blocks(0, (0, 1, 2, 3))
    store.publish(0, 0, (39, 5, 17, 4))
    store.free(0)
    store.start(0, 40)
    store.copy_blocks(0, (39, 5, 17, 4))
    logits = server.runner.forward_row(0, mx.array([prompt[32:]]), 32)
    assert int(mx.argmax(logits)) == expected[0][0]


@pytest.mark.parametrize("name", ["llama", "llama native", "falcon_h1"])
def test_a_pool_and_a_slab_of_one_block_share_no_memory(name: str) -> None:
    """A copy of a whole array could as well be the array itself, until somebody writes in place."""
    if name.endswith("native"):
        if not native.available():
            pytest.skip("needs the native kernels")
        model = _native_model("llama")
    else:
        model = _model(name)
    runner = make_runner(model, zoo.VOCAB)
    store = runner.store
    store.open_pool(1, BUCKET)
    ours, others = (mx.array([_tokens(seed, BUCKET)]) for seed in (9, 10))
    token = mx.array([[3]])

    def begin(tokens: mx.array) -> None:
        store.start(0, BUCKET)
        mx.eval(runner.forward_row(0, tokens, 0))

    def goes_on() -> list[float]:
        logits: list[float] = runner.forward_row(0, token, BUCKET)[0].tolist()
        store.free(0)
        return logits

    begin(ours)
    mx.async_eval(store.publish(0, 0, (0,)))
    store.truncate(0, 0)
    begin(others)
    expected = {}
    for tokens in (others, ours):
        store.free(0)
        begin(tokens)
        expected[id(tokens)] = goes_on()
    for _ in range(2):
        store.start(0, BUCKET)
        store.copy_blocks(0, (0,))
        mx.async_eval(store.arrays())
        assert goes_on() == expected[id(ours)]
        store.start(0, BUCKET)
        store.copy_blocks(0, (0,))
        mx.async_eval(store.arrays())
        store.truncate(0, 0)
        begin(others)
        assert goes_on() == expected[id(others)]


@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_neither_copies_nor_publications_copy_a_pool(name: str) -> None:
    runner = make_runner(_model(name), zoo.VOCAB)
    runner.store.open_pool(20_000, STEP)
    prompt = _tokens(8, STEP)

    def step(number: int, block: int, copied: tuple[int, ...]) -> StepPlan:
        tokens = prompt * (len(copied) + 1)
        at = STEP * len(copied)
        return StepPlan(
            number,
            frees=(0,) if number else (),
            starts=(RowStart(0, number, tokens, len(tokens), GREEDY, None, copied, at),),
            prefill=(PrefillChunk(0, number, prompt, at, samples=True),),
            publish=(Publish(0, number, at, (block,)),),
        )

    runner.launch(step(0, 19_999, ())).wait()
    assert isinstance(runner.store, RowSlots)
    largest = max(pool.nbytes for pool in runner.store.pool.arrays)
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    pending = []
    for number in range(1, 7):
        pending.append(runner.launch(step(number, number, (19_999,))))
        if len(pending) == 3:
            pending.pop(0).wait()
    for step_pending in pending:
        step_pending.wait()
    assert mx.get_peak_memory() - active < largest / 4


@pytest.mark.skipif(not native.available(), reason="needs the native kernels")
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("mode", ["exact", "fast", "f32"])
def test_the_native_kernels_give_each_position_the_same_bits_wherever_chunks_are_cut(
    mode: ops.Mode, bits: int | None
) -> None:
    """What lets a prefix be copied up to any block, and decoded blocks be published."""
    model = zoo.build("qwen3")
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
    assert install.accelerate(model, mode).fused == "qwen3"
    runner = make_runner(model, zoo.VOCAB)
    tokens = _tokens(11, 430)

    def computed(*cuts: int) -> list[mx.array]:
        runner.store.start(0, len(tokens))
        start = 0
        for end in (*cuts, len(tokens)):
            logits = runner.forward_row(0, mx.array([tokens[start:end]]), start)
            start = end
        # Copies: the next run writes the slabs in place.
        slabs = [slab[:1, :, : len(tokens)] + 0 for slab in runner.store.arrays()]
        mx.eval(logits, slabs)
        runner.store.free(0)
        return [logits, *slabs]

    expected = computed(256)
    for cuts in ((16, 256), (208, 256, 416), (272, *range(400, 430)), tuple(range(3, 430, 61))):
        for got, wanted in zip(computed(*cuts), expected, strict=True):
            assert mx.array_equal(got, wanted), cuts
