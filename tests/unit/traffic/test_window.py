from __future__ import annotations

import random

import pytest

from mlx_serving.traffic.window import ACCURACY, Window


def test_a_window_forgets():
    window = Window(60)
    for second in range(60):
        window.add(second, missed=second < 30, figure=100.0 if second < 30 else 1.0)
    assert window.counts(59) == (60, 30)
    assert window.percentile(59, 0.9) == pytest.approx(100, rel=1.01 * ACCURACY)
    assert window.counts(89) == (30, 0)
    assert window.percentile(89, 0.9) == pytest.approx(1, rel=1.01 * ACCURACY)
    assert window.counts(500) == (0, 0)
    assert window.percentile(500, 0.9) is None


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9, 0.99, 1.0])
def test_percentiles_are_those_of_the_figures(share):
    rng, window = random.Random(1), Window(60)
    figures = sorted(rng.lognormvariate(3, 1.5) for _ in range(2000))
    for i, figure in enumerate(rng.sample(figures, len(figures))):
        window.add(i * 59 / len(figures), missed=False, figure=figure)
    exact = figures[int(share * (len(figures) - 1))]
    assert window.percentile(59, share) == pytest.approx(exact, rel=1.01 * ACCURACY)


def test_a_figure_of_nothing_is_a_small_one():
    window = Window(60)
    window.add(0, missed=False, figure=0.0)
    found = window.percentile(0, 0.5)
    assert found is not None and 0 < found < 0.01
