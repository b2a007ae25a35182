from __future__ import annotations

import pytest

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend.prefix import BLOCK_TOKENS, PrefixPlan, prefix_plan
from mlx_serving.types import PrefixReuse
from mlx_serving.worker.wire import ModelOptions

STEP, KV_BYTES, ROOM = 256, 1000, 64_000_000


def plan(
    ability: PrefixReuse = "blocks",
    *,
    invariant: bool = True,
    state_bytes: int = 0,
    asked: int | None = None,
) -> PrefixPlan:
    options = ModelOptions(prefix_cache_bytes=asked)
    return prefix_plan(ability, STEP, invariant, KV_BYTES, state_bytes, ROOM, options)


def test_any_block_where_results_do_not_depend_on_cuts() -> None:
    made = plan()
    assert (made.reuse, made.block_tokens, made.whole_chunks) == ("blocks", BLOCK_TOKENS, False)
    assert made.total_bytes == made.blocks * BLOCK_TOKENS * KV_BYTES == ROOM // 4


def test_whole_chunks_elsewhere_and_for_recurrent_state() -> None:
    made = plan(invariant=False)
    assert (made.reuse, made.block_tokens, made.whole_chunks) == ("blocks", STEP, True)
    made = plan("snapshots", state_bytes=44_000)
    assert (made.reuse, made.block_tokens, made.whole_chunks) == ("snapshots", STEP, True)
    assert made.block_bytes == STEP * KV_BYTES + 44_000


def test_bytes_that_are_asked_for_are_kept_to() -> None:
    assert plan(asked=160_000).blocks == 10
    assert plan(asked=159_999).blocks == 9
    with pytest.raises(ModelBroken, match="prefix_cache_bytes"):
        plan(asked=ROOM + 1)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (plan("none"), "row slots"),
        (plan(asked=0), "is 0"),
        (plan(asked=10), "too much"),
    ],
)
def test_no_reuse_says_why(made: PrefixPlan, why: str) -> None:
    assert made.reuse == "none" and made.blocks == 0 and made.total_bytes == 0
    assert why in made.why
