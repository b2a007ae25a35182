"""Figures as Markdown, each section one table."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from mlx_serving.bench.compare import Comparison
from mlx_serving.bench.gaps import Gaps
from mlx_serving.bench.overhead import Overhead
from mlx_serving.bench.prefix import Replay, Reuse
from mlx_serving.bench.priority import Priorities
from mlx_serving.bench.schema import Jumps, SchemaCost
from mlx_serving.bench.switch import Switch
from mlx_serving.bench.ttft import PROMPTS, STAGES, STREAMS, Pipeline


def machine(model: str) -> str:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        "# Results\n\n"
        f"Measured on {datetime.now(UTC):%Y-%m-%d} with `make bench`: {_cpu()}, {cpus} CPUs, "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, model `{model}`. Medians; ratios are "
        "medians of the ratios pair by pair.\n"
    )


def overhead(o: Overhead) -> str:
    rows = [
        ("non-streamed request, p50", f"{o.request_p50_ms:.2f} ms", "≤ 1 ms"),
        ("non-streamed request, p95", f"{o.request_p95_ms:.2f} ms", ""),
        (
            "tokens per CPU second of the gateway, 16 streams, one event a token",
            f"{o.stream_tokens_per_cpu_s:,.0f}",
            "≥ 20,000",
        ),
        (
            "the same per wall second, paced by the scripted model",
            f"{o.stream_tokens_per_s:,.0f}",
            "",
        ),
        ("from `serve` to the first answer of /health", f"{o.health_s:.2f} s", "≤ 0.5 s"),
        ("idle gateway, resident memory", f"{o.idle_rss_mb:.0f} MB", "≤ 100 MB"),
    ]
    return _table("## Gateway, without a model's compute", ("figure", "measured", "aim"), rows)


def bare(kernels: str, figures: tuple[float, float, float]) -> str:
    ours, theirs, ratio = figures
    return _table(
        f"## One stream through HTTP against bare `stream_generate` (kernels: {kernels})",
        ("ours, tokens/s", "stream_generate, tokens/s", "ratio", "aim"),
        [(f"{ours:.2f}", f"{theirs:.2f}", f"{ratio:.3f}", "≥ 0.97")],
    )


def comparison(kernels: str, rows: Sequence[Comparison], rival: str = "mlx_lm.server") -> str:
    return _table(
        f"## Against `{rival}`, same weights, same load (kernels: {kernels})",
        ("streams", "tokens/s ours", "theirs", "ratio", "TTFT ours", "theirs", "ratio", "TPOT ours", "theirs", "ratio"),
        [
            (
                str(c.streams),
                f"{c.ours.tokens_per_s:.2f}",
                f"{c.theirs.tokens_per_s:.2f}",
                f"{c.throughput_ratio:.2f}",
                f"{c.ours.ttft_s:.2f} s",
                f"{c.theirs.ttft_s:.2f} s",
                f"{c.ttft_ratio:.2f}",
                f"{c.ours.tpot_s * 1e3:.0f} ms",
                f"{c.theirs.tpot_s * 1e3:.0f} ms",
                f"{c.tpot_ratio:.2f}",
            )
            for c in rows
        ],
    )  # fmt: skip


def depths(rates: Mapping[int, Mapping[int, float]]) -> str:
    return _table(
        "## Pipeline depth, tokens/s through HTTP (kernels: auto)",
        ("streams", "depth 1", "depth 2", "gain", "depth 3", "gain"),
        [
            (
                str(n),
                f"{by[1]:.1f}",
                f"{by[2]:.1f}",
                f"{by[2] / by[1] - 1:+.0%}",
                f"{by[3]:.1f}",
                f"{by[3] / by[1] - 1:+.0%}",
            )
            for n, by in rates.items()
        ],
    )


def schema(cost: SchemaCost) -> str:
    return _table(
        f"## A JSON schema, {cost.streams} streams through HTTP (kernels: auto)",
        ("figure", "without", "with a schema", "ratio", "aim"),
        [
            ("TTFT, the schema not yet compiled", *_pair(cost.ttft_ms, cost.ttft_ratio), ""),
            ("TPOT", *_pair(cost.tpot_ms, cost.tpot_ratio), "≤ 1.05"),
        ],
    )


def jumps(found: Sequence[Jumps]) -> str:
    rows = [
        (
            str(one.streams),
            f"{one.tokens_per_s[0]:.1f}",
            f"{one.tokens_per_s[1]:.1f}",
            f"{one.ratio:.3f}",
            f"{one.forced_share:.0%}",
        )
        for one in found
    ]
    head = (
        "streams",
        "off, tokens/s",
        "auto, tokens/s",
        "ratio",
        "tokens without a step of their own",
    )
    return _table("## `--jump-forward`, answers held to a schema (kernels: auto)", head, rows)


def _pair(ms: tuple[float, float], ratio: float) -> tuple[str, str, str]:
    return f"{ms[0]:.1f} ms", f"{ms[1]:.1f} ms", f"{ratio:.3f}"


def reuse(found: Reuse) -> str:
    rows = [
        ("cold", f"{found.cold_s:.2f} s", "", ""),
        ("from memory", f"{found.memory_s:.3f} s", f"1/{found.memory_ratio:.1f}", "≤ 1/20"),
        (
            "from disk, after a restart",
            f"{found.disk_s:.3f} s",
            f"1/{found.disk_ratio:.1f}",
            "≤ 1/8",
        ),
        (
            "prefill of 16 arrivals together, over one prompt and their tails",
            "",
            f"{found.work_ratio:.2f}",
            "≤ 1.1",
        ),
    ]
    head = ("a shared prefix of 2,000 tokens", "time to the first token", "of cold", "aim")
    return _table("## Prefix cache (kernels: auto)", head, rows)


def replays(found: Sequence[Replay]) -> str:
    rows = [
        (
            f"`{one.rival}`",
            f"{one.chats} × {one.turns}",
            f"{one.ours_s:.1f} s",
            f"{one.theirs_s:.1f} s",
            f"{one.ours_s / one.theirs_s:.2f}",
            "≤ 0.7",
        )
        for one in found
    ]
    head = ("rival", "chats × turns", "to all answers, ours", "theirs", "ratio", "aim")
    return _table("## A replay of conversations (kernels: auto)", head, rows)


def gaps(found: Sequence[Gaps], prompt_tokens: int) -> str:
    """`lost`: of the prefill's throughput without a target, the first of them."""
    free_s = found[0].prompt_s
    rows = [
        (
            f"{one.target_ms:.0f} ms" if one.target_ms else "none",
            f"{one.p50_ms:.0f} ms",
            f"{one.p99_ms:.0f} ms",
            f"{one.most_ms:.0f} ms",
            f"{one.prompt_s:.1f} s",
            f"{prompt_tokens / one.prompt_s:.0f} tok/s",
            f"{1 - free_s / one.prompt_s:.0%}",
        )
        for one in found
    ]
    head = ("--max-itl-ms", "gap, p50", "p99", "longest", "the prompt's TTFT", "prefill", "lost")
    title = f"## 8 streams while {prompt_tokens:,} tokens are prefilled (kernels: auto)"
    return _table(title, head, rows)


