"""Every metric's name and meaning. Durations are in seconds, as Prometheus asks.

One registry an engine, so that several engines in one process do not meet.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlx_serving.telemetry.prefix_cache import PrefixCacheMeter

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_STAGE_S = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "mlx_serving_requests",
            "Requests that ended, by outcome: stop, length, cancelled or an error code",
            ["model", "outcome"],
            registry=r,
        )
        self.prompt_tokens = Counter(
            "mlx_serving_prompt_tokens", "Prompt tokens accepted", ["model"], registry=r
        )
        self.cached_tokens = Counter(
            "mlx_serving_cached_tokens",
            "Prompt tokens found in a cache instead of computed",
            ["model"],
            registry=r,
        )
        self.generated_tokens = Counter(
            "mlx_serving_generated_tokens",
            "Tokens generated and delivered",
            ["model"],
            registry=r,
        )
        self.shared_tokens = Counter(
            "mlx_serving_shared_tokens",
            "Generated tokens delivered without computing them again: followed (shared) or replayed (hit)",
            ["model", "by"],
            registry=r,
        )
        self.coalesced = Counter(
            "mlx_serving_coalesced_sequences",
            "Sequences that were not started because an identical one ran",
            ["model"],
            registry=r,
        )
        self.cache_lookups = Counter(
            "mlx_serving_response_cache_lookups",
            "Requests for a kept answer, by result: hit, miss or error (counted as a miss by who asked)",
            ["result"],
            registry=r,
        )
        self.cache_failures = Counter(
            "mlx_serving_response_cache_failures",
            "Uses of the response cache's store that failed, took too long or met a damaged entry",
            registry=r,
        )
        self.cache_entries = Gauge(
            "mlx_serving_response_cache_entries", "Answers kept in memory or on disk", registry=r
        )
        self.cache_bytes = Gauge(
            "mlx_serving_response_cache_bytes", "Bytes of the kept answers", registry=r
        )
        self.pooled_texts = Counter(
            "mlx_serving_pooled_texts",
            "Texts turned into vectors, and pairs of texts ranked",
            ["model"],
            registry=r,
        )
        self.ttft = Histogram(
            "mlx_serving_ttft_seconds",
            "From a request's arrival to its first token",
            ["model"],
            buckets=_LATENCY_S,
            registry=r,
        )
        self.ttft_stage = Histogram(
            "mlx_serving_ttft_stage_seconds",
            "Parts of the way to a first token: tokenise, grammar, hash, queue (disk: of that, waiting "
            "for the disk alone), prefill",
            ["model", "stage"],
            buckets=_STAGE_S,
            registry=r,
        )
        self.tpot = Histogram(
            "mlx_serving_tpot_seconds",
            "Mean time per output token after the first, one observation a request",
            ["model"],
            buckets=_TOKEN_S,
            registry=r,
        )
        self.duration = Histogram(
            "mlx_serving_request_seconds",
            "From a request's arrival to its last token",
            ["model"],
            buckets=_LATENCY_S,
            registry=r,
        )
        self.batch_occupancy = Histogram(
            "mlx_serving_batch_occupancy",
            "Rows in each decode step; sum / count is the mean batch occupancy",
            ["model"],
            buckets=_ROWS,
            registry=r,
        )
        self.step_time = Histogram(
            "mlx_serving_step_seconds",
            "Wall time of each worker step",
            ["model"],
            buckets=_TOKEN_S,
            registry=r,
        )
        self.prefill_tokens = Counter(
            "mlx_serving_prefill_tokens",
            "Prompt tokens computed, recomputation after preemption included",
            ["model"],
            registry=r,
        )
        self.forced_tokens = Counter(
            "mlx_serving_forced_tokens",
            "Tokens that took no step of their own, since a grammar left no choice",
            ["model"],
            registry=r,
        )
        self.running = Gauge(
            "mlx_serving_running_sequences", "Sequences that hold a row", ["model"], registry=r
        )
        self.waiting = Gauge(
            "mlx_serving_waiting_sequences",
            "Sequences in the worker that wait for a row",
            ["model"],
            registry=r,
        )
        self.open_requests = Gauge(
            "mlx_serving_open_requests",
            "Requests of a class accepted and not yet ended",
            ["class"],
            registry=r,
        )
        self.refused = Counter(
            "mlx_serving_refused_requests",
            "Requests for a model that were not begun, by class and error code",
            ["model", "class", "code"],
            registry=r,
        )
        self.kv_tokens = Gauge(
            "mlx_serving_kv_tokens", "Tokens of KV capacity that rows hold", ["model"], registry=r
        )
        self.kv_capacity = Gauge(
            "mlx_serving_kv_capacity_tokens",
            "Tokens of KV capacity that memory allows",
            ["model"],
            registry=r,
        )
        self.prefix_cache = PrefixCacheMeter(r)
        self.memory = Gauge(
            "mlx_serving_memory_bytes",
            "The worker's memory: budget; active and cached of MLX's allocator, and its peak; rss",
            ["kind"],
            registry=r,
        )
        self.prefetches = Counter(
            "mlx_serving_prefetches",
            "Models prepared (begun); requests for such (hit); loads of models that were not (miss)",
            ["outcome"],
            registry=r,
        )
        self.worker_up = Gauge(
            "mlx_serving_worker_up", "1 while the worker is connected", registry=r
        )
        self.worker_restarts = Counter(
            "mlx_serving_worker_restarts", "Times the worker was started again", registry=r
        )
        self.slo_burn = Gauge(
            "mlx_serving_slo_burn_rate",
            "Share of requests that missed the objective over its error budget, short window",
            ["objective"],
            registry=r,
        )
        self.slo_figure = Gauge(
            "mlx_serving_slo_figure",
            "What the objective's percentile is in the short window: seconds, tokens/s, or a share of "
            "requests",
            ["objective"],
            registry=r,
        )
        self.slo_violated = Gauge(
            "mlx_serving_slo_violated",
            "1 while the objective is violated",
            ["objective"],
            registry=r,
        )
        self.remedies = Counter(
            "mlx_serving_remedies",
            "Remedies for service levels: applied, taken_back, would_apply",
            ["remedy", "act"],
            registry=r,
        )
        self.alerts_dropped = Counter(
            "mlx_serving_alerts_dropped",
            "Alerts that the webhook did not take, or that too many waited before",
            registry=r,
        )
        self.concurrency = Gauge(
            "mlx_serving_concurrency_ceiling",
            "Sequences of a model that may be computed at once, as guard, remedies and settings have it",
            ["model"],
            registry=r,
        )
        self.guard_degraded = Gauge(
            "mlx_serving_guard_degraded",
            "1 while a model's steps were too slow for as many sequences as it could decode at once",
            ["model"],
            registry=r,
        )
        self.flagged = Counter(
            "mlx_serving_flagged_requests",
            "Requests that a feature flag is about: in its share (on) and outside of it (off)",
            ["flag", "state"],
            registry=r,
        )
        self.rollout_share = Gauge(
            "mlx_serving_rollout_share",
            "The share of a model's requests that a rollout's variant takes; 0: it was rolled back",
            ["rollout", "model", "variant"],
            registry=r,
        )
        self.shadows_skipped = Counter(
            "mlx_serving_shadows_skipped",
            "Requests that a shadow did not copy, because too many of its copies ran or none was let in",
            registry=r,
        )
        self.drifts = Counter(
            "mlx_serving_drifts",
            "Times that a figure of a model got worse than its baseline and stayed so",
            ["model", "metric"],
            registry=r,
        )
        self.events_dropped = Counter(
            "mlx_serving_events_dropped",
            "Events not delivered because an iterator's queue was full",
            registry=r,
        )

    def render(self) -> bytes:
        """The Prometheus text exposition."""
        return generate_latest(self.registry)
