from __future__ import annotations

import pytest

from mlx_serving.worker.breaker import (
    BreakerPolicy,
    Closed,
    HalfOpen,
    Open,
    Wait,
    after_death,
    after_probe,
    after_wait,
)

POLICY = BreakerPolicy(
    window_s=60,
    max_deaths=5,
    base_s=0.5,
    max_s=1.5,
    open_s=10,
    max_open_s=30,
    jitter=0.5,
)


@pytest.mark.parametrize(
    ("breaker", "now_s", "draw", "wait"),
    [
        # The first death in a window costs no delay; then it doubles, up to its bound.
        (Closed(), 100, 0, Wait(Closed((100,)), 0)),
        (Closed((100,)), 101, 0, Wait(Closed((100, 101)), 0.5)),
        (Closed((100, 101)), 102, 0, Wait(Closed((100, 101, 102)), 1.0)),
        (Closed((100, 101, 102)), 103, 0, Wait(Closed((100, 101, 102, 103)), 1.5)),
        # Jitter makes it longer, never shorter.
        (Closed((100,)), 101, 1, Wait(Closed((100, 101)), 0.75)),
        # What is older than the window is forgotten.
        (Closed((100, 101, 102, 103)), 161, 0, Wait(Closed((102, 103, 161)), 1.0)),
        (Closed((1, 2, 3, 4)), 1000, 1, Wait(Closed((1000,)), 0)),
        # Too many within the window: open; a probe that fails: open for twice as long, bounded.
        (Closed((100, 101, 102, 103)), 104, 0, Wait(Open(114, 1), 10)),
        (Closed((100, 101, 102, 103)), 104, 0.5, Wait(Open(116.5, 1), 12.5)),
        (HalfOpen(1), 200, 0, Wait(Open(220, 2), 20)),
        (HalfOpen(2), 200, 0, Wait(Open(230, 3), 30)),
        (HalfOpen(9), 200, 0, Wait(Open(230, 10), 30)),
    ],
)
def test_after_death(breaker, now_s, draw, wait):
    assert after_death(POLICY, breaker, now_s, draw) == wait


def test_after_a_wait_only_an_open_one_asks_for_a_probe():
    assert after_wait(Open(114, 3)) == HalfOpen(3)
    assert after_wait(Closed((1,))) == Closed((1,))


def test_a_probe_that_succeeds_closes_it_with_a_clean_record():
    assert after_probe(HalfOpen(3)) == Closed()
    assert after_probe(Closed((1, 2))) == Closed((1, 2))