def switch(s: Switch) -> str:
    def ms(seconds: float) -> str:
        return f"{seconds * 1e3:.1f} ms"

    rows = [
        ("none: the same model again", ms(s.same_s), "", ""),
        ("in memory", f"{s.resident_s * 1e3:+.1f} ms", "", "< 5 ms more"),
        ("loaded, its files from the disk", ms(s.cold_s), "1", ""),
        ("loaded, its files from the page cache", ms(s.cached_s), f"{s.cached_ratio:.2f}", ""),
        ("prefetched, no room: files read ahead", ms(s.read_ahead_s), f"{s.read_ahead_ratio:.2f}", "≤ 0.4"),
        ("prefetched: loaded ahead", ms(s.loaded_ahead_s), f"{s.loaded_ahead_ratio:.2f}", "≤ 0.4"),
    ]  # fmt: skip
    kept = f"\nThe system kept {s.pages_kept:.0%} of the pages that were to be dropped.\n"
    header = ("the request's model is", "time to first token", "of cold", "aim")
    table = _table("## Another model than the last request's", header, rows)
    return table + (kept if s.pages_kept > 0.01 else "")


def priorities(found: Sequence[Priorities]) -> str:
    rows = [
        (
            one.flags or "default",
            f"{one.capacity:.1f}/s",
            str(one.critical),
            "{:.0f} / {:.0f} ms".format(*(1e3 * s for s in one.quiet_s)),
            "{:.0f} / {:.0f} ms".format(*(1e3 * s for s in one.loaded_s)),
            f"{one.ratio:.2f}",
            f"{one.throughput:.3f}",
        )
        for one in found
    ]
    head = (
        "flags",
        "capacity",
        "critical requests",
        "their TTFT alone, p50 / p99",
        "at twice the capacity",
        "ratio of p99 (aim ≤ 1.5)",
        "tokens/s with them over without (aim ≥ 0.95)",
    )
    return _table("## Critical requests under overload (kernels: auto)", head, rows)


def pipeline(found: Pipeline) -> str:
    rows = []
    for way in found.ways:
        stages = [way.stage_ms(stage) for stage in STAGES]
        told = ["" if ms is None else f"{ms:.1f} ms" for ms in stages]
        ttft, gap = statistics.median(way.ttfts_s), statistics.median(way.gaps_s)
        ratios = ("", "")
        if way.against is not None:
            ratios = (
                _ratio(way.ttfts_s, way.against.ttfts_s),
                _ratio(way.gaps_s, way.against.gaps_s),
            )
        against = "" if way.against is None else way.against.name
        figures = (f"{ttft * 1e3:.0f} ms", ratios[0], f"{gap * 1e3:.0f} ms", ratios[1])
        rows.append((way.name, against, *figures, *told))
    head = ("", "against", "TTFT", "ratio", "longest gap", "ratio", *STAGES)
    title = (
        f"## The way to a first token: {PROMPTS} requests together, with a schema, beside {STREAMS} "
        f"running streams; {found.rounds} rounds in {found.took_s:.0f} s (stages: means)"
    )
    return _table(title, head, rows)


def _ratio(these: Sequence[float], those: Sequence[float]) -> str:
    """The median of the rounds' own."""
    return f"{statistics.median(a / b for a, b in zip(these, those, strict=True)):.2f}"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [title, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
