from __future__ import annotations

from mlx_serving.worker.reconcile import Differences, compare


def test_a_new_process_has_nothing_to_put_right():
    assert compare(["a", "b"], [], []) == Differences((), ())


def test_what_nobody_asked_for_goes():
    assert compare(["a", "b"], ["b", "old"], [7, 9]) == Differences(("old",), (7, 9))
