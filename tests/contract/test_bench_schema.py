"""`make bench`'s part `schema` runs, with equal loads; what it measures is not tested."""

from __future__ import annotations

from typing import Any

import jsonschema

from mlx_serving.bench import report, schema


async def test_the_cost_of_a_schema(scripted: Any) -> None:
    folder = scripted(mode="hash", context=4096)
    cost = await schema.measure(folder, streams=2, max_tokens=16, rounds=2)
    assert cost.streams == 2 and min(*cost.ttft_ms, *cost.tpot_ms) > 0
    assert "≤ 1.05" in report.schema(cost)


async def test_what_forced_tokens_gain(scripted: Any) -> None:
    found = await schema.jumps(scripted(mode="hash", context=4096), streams=2, rounds=1)
    assert found.streams == 2 and min(*found.tokens_per_s, found.ratio) > 0
    assert found.forced_share > 0.2, "the properties' names are"
    assert "ratio" in report.jumps([found])


def test_every_round_has_a_schema_of_its_own() -> None:
    formats = [schema.wish(turn)["response_format"]["json_schema"]["schema"] for turn in range(3)]
    assert len({str(one) for one in formats}) == 3
    for one in formats:
        jsonschema.Draft202012Validator.check_schema(one)
