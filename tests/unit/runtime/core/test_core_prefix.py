from __future__ import annotations

import random

import pytest

from mlx_serving.runtime.core.plan import Limits, Sampled, StepResult
from mlx_serving.runtime.core.prefix import Block, PrefixIndex, extend_keys
from mlx_serving.runtime.core.scheduler import Scheduler
from mlx_serving.runtime.core.sequence import Sequence
from mlx_serving.types import Priority, SamplingParams


def keys_of(tokens: list[int], salt: str | None = None, size: int = 2) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, salt, tokens, size)
    return keys


def grow(index: PrefixIndex, keys: list[bytes]) -> list[Block]:
    """As a sequence publishes: holding the last block until the next one is there."""
    chain = index.find(keys, len(keys))
    tip = chain[-1] if chain else None
    if tip is not None:
        index.hold(tip)
    for at in range(len(chain), len(keys)):
        block = index.add(tip, keys[at], at * index.block_tokens)
        if block is None:
            break
        index.hold(block)
        if tip is not None:
            index.release(tip)
        chain.append(block)
        tip = block
    if tip is not None:
        index.release(tip)
    return chain


def test_a_key_names_salt_and_whole_prefix() -> None:
    keys = keys_of([1, 2, 3, 4, 5])
    assert len(keys) == 2 and keys_of([1, 2, 3, 4]) == keys
    assert keys_of([1, 2, 3, 5])[0] == keys[0]
    others = [keys_of([9, 2, 3, 4]), keys_of([1, 2, 3, 4], "s"), keys_of([1, 2, 3, 4], "")]
    assert len({keys[1], *(other[1] for other in others)}) == 4
    extend_keys(keys, None, [1, 2, 3, 4, 5, 6, 7], 2)
    assert keys == keys_of([1, 2, 3, 4, 5, 6])


def test_a_key_names_the_adapter() -> None:
    tokens = [1, 2, 3, 4]

    def key(salt: str | None, adapter: str | None) -> bytes:
        keys: list[bytes] = []
        extend_keys(keys, salt, tokens, 2, adapter)
        return keys[-1]

    pairs = [(s, a) for s in (None, "", "s", "1:as") for a in (None, "", "s", "ss", "a1:s")]
    assert len({key(*pair) for pair in pairs}) == len(pairs)
    assert key(None, None) == keys_of(tokens)[-1]


def test_the_longest_known_prefix_is_found() -> None:
    index = PrefixIndex(10, 2)
    chain = grow(index, keys_of([1, 2, 3, 4, 5, 6]))
    assert [block.id for block in chain] == [0, 1, 2]
    assert index.find(keys_of([1, 2, 3, 4, 9, 9]), 3) == chain[:2]
    assert index.find(keys_of([1, 2, 3, 4, 5, 6]), 1) == chain[:1]
    assert index.find(keys_of([3, 4]), 1) == []


def test_leaves_go_first_and_what_is_held_stays() -> None:
    index = PrefixIndex(3, 2)
    first = grow(index, keys_of([1, 2, 3, 4, 5, 6]))
    index.hold(first[1])
    assert len(grow(index, keys_of([7, 8, 9, 9]))) == 1, "one block was free to go"
    assert index.find(keys_of([1, 2, 3, 4, 5, 6]), 3) == first[:2]
    assert index.find(keys_of([7, 8]), 1)[0].id == 2
    index.release(first[1])
    grow(index, keys_of([7, 8, 9, 9]))
    assert index.find(keys_of([1, 2, 3, 4]), 2) == first[:1]


def test_what_is_used_often_outlives_what_is_newer_but_not_for_ever() -> None:
    index = PrefixIndex(4, 2)
    popular = grow(index, keys_of([1, 2]))
    for _ in range(100):
        index.use(popular)
    survived = 0
    for token in range(10, 100):
        grow(index, keys_of([token, token]))
        survived += bool(index.find(keys_of([1, 2]), 1))
    assert 4 < survived < 60


def test_any_order_of_wishes_keeps_the_accounts() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        index = PrefixIndex(rng.choice([1, 4, 12]), 1)
        held: list[Block] = []
        for _ in range(200):
            chain = grow(index, keys_of([rng.randrange(3) for _ in range(6)], size=1))
            if chain and rng.random() < 0.3:
                index.use(chain)
                held.append(rng.choice(chain))
                index.hold(held[-1])
            if held and rng.random() < 0.3:
                index.release(held.pop(rng.randrange(len(held))))
            blocks = index.blocks.values()
            assert sorted(b.id for b in blocks) == list(range(len(index)))
            assert all(index.blocks[b.key] is b for b in held), "a held block was evicted"
            assert all(b.parent is None or index.blocks[b.parent.key] is b.parent for b in blocks)
        assert index.evictions > 0


# -- sequences that share -----------------------------------------------------------------

STEP = 32
LIMITS = Limits(
    max_num_seqs=16,
    prefill_step_size=STEP,
    context_length=1024,
    kv_capacity_tokens=16 * 1024,
    prefix_blocks=200,
    prefix_block_tokens=16,
)


