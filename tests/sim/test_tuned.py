from __future__ import annotations

import pytest

from sim.tuned import Tuned


def run(seed: int) -> Tuned:
    """Tokens are compared with those of each request alone, as they arrive."""
    tuned = Tuned(seed)
    try:
        tuned.run()
    except Exception as error:
        error.add_note(f"seed {seed}")
        raise
    return tuned


def test_tokens_stay_the_same_while_limits_change() -> None:
    runs = [run(seed) for seed in range(60)]
    for what in ("lowered", "raised", "over", "cut"):
        assert sum(getattr(one, what) for one in runs) > 0, f"no seed shows {what}"


@pytest.mark.slow
def test_a_thousand_seeds() -> None:
    for seed in range(1_000, 2_000):
        run(seed)
