"""`mlx-serving doctor`: facts and measurements, judged and printed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable

import msgspec

from mlx_serving.cli.exits import Exit
from mlx_serving.host import Finding, Host, Probe, able, judge_host, judge_probe, look

PROBE_TIMEOUT_S = 120.0
_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `doctor --json` prints."""

    able: bool
    findings: list[Finding]
    host: Host
    probe: Probe | None
    """None where the host's own facts rule MLX out, and nothing was measured."""


def run(json: bool = False, probe: Callable[[], Probe] | None = None) -> int:
    report = examine(look(), probe or measure)
    if json:
        print(msgspec.json.encode(report).decode())
    else:
        for finding in report.findings:
            print(f"{_MARKS[finding.level]}  {finding.message}  [{finding.code}]")
            if finding.remedy:
                print(f"      {finding.remedy}")
        print("This machine can serve." if report.able else "This machine cannot serve.")
    return Exit.OK if report.able else Exit.CANNOT_WORK


def examine(host: Host, probe: Callable[[], Probe]) -> Report:
    """Judge the host, and measure only one that can run MLX at all."""
    findings = judge_host(host)
    if not able(findings):
        return Report(able=False, findings=findings, host=host, probe=None)
    measured = probe()
    findings = findings + judge_probe(measured)
    return Report(able=able(findings), findings=findings, host=host, probe=measured)


def measure() -> Probe:
    """Run the job that imports MLX. A job that dies is a finding, not an error of ours."""
    command = [sys.executable, "-m", "mlx_serving.runtime.doctor", "--json"]
    try:
        job = subprocess.run(command, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Probe(error=f"no answer within {PROBE_TIMEOUT_S:.0f} s")
    if job.returncode == 0:
        return msgspec.json.decode(job.stdout, type=Probe)
    last = job.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return Probe(error=": ".join([_ending(job.returncode), *last]))


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"killed by {signal.Signals(-code).name}"
