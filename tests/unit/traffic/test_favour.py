from __future__ import annotations

import pytest

from mlx_serving.traffic.favour import Favour
from mlx_serving.traffic.slo import parse
from mlx_serving.traffic.source import Ask
from mlx_serving.types import Priority, SamplingParams, Turn


def ask(priority: Priority, **fields) -> Ask:
    return Ask(
        **{"model_id": "m", "token_ids": [1], "sampling": SamplingParams(), **fields},
        priority=priority,
    )


@pytest.mark.parametrize(
    ("objectives", "asked", "goes_as"),
    [
        ([], Priority.LOW, Priority.LOW),
        (["ttft p90 < 1s class=low"], Priority.LOW, Priority.NORMAL),
        (["ttft p90 < 1s class=low"] * 3, Priority.LOW, Priority.CRITICAL),
        (["ttft p90 < 1s class=low"], Priority.NORMAL, Priority.NORMAL),
        (["ttft p90 < 1s model=m"] * 2, Priority.HIGH, Priority.CRITICAL),
        (["ttft p90 < 1s model=other"], Priority.HIGH, Priority.HIGH),
        (["ttft p90 < 1s key=team"], Priority.LOW, Priority.NORMAL),
        (["ttft p90 < 1s key=other"], Priority.LOW, Priority.LOW),
    ],
)
def test_who_goes_before_its_class(objectives, asked, goes_as):
    favour = Favour()
    favour.objectives = [parse(text) for text in objectives]
    assert favour.priority(ask(asked, turn=Turn(client="team"))) is goes_as
