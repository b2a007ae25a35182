"""Our kernels in-process beside llama.cpp's `llama-batched-bench`, on the same GGUF, run by run.

    python benchmarks/llamacpp.py --bin DIR --gguf FILE [--modes exact fast] [--append REPORT]

DIR holds llama.cpp's programs, built with `cmake -DGGML_NATIVE=ON` (or set LLAMA_CPP_BIN). Each
round runs llama.cpp, then ours in each mode, each in a process of its own; ratios are taken pair by
pair. Decoding starts behind 80 tokens on both sides; tokens per second are over whole runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from mlx_serving.bench.compare import comparable
from mlx_serving.catalog.ensure import ensure
from mlx_serving.config import Config

WHAT = ("prefill 512", "decode 1", "decode 8", "decode 16")
AIMS = {"prefill 512": 2.0, "decode 1": 1.0, "decode 8": 1.5, "decode 16": 1.5}
Rates = dict[str, float]


def llama(binary: Path, gguf: Path, threads: int, tokens: int) -> Rates:
    def run(prompt: int, generate: int, streams: str) -> list[dict[str, float]]:
        command = [str(binary), "-m", str(gguf), "-c", "8192", "-b", "2048", "-ub", "512"]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bin", type=Path, default=os.environ.get("LLAMA_CPP_BIN"))
    parser.add_argument("--gguf", type=Path, default=os.environ.get("LLAMA_CPP_GGUF"))
    parser.add_argument("--model", default="smollm2-135m", help="the same weights, for ours")
    parser.add_argument("--modes", nargs="*", default=["exact", "fast"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--append", type=Path)
    args = parser.parse_args()
    if not args.bin or not args.gguf:
        print("llama.cpp: skipped; set LLAMA_CPP_BIN and LLAMA_CPP_GGUF to compare with it")
        return
    threads = len(os.sched_getaffinity(0))
    folder = comparable(ensure(args.model, Config()).path)
    pairs: dict[str, list[tuple[Rates, Rates]]] = {mode: [] for mode in args.modes}
    for _ in range(args.rounds):
        theirs = llama(Path(args.bin) / "llama-batched-bench", args.gguf, threads, args.tokens)
        for mode in args.modes:
            pairs[mode].append((ours(folder, mode, args.tokens), theirs))
    text = "\n".join(table(mode, rows) for mode, rows in pairs.items())
    print(text)
    if args.append:
        with args.append.open("a") as file:
            file.write("\n" + text)


if __name__ == "__main__":
    main()
