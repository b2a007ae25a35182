from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mlx_serving.errors import MLXServingError
from mlx_serving.traffic.source import Ask
from mlx_serving.types import SamplingParams
from mlx_serving.worker.wire import TokenRow


class FakeSource:
    """A sequence in the test's hands: `say` rows, `fail` it."""

    reused = None
    seed = 5
    begun = True
    begun_s = 0.0

    def __init__(self) -> None:
        self.cancelled = False
        self.taken = 0
        """Rows that were asked for and given."""
        self._said: asyncio.Queue[TokenRow | MLXServingError] = asyncio.Queue()

    def say(self, *token_ids: int, finish=None, **fields) -> None:
        self._said.put_nowait(
            TokenRow(seq_id=9, token_ids=list(token_ids), finish_reason=finish, **fields)
        )

    def fail(self, error: MLXServingError) -> None:
        self._said.put_nowait(error)

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[TokenRow]:
        while True:
            item = await self._said.get()
            if isinstance(item, MLXServingError):
                raise item
            self.taken += 1
            yield item
            if item.finish_reason is not None:
                return


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


def make_ask(**fields) -> Ask:
    sampling = SamplingParams(**{"temperature": 0.0, **fields.pop("sampling", {})})
    return Ask(**{"model_id": "m", "token_ids": [1, 2, 3], "sampling": sampling, **fields})


@pytest.fixture
def ask():
    return make_ask


async def settled() -> None:
    """Everything that can happen without anybody's doing has happened."""
    for _ in range(10):
        await asyncio.sleep(0)
