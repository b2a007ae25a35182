"""What the metrics count of a request that has ended, or was never begun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_serving.errors import MLXServingError
from mlx_serving.telemetry.events import RequestFinished
from mlx_serving.telemetry.metrics import Metrics
from mlx_serving.types import Priority


@contextmanager
def refusals(m: Metrics, model: str, priority: Priority) -> Iterator[None]:
    """Why a request is not begun inside."""
    try:
        yield
    except MLXServingError as error:
        m.refused.labels(model, priority.name.lower(), error.code).inc()
        raise


def count(m: Metrics, finished: RequestFinished) -> None:
    model, usage = finished.model_id, finished.usage
    m.requests.labels(model, finished.outcome).inc()
    m.prompt_tokens.labels(model).inc(usage.prompt_tokens)
    m.cached_tokens.labels(model).inc(usage.cached_tokens)
    m.generated_tokens.labels(model).inc(usage.completion_tokens)
    if usage.shared_tokens:
        by = "hit" if finished.reused == "hit" else "shared"
        m.shared_tokens.labels(model, by).inc(usage.shared_tokens)
    m.duration.labels(model).observe(finished.duration_ms / 1e3)
    if finished.ttft_ms is not None:
        m.ttft.labels(model).observe(finished.ttft_ms / 1e3)
    if finished.tpot_ms is not None:
        m.tpot.labels(model).observe(finished.tpot_ms / 1e3)
