from __future__ import annotations

import pytest

from mlx_serving.worker.restart import GiveUp, Restart, RestartPolicy, after_death

POLICY = RestartPolicy(base_s=0.5, max_s=3.0, quick_s=10.0, give_up_after=6)


@pytest.mark.parametrize(
    ("ready_s", "attempt", "decision"),
    [
        (100.0, 0, Restart(1, 0.0)),
        (10.0, 0, Restart(1, 0.0)),
        (0.0, 0, Restart(1, 0.0)),
        (0.0, 1, Restart(2, 0.5)),
        (9.9, 2, Restart(3, 1.0)),
        (0.0, 3, Restart(4, 2.0)),
        (0.0, 4, Restart(5, 3.0)),
        (0.0, 5, GiveUp(6)),
        (10.0, 5, Restart(1, 0.0)),
    ],
)
def test_after_death(ready_s, attempt, decision):
    assert after_death(POLICY, ready_s, attempt) == decision


def test_one_chance():
    policy = RestartPolicy(quick_s=float("inf"), give_up_after=1)
    assert after_death(policy, 1e9, 0) == GiveUp(1)


def test_a_crash_loop_ends_after_its_bound():
    attempt, delays = 0, []
    while isinstance(decision := after_death(POLICY, 0.0, attempt), Restart):
        attempt = decision.attempt
        delays.append(decision.in_s)
    assert delays == [0.0, 0.5, 1.0, 2.0, 3.0]
