from __future__ import annotations

from prometheus_client import CollectorRegistry

from mlx_serving.telemetry.prefix_cache import PrefixCacheMeter
from mlx_serving.types import CacheStats


def test_counters_go_on_when_a_worker_begins_at_zero() -> None:
    registry = CollectorRegistry()
    meter = PrefixCacheMeter(registry)
    for hits, evictions in ((10, 1), (25, 1), (5, 0)):
        stats = CacheStats(memory_hit_tokens=hits, memory_evictions=evictions, memory_blocks=hits)
        meter.take("m", stats)

    def value(name: str) -> float | None:
        return registry.get_sample_value(name, {"model": "m", "tier": "memory"})

    assert value("mlx_serving_prefix_cache_tokens_total") == 30
    assert value("mlx_serving_prefix_cache_evictions_total") == 1
    assert value("mlx_serving_prefix_cache_blocks") == 5
    assert meter.latest["m"].memory_hit_tokens == 5
