"""`python -m mlx_serving.bench [overhead] [compare] [prefix] …`: measure and write a report."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from mlx_serving.bench import (
    compare,
    gaps,
    llama_cpp,
    overhead,
    prefix,
    priority,
    report,
    schema,
    switch,
    ttft,
)
from mlx_serving.catalog.ensure import ensure
from mlx_serving.config import DEFAULT_MODEL, Config

SLOW_REPLAY = 3, 2
"""Chats and turns beside `mlx_lm.server`, which would take hours for the other."""
PARTS = (
    "overhead",
    "depth",
    "schema",
    "jump",
    "bare",
    "compare",
    "prefix",
    "gaps",
    "priority",
    "switch",
    "ttft",
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mlx_serving.bench", description=__doc__)
    parser.add_argument("parts", nargs="*", default=[], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--kernels", nargs="*", default=["auto"], help="of `bare` and `compare`")
    parser.add_argument("--max-itl-ms", type=float, nargs="*", default=[60.0, 120.0, 250.0])
    parser.add_argument("--prompt-tokens", type=int, default=6000, help="of the part `gaps`")
    parser.add_argument("--seconds", type=float, default=30.0, help="each load of `priority`")
    parser.add_argument(
        "--priority-flags", nargs="*", default=[""], help="the server's, one text a server"
    )
    parser.add_argument("--chats", type=int, default=20, help="of the replay")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--write", type=Path, help="also write the report to this file")
    args = parser.parse_args(argv)
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    asyncio.run(_tell(args))


async def _tell(args: argparse.Namespace) -> None:
    """Each section as soon as it is there: a run takes long."""
    told: list[str] = []
    async for section in _run(args, args.parts or PARTS):
        told.append(section)
        print(section, flush=True)
        if args.write:
            args.write.write_text("\n".join(told))


async def _run(args: argparse.Namespace, parts: list[str] | tuple[str, ...]) -> AsyncIterator[str]:
    stored = (await asyncio.to_thread(ensure, args.model, Config(), None)).path
    yield report.machine(args.model)
    if "overhead" in parts:
        print("measuring the gateway's overhead …", file=sys.stderr, flush=True)
        yield report.overhead(await overhead.measure(stored))
    # Both servers get the weights in the float type that stock MLX is fastest with here.
    folder = await asyncio.to_thread(compare.comparable, stored)
    if "depth" in parts:
        print("pipeline depths …", file=sys.stderr, flush=True)
        yield report.depths(await compare.depths(folder, rounds=args.rounds))
    if "schema" in parts:
        print("the cost of a schema …", file=sys.stderr, flush=True)
        cost = await schema.measure(folder, max_tokens=2 * args.max_tokens, rounds=3 * args.rounds)
        yield report.schema(cost)
    if "jump" in parts:
        print("forced tokens, one by one and several at once …", file=sys.stderr, flush=True)
        rounds = 3 * args.rounds
        yield report.jumps([await schema.jumps(stored, n, rounds) for n in (1, 8)])
    for kernels in args.kernels:
        extra = ("--kernels", kernels)
        if "bare" in parts:
            print(f"one stream against stream_generate, kernels {kernels} …", file=sys.stderr)
            figures = await compare.against_bare(
                folder, max_tokens=2 * args.max_tokens, rounds=args.rounds, extra=extra
            )
            yield report.bare(kernels, figures)
        if "compare" in parts:
            print(f"load against mlx_lm.server, kernels {kernels} …", file=sys.stderr)
            rows = await compare.compare(
                folder,
                streams=args.streams,
                max_tokens=args.max_tokens,
                rounds=args.rounds,
                extra=extra,
            )
            yield report.comparison(kernels, rows)
    if "prefix" in parts:
        print("shared prefixes and conversations …", file=sys.stderr, flush=True)
        for section in await _prefix(args, folder, stored):
            yield section
    if "ttft" in parts:
        print("stages of the way to a first token …", file=sys.stderr, flush=True)
        yield report.pipeline(await ttft.measure(stored, args.rounds))
    if "gaps" in parts:
        print("a long prompt beside running streams …", file=sys.stderr, flush=True)
        found = await gaps.measure(stored, (0.0, *args.max_itl_ms), args.prompt_tokens, args.rounds)
        yield report.gaps(found, args.prompt_tokens)
    if "switch" in parts:
        print("switching between models …", file=sys.stderr, flush=True)
        yield report.switch(await switch.measure(stored, rounds=3 * args.rounds))
    if "priority" in parts:
        print("critical requests under overload …", file=sys.stderr, flush=True)
        ways = [way.split() for way in args.priority_flags]
        measured = [
            await priority.measure(stored, rounds=args.rounds, seconds=args.seconds, flags=way)
            for way in ways
        ]
        yield report.priorities(measured)


async def _prefix(args: argparse.Namespace, folder: Path, stored: Path) -> list[str]:
    """With the kernels that a user gets; a rival that is not here is left out."""
    timed = await prefix.reuse(stored, rounds=args.rounds)
    replays = []
    if found := llama_cpp.find(args.model, llama_cpp.folder(), os.environ):
        rival = compare.llama_server(found.programs, found.gguf, prefix.IN_FLIGHT, 2048)
        replays.append(await prefix.replay(folder, rival, chats=args.chats, turns=args.turns))
    chats, turns = SLOW_REPLAY
    rival = compare.mlx_lm_server(folder)
    replays.append(await prefix.replay(folder, rival, chats=chats, turns=turns))
    return [report.reuse(timed), report.replays(replays)]


main()
