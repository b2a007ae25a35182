"""What priorities promise, where there is twice the load that there is room for."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from mlx_serving.runtime.core.policy import lane_rows
from mlx_serving.types import Priority, Turn
from sim.crowd import (
    PREFILL_TOKEN_S,
    ROW_S,
    SMOLLM2,
    STEP_S,
    Crowd,
    Customer,
    limits,
    poisson,
)

ROWS = 16
FULL_STEP_S = STEP_S + ROWS * ROW_S
REQUEST_S = 100 * PREFILL_TOKEN_S + 40 * FULL_STEP_S / ROWS
"""What one request takes of a machine whose rows are full."""
CAPACITY = 1 / REQUEST_S
"""Requests a second."""


def p99(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


@pytest.mark.parametrize("seed", range(3))
def test_twice_the_load_does_not_reach_the_critical(seed) -> None:
    rng, ids, until_s = random.Random(seed), itertools.count(), 30.0
    capacity = 1 / (100 * PREFILL_TOKEN_S + 120 * FULL_STEP_S / ROWS)
    # Prompts of many chunks: what they wait for at least is the two steps in flight when they come.
    gap_s = 10 / capacity
    critical = [
        Customer((i + rng.random() / 2) * gap_s, next(ids), Priority.CRITICAL, prompt_tokens=300)
        for i in range(int(until_s / gap_s))
    ]
    others = [
        customer
        for priority, share in ((Priority.HIGH, 0.2), (Priority.NORMAL, 0.9), (Priority.LOW, 0.8))
        for customer in poisson(
            rng, share * capacity, until_s, ids, priority=priority, max_tokens=120
        )
    ]

    def fresh(customers: list[Customer], **fields: object) -> list[Customer]:
        return [replace(c, tokens=[], first_s=None, done_s=None, **fields) for c in customers]

    of = limits(ROWS, max_wait_s=60.0, prefill_step_size=32)
    quiet = Crowd(fresh(critical), of).run(until_s)
    loaded = Crowd(fresh([*critical, *others]), of).run(until_s)
    alike = Crowd(fresh([*critical, *others], priority=Priority.NORMAL), of).run(until_s)

    def ttfts(crowd: Crowd) -> list[float]:
        found = [crowd.customers[c.seq_id] for c in critical if c.arrives_s < until_s - 5]
        assert all(c.first_s is not None for c in found)
        return [c.ttft_s for c in found]

    loaded.check_answers()
    assert loaded.preemptions > 0
    assert p99(ttfts(loaded)) <= 1.5 * p99(ttfts(quiet))
    assert loaded.tokens() >= 0.95 * alike.tokens()
    # Without classes nobody is spared.
    assert p99([c.ttft_s for c in alike.customers.values() if c.first_s]) > 10 * p99(ttfts(quiet))


@pytest.mark.parametrize(
    ("prompt_tokens", "seeds"),
    [
        (150, range(1)),
        *(pytest.param(n, range(5), marks=pytest.mark.slow) for n in (64, 150, 300)),
    ],
)
def test_nor_does_it_where_critical_requests_overlap(prompt_tokens, seeds) -> None:
    """They come at random, 15 for each 100 others that there is room for. Alone, too, they wait for each
    other then. What the load adds is the step that is under way as each comes."""
    quiet_s, loaded_s = [], []
    for seed in seeds:
        quiet, loaded, share = _overlapping(prompt_tokens, seed)
        quiet_s += quiet
        loaded_s += loaded
        assert share >= 0.95
    assert p99(loaded_s) <= 1.5 * p99(quiet_s)


def _overlapping(prompt_tokens: int, seed: int) -> tuple[list[float], list[float], float]:
    """Critical TTFTs in seconds, alone and under load, and the tokens served with critical requests over
    those without."""
    answer, until_s = 48, 40.0
    full_step_s = SMOLLM2.step_s + ROWS * SMOLLM2.row_s
    capacity = 1 / (64 * SMOLLM2.prefill_token_s + answer * full_step_s / ROWS)
    rng, ids = random.Random(seed), itertools.count()
    shape = {"prompt_tokens": prompt_tokens, "max_tokens": 16}
    critical = poisson(rng, 0.15 * capacity, until_s, ids, priority=Priority.CRITICAL, **shape)
    others = [
        customer
        for priority in (Priority.NORMAL, Priority.LOW)
        for customer in poisson(
            rng, capacity, until_s, ids, priority=priority, prompt_tokens=64, max_tokens=answer
        )
    ]

    def crowd(customers: list[Customer]) -> Crowd:
        fresh = [replace(c, tokens=[], first_s=None, done_s=None) for c in customers]
        of = limits(ROWS, max_wait_s=60.0, prefill_step_size=256, prefill_grain=8)
        return Crowd(fresh, of, SMOLLM2).run(until_s)

    def ttfts(found: Crowd) -> list[float]:
        came = (found.customers[c.seq_id] for c in critical if c.arrives_s < until_s - 5)
        return [c.ttft_s for c in came]

    quiet, loaded, without = crowd(critical), crowd([*critical, *others]), crowd(others)
    served = [loaded.customers[c.seq_id] for c in critical]
    assert any(b.arrives_s < (a.done_s or 0.0) for a, b in pairwise(served))
    return ttfts(quiet), ttfts(loaded), loaded.tokens() / without.tokens()


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_nobody_starves(rows) -> None:
    """Whoever waits begins within `max_wait_s` and the time that those before it in the lane take."""
    ids, max_wait_s = itertools.count(), 3.0
    of = limits(rows, max_wait_s=max_wait_s)
    flood = [
        Customer(0.05 * i, next(ids), Priority.CRITICAL) for i in range(int(25 / 0.05))
    ]  # thrice what fits
    patient = [Customer(0.5 + i, next(ids), Priority.LOW) for i in range(6)]
    crowd = Crowd([*flood, *patient], of).run(25.0)
    # One of them, alone among full rows, with every step a prefill's besides.
    service_s = (2 + 40) * (FULL_STEP_S + 64 * PREFILL_TOKEN_S)
    lane = lane_rows(of.max_num_seqs)
    for place, customer in enumerate(patient):
        # Critical ones that have waited too long are in the lane too, before it if they are older.
        older = sum(
            1
            for c in flood
            if c.arrives_s <= customer.arrives_s
            and (c.first_s is None or c.first_s > customer.arrives_s + max_wait_s)
        )
        rounds = 1 + (older + place) // lane
        bound_s = max_wait_s + (rounds + 1) * service_s
        if customer.arrives_s + bound_s < 25.0:
            assert customer.first_s is not None and customer.ttft_s <= bound_s
    assert any(c.first_s is not None for c in patient)
    crowd.check_answers()


def test_without_ageing_the_patient_starve() -> None:
    ids = itertools.count()
    flood = [Customer(0.01 * i, next(ids), Priority.CRITICAL) for i in range(2000)]
    patient = Customer(0.5, next(ids), Priority.LOW)
    Crowd([*flood, patient], limits(4)).run(20.0)
    assert patient.first_s is None


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0)])
def test_clients_share_tokens_by_weight_however_they_ask(weights) -> None:
    """Few long requests or many short ones: what each gets over its weight differs by no more than
    what their rows can hold."""
    ids, of = itertools.count(), limits(4)
    shapes = {"few": (60, 30), "many": (20, 10)}
    weight = dict(zip(shapes, weights, strict=True))
    crowd = Crowd(
        [
            Customer(
                0.0,
                next(ids),
                prompt_tokens=prompt,
                max_tokens=answer,
                turn=Turn(client=client, weight=weight[client]),
            )
            for client, (prompt, answer) in shapes.items()
            for _ in range(20_000 // (prompt + answer))
        ],
        of,
    )
    slack = 2 * of.max_num_seqs * sum(shapes["few"]) / min(weights)
    for until_s in (2.0, 5.0, 10.0):
        crowd.run(until_s)
        shares = [crowd.served(client) / weight[client] for client in shapes]
        assert all(crowd.scheduler.shares._present.get(client) for client in shapes)
        assert abs(shares[0] - shares[1]) <= slack
    assert min(shares) > 2 * slack, "the bound would hold of anything"
    crowd.check_answers()


def test_who_comes_late_has_saved_nothing_up() -> None:
    ids, of = itertools.count(), limits(4)
    early = [Customer(0.0, next(ids), turn=Turn(client="early")) for _ in range(400)]
    late = [Customer(20.0, next(ids), turn=Turn(client="late")) for _ in range(400)]
    crowd = Crowd([*early, *late], of).run(20.0)
    before = crowd.served("early")
    crowd.run(40.0)
    gained = crowd.served("early") - before
    assert gained > 0.4 * (gained + crowd.served("late"))


def test_short_jobs_go_first_and_long_ones_still_go() -> None:
    def customers() -> list[Customer]:
        rng, ids = random.Random(1), itertools.count()
        return [
            Customer(c.arrives_s, c.seq_id, max_tokens=n, turn=Turn(expected_tokens=n))
            for c in poisson(rng, 1.2 * CAPACITY, 30.0, ids)
            for n in [rng.choice([5, 5, 5, 150])]
        ]

    plain = Crowd(customers(), limits(ROWS)).run()
    short = Crowd(customers(), limits(ROWS, short_jobs_first=True)).run()

    def mean_ttft_s(crowd: Crowd) -> float:
        return sum(c.ttft_s for c in crowd.customers.values()) / len(crowd.customers)

    assert mean_ttft_s(short) < 0.92 * mean_ttft_s(plain)
    assert all(c.done_s is not None for c in short.customers.values())
    short.check_answers()


def test_what_cannot_end_in_time_is_not_begun() -> None:
    rng, ids = random.Random(2), itertools.count()
    customers = [
        replace(c, turn=Turn(deadline_s=c.arrives_s + 2.0))
        for c in poisson(rng, 2 * CAPACITY, 20.0, ids)
    ]
    crowd = Crowd(customers, limits(ROWS)).run()
    refused = [c for c in crowd.customers.values() if c.refused]
    served = [c for c in crowd.customers.values() if not c.refused]
    in_time = [c for c in served if c.done_s is not None and c.done_s <= c.arrives_s + 2.0]
    assert refused and all(c.first_s is None for c in refused)
    # Without refusals nearly nobody would be in time: each would wait behind those who are late.
    assert len(in_time) >= 0.3 * len(customers)
    crowd.check_answers()
