"""What workers tell of their prefix caches, as metrics and as the newest figures.

A worker counts from its start; the metrics go on counting when the next one begins at zero.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from mlx_serving.types import CacheStats


class PrefixCacheMeter:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.latest: dict[str, CacheStats] = {}
        """By model."""
        self.tokens = Counter(
            "mlx_serving_prefix_cache_tokens",
            "Prompt tokens by where their beginning was found: memory, disk, or none (computed)",
            ["model", "tier"],
            registry=registry,
        )
        self.evictions = Counter(
            "mlx_serving_prefix_cache_evictions",
            "Prefix blocks dropped to make room, by tier",
            ["model", "tier"],
            registry=registry,
        )
        self.disk_blocks = Counter(
            "mlx_serving_prefix_cache_disk_blocks",
            "Prefix blocks read, written, lost (missing or damaged when read) or not_written (the "
            "disk was full, broken or slow)",
            ["model", "outcome"],
            registry=registry,
        )
        self.late = Counter(
            "mlx_serving_prefix_cache_late",
            "Requests that could not wait for the disk",
            ["model"],
            registry=registry,
        )
        self.blocks = Gauge(
            "mlx_serving_prefix_cache_blocks",
            "Prefix blocks held, by tier",
            ["model", "tier"],
            registry=registry,
        )
        self.bytes = Gauge(
            "mlx_serving_prefix_cache_bytes",
            "Bytes of prefix blocks, by tier; on disk of every model's",
            ["model", "tier"],
            registry=registry,
        )

    def take(self, model: str, stats: CacheStats) -> None:
        """The newest figures of a model's cache."""
        # Most figures are what they were, and looking a series up is what costs; at first each is made.
        first, old = model not in self.latest, self.latest.get(model, CacheStats())
        self.latest[model] = stats
        for counter, labels, name in (
            (self.tokens, ("memory",), "memory_hit_tokens"),
            (self.tokens, ("disk",), "disk_hit_tokens"),
            (self.tokens, ("none",), "miss_tokens"),
            (self.evictions, ("memory",), "memory_evictions"),
            (self.evictions, ("disk",), "disk_evictions"),
            (self.disk_blocks, ("read",), "disk_reads"),
            (self.disk_blocks, ("written",), "disk_writes"),
            (self.disk_blocks, ("lost",), "disk_lost"),
            (self.disk_blocks, ("not_written",), "disk_not_written"),
            (self.late, (), "disk_late"),
        ):
            now: int = getattr(stats, name)
            before: int = getattr(old, name)
            if first or now != before:
                # Less than before: another worker, which began at zero.
                counter.labels(model, *labels).inc(now - before if now >= before else now)
        for gauge, tier, name in (
            (self.blocks, "memory", "memory_blocks"),
            (self.blocks, "disk", "disk_blocks"),
            (self.bytes, "memory", "memory_bytes"),
            (self.bytes, "disk", "disk_bytes"),
        ):
            held: int = getattr(stats, name)
            if first or held != getattr(old, name):
                gauge.labels(model, tier).set(held)
