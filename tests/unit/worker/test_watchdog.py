from __future__ import annotations

import math

import pytest

from mlx_serving.worker.watchdog import Deadlines, Vitals, stuck

DEADLINES = Deadlines(hello_s=30, silence_s=60, load_s=600, step_s=300)


@pytest.mark.parametrize(
    ("phase", "silent_s", "phase_s", "why"),
    [
        ("starting", 29, 29, None),
        ("starting", 31, 31, "30 s after its start"),
        # An idle worker may be idle for ever, but not silent.
        ("idle", 6, 1e9, None),
        ("idle", 61, 61, "no sign of life for 60 s while idle"),
        # A long load is no hang: it says that it lives, until its own deadline.
        ("loading", 1, 599, None),
        ("loading", 1, 601, "loading took longer than 600 s"),
        ("loading", 61, 61, "no sign of life for 60 s while loading"),
        ("compiling", 1, 599, None),
        ("compiling", 1, 601, "compiling took longer than 600 s"),
        # A step that hangs, in a process that lives; and a process that was stopped.
        ("stepping", 1, 299, None),
        ("stepping", 1, 301, "a step took longer than 300 s"),
        ("stepping", 61, 61, "no sign of life for 60 s while stepping"),
    ],
)
def test_stuck(phase, silent_s, phase_s, why):
    found = stuck(DEADLINES, Vitals(phase, silent_s, phase_s))
    assert (found is None) == (why is None)
    assert why is None or why in found


def test_it_looks_often_enough_and_not_oftener():
    assert DEADLINES.tick_s == 1.0
    assert Deadlines(step_s=0.4).tick_s == pytest.approx(0.1)
    assert Deadlines(math.inf, math.inf, math.inf, math.inf).tick_s == 1.0
