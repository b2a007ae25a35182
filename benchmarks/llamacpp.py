"""Ours beside llama.cpp on the same GGUF, run by run: in-process and through HTTP, with the machine's peaks.

    python benchmarks/llamacpp.py [--model NAME] [--modes exact fast] [--parts …] [--append REPORT]

llama.cpp's programs are built first, once (`mlx_serving.bench.llama_cpp`, which $LLAMA_CPP_BIN and
$LLAMA_CPP_GGUF override). Each round runs llama.cpp, then ours in each mode, each in a process of its
own; ratios are taken pair by pair. Decoding starts behind 80 tokens on both sides; tokens per second
are over whole runs. Through HTTP the same load goes to our server and to `llama-server` in turn. The
run fails if the default mode's logits are not as good as f32's (`quality.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mlx_serving.bench import llama_cpp, report
from mlx_serving.bench.compare import comparable, compare, llama_server
from mlx_serving.catalog.ensure import ensure
from mlx_serving.config import DEFAULT_MODEL, Config

PARTS = ("peaks", "quality", "in-process", "http")
STREAMS = (1, 8, 16)
WHAT = ("prefill 512", "decode 1", "decode 8", "decode 16")
AIMS = {"prefill 512": 2.0, "decode 1": 1.0, "decode 8": 1.5, "decode 16": 1.5}
Rates = dict[str, float]


def llama(peer: llama_cpp.LlamaCpp, threads: int, tokens: int) -> Rates:
    program = str(peer.programs / "llama-batched-bench")

    def run(prompt: int, generate: int, streams: str) -> list[dict[str, float]]:
        command = [program, "-m", str(peer.gguf), "-c", "8192", "-b", "2048", "-ub", "512"]
        command += ["-npp", str(prompt), "-ntg", str(generate), "-npl", streams]
        command += ["-t", str(threads), "-tb", str(threads), "--output-format", "jsonl"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    rates = {f"decode {int(row['pl'])}": row["speed_tg"] for row in run(80, tokens, "1,8,16")}
    rates["prefill 512"] = statistics.median(row["speed_pp"] for row in run(512, 1, "1,1,1"))
    return rates


def ours(folder: Path, mode: str, tokens: int) -> Rates:
    script = Path(__file__).with_name("native_cpu.py")
    command = [sys.executable, str(script), str(folder), "--mode", mode, "--json"]
    command += ["--rounds", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rates: Rates = json.loads(done.stdout.splitlines()[-1])
    return rates


def table(mode: str, pairs: list[tuple[Rates, Rates]]) -> str:
    rows = []
    for what in WHAT:
        a, b = [p[0][what] for p in pairs], [p[1][what] for p in pairs]
        ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
        rows.append(
            f"| {what} | {statistics.median(a):.0f} | {statistics.median(b):.0f} "
            f"| {ratio:.2f} | ≥ {AIMS[what]} |"
        )
    title = f"## In-process against llama.cpp, mode `{mode}` (tokens/s, {len(pairs)} rounds)"
    return "\n".join([title, "", "| | ours | llama.cpp | ratio | aim |", "|---|---|---|---|---|", *rows, ""])  # fmt: skip


def peaks(folder: Path, threads: int, rates: Rates | None) -> str:
    """What the machine can do at most, and how much of it the default mode reaches."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "## The machine's peaks\n\nNot measured: no C++ compiler.\n"
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "peaks"
        source = Path(__file__).with_name("peaks.cpp")
        flags = ["-O3", "-march=native", "-std=c++20", "-pthread"]
        subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
        runs = [_json([str(program), str(threads)]) for _ in range(3)]
    best = {key: max(run[key] for run in runs) for key in runs[0]}
    lines = [
        f"## The machine's peaks ({threads} threads, best of three)",
        "",
        f"f32 FMA {best['f32_gflops']:.0f} GFLOP/s, int8 dot products {best['int8_gops']:.0f} GOP/s, "
        f"reading memory {best['dram_gb_s']:.1f} GB/s.",
    ]
    if rates:
        weights = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        # Two int8 planes a weight, a product and a sum each; a 4-bit weight takes 0.625 bytes. A prompt's
        # tokens go through the layers; the vocabulary's head is for the last of them.
        operations = 4 * _layer_bytes(folder) / 0.625
        lines += [
            "",
            f"Of these, mode `exact` reaches {rates['decode 1'] * weights / best['dram_gb_s'] / 1e9:.0%} of "
            f"memory's rate decoding one stream ({weights / 1e6:.0f} MB a token; caches may hold a part), and "
            f"{rates['prefill 512'] * operations / best['int8_gops'] / 1e9:.0%} of the int8 rate in prefill.",
        ]
    return "\n".join([*lines, ""])


def _layer_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            tensors = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in tensors.items():
            if ".layers." in name:
                first, end = tensor["data_offsets"]
                total += end - first
    return total


def _json(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def quality(folder: Path, tokens: int) -> str:
    """Raises CalledProcessError where the default mode is not as good as f32."""
    script = Path(__file__).with_name("quality.py")
    command = [sys.executable, str(script), str(folder), "--tokens", str(tokens)]
    done = subprocess.run([*command, "--require", "exact"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"quality.py failed:\n{done.stdout}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    table = [f"| {r['mode']} | {r['mean_kl']:.1e} | {r['top1']:.2%} |" for r in rows]
    title = f"## Quality in the same run (teacher-forced, {rows[0]['tokens']} tokens)"
    return "\n".join([title, "", "| mode | mean KL | top-1 |", "|---|---|---|", *table, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--modes", nargs="*", default=["exact", "fast"])
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--quality-tokens", type=int, default=4000)
    parser.add_argument("--append", type=Path)
    args = parser.parse_args()
    try:
        peer = llama_cpp.make(args.model, llama_cpp.folder(), os.environ, llama_cpp.run)
    except llama_cpp.Unavailable as error:
        raise SystemExit(f"{error}") from error
    threads = len(os.sched_getaffinity(0))
    stored = ensure(args.model, Config()).path
    folder = comparable(stored)
    sections: list[str] = []
    if "quality" in args.parts:
        sections.append(quality(folder, args.quality_tokens))
    best: Rates | None = None
    if "in-process" in args.parts:
        pairs: dict[str, list[tuple[Rates, Rates]]] = {mode: [] for mode in args.modes}
        for _ in range(args.rounds):
            theirs = llama(peer, threads, args.tokens)
            for mode in args.modes:
                pairs[mode].append((ours(folder, mode, args.tokens), theirs))
        sections += [table(mode, rows) for mode, rows in pairs.items()]
        if "exact" in pairs:
            best = {w: statistics.median(a[w] for a, _ in pairs["exact"]) for w in WHAT}
    if "http" in args.parts:
        rival = llama_server(peer.programs, peer.gguf, max(STREAMS))
        for mode in args.modes:
            load = compare(
                folder,
                streams=STREAMS,
                max_tokens=args.tokens,
                rounds=args.rounds,
                extra=("--kernels", mode),
                rival=rival,
            )
            sections.append(report.comparison(mode, asyncio.run(load), "llama-server"))
    if "peaks" in args.parts:
        sections.append(peaks(stored, threads, best))
    text = "\n".join(sections)
    print(text)
    if args.append:
        with args.append.open("a") as file:
            file.write("\n" + text)


if __name__ == "__main__":
    main()