def sequence(seq_id: int, tokens: list[int], **fields: object) -> Sequence:
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    return Sequence(
        seq_id=seq_id,
        tokens=list(tokens),
        prompt_len=len(tokens),
        sampling=sampling,
        **fields,  # type: ignore[arg-type]
    )


def step(scheduler: Scheduler) -> tuple[int, dict[int, int]]:
    """One step: how many tokens were prefilled, and cached tokens by sequence."""
    plan = scheduler.schedule(0.0)
    assert plan is not None
    ids = [c.seq_id for c in plan.prefill if c.samples] + [d.seq_id for d in plan.decode]
    emitted = scheduler.apply(StepResult(plan.step_id, [Sampled(i, [7]) for i in ids]))
    return plan.prefill_tokens, {e.seq_id: e.cached_tokens for e in emitted if e.cached_tokens}


def preempted() -> Scheduler:
    """Sequence 0, of 100 tokens, lost its row after 64 of them and may have another."""
    scheduler = Scheduler(LIMITS)
    scheduler.add(sequence(0, list(range(100))))
    for _ in range(2):
        step(scheduler)
    scheduler.pause(0)
    for i in range(1, 17):
        scheduler.add(sequence(i, [i]))
    while len(scheduler.sequences) > 1:
        step(scheduler)
    scheduler.resume(0)
    return scheduler


def test_sixteen_that_arrive_together_compute_their_prompt_once() -> None:
    scheduler = Scheduler(LIMITS)
    system = list(range(320))
    for i in range(16):
        scheduler.add(sequence(i, [*system, 1000 + i, 1, 2, 3]))
    prefilled = 0
    cached: dict[int, int] = {}
    while scheduler.sequences:
        tokens, told = step(scheduler)
        prefilled += tokens
        cached |= told
    assert prefilled == 320 + 16 * 4
    assert cached == dict.fromkeys(range(1, 16), 320)


def test_it_is_told_once_what_was_left_in_the_cache() -> None:
    scheduler = Scheduler(LIMITS)
    told = []
    system = list(range(40))
    for i, prompt in enumerate((system, [*system, *range(100, 130)], system)):
        scheduler.add(sequence(i, prompt))
        while scheduler.sequences:
            plan = scheduler.schedule(0.0)
            assert plan is not None
            ids = [c.seq_id for c in plan.prefill if c.samples] + [d.seq_id for d in plan.decode]
            emitted = scheduler.apply(StepResult(plan.step_id, [Sampled(j, [7]) for j in ids]))
            told += [(e.seq_id, e.cached_tokens, e.cache_write_tokens) for e in emitted]
    assert told == [(0, 0, 32), (0, 0, 0), (1, 32, 32), (1, 0, 0), (2, 32, 0), (2, 0, 0)]


def test_what_it_left_counts_though_it_was_preempted() -> None:
    """Before its first token; its own blocks are not what it found."""
    scheduler = preempted()
    while (plan := scheduler.schedule(0.0)) is not None:
        ids = [c.seq_id for c in plan.prefill if c.samples]
        emitted = scheduler.apply(StepResult(plan.step_id, [Sampled(j, [7]) for j in ids]))
        if emitted:
            break
    assert [(e.cached_tokens, e.cache_write_tokens) for e in emitted] == [(0, 96)]


def test_nobody_waits_for_a_sequence_behind_it_or_one_that_is_paused_or_gone() -> None:
    prompt = list(range(200))
    for what in ("behind", "paused", "gone"):
        scheduler = Scheduler(LIMITS)
        low = Priority.LOW if what == "behind" else Priority.NORMAL
        scheduler.add(sequence(0, prompt, priority=low))
        step(scheduler)
        scheduler.add(sequence(1, prompt))
        if what == "paused":
            scheduler.pause(0)
        if what == "gone":
            scheduler.cancel(0)
        plan = scheduler.schedule(0.0)
        assert plan is not None
        assert [(s.seq_id, s.reused) for s in plan.starts] == [(1, STEP)], what


def test_a_preempted_sequence_finds_its_own_blocks() -> None:
    scheduler = preempted()
    plan = scheduler.schedule(0.0)
    assert plan is not None and [(s.seq_id, s.reused) for s in plan.starts] == [(0, 64)]


def test_a_whole_prompt_is_never_copied() -> None:
    scheduler = Scheduler(LIMITS)
    cached: dict[int, int] = {}
    for i in range(2):
        scheduler.add(sequence(i, list(range(64))))
        while scheduler.sequences:
            cached |= step(scheduler)[1]
    assert cached == {1: 48}


@pytest.mark.parametrize("whole_chunks", [False, True])
def test_an_answer_is_published_only_where_decoding_gives_the_same_bits(whole_chunks: bool) -> None:
    size = STEP if whole_chunks else 16
    scheduler = Scheduler(
        Limits(
            max_num_seqs=1,
            prefill_step_size=STEP,
            context_length=512,
            kv_capacity_tokens=512,
            prefix_blocks=10,
            prefix_block_tokens=size,
            prefix_whole_chunks=whole_chunks,
        )
    )
    seq = sequence(0, list(range(30)))
    seq.sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    scheduler.add(seq)
    while scheduler.sequences:
        step(scheduler)
    assert len(scheduler.sharing.index) == (0 if whole_chunks else 5)
