"""The doctor examines, reports and ends with a code that scripts can tell apart."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from mlx_serving.cli import doctor, serve
from mlx_serving.cli.exits import Exit
from mlx_serving.cli.flags import ServeArgs
from mlx_serving.host import Host, Probe

OLD_MAC = Host(python=(3, 11, 0), system="Darwin", machine="arm64", macos=(13, 0))
GOOD_MAC = Host(python=(3, 11, 0), system="Darwin", machine="arm64", macos=(15, 0))


def never() -> Probe:
    raise AssertionError("a host that cannot run MLX must not be measured")


def test_a_host_that_cannot_work_is_not_measured() -> None:
    report = doctor.examine(OLD_MAC, never)
    assert (report.able, report.probe) == (False, None)


@pytest.mark.parametrize("error", [None, "killed by SIGILL"])
def test_a_measured_host(error: str | None) -> None:
    report = doctor.examine(GOOD_MAC, lambda: Probe(error=error, backend="metal"))
    assert report.able == (error is None)
    assert report.probe is not None


def test_serve_refuses_on_such_a_host_with_a_reason_for_programs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert serve.run(ServeArgs(json=True), machine=OLD_MAC) == Exit.CANNOT_WORK
    reason: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert reason["code"] == "macos_too_old"
    assert reason["remedy"]


@pytest.mark.parametrize(
    ("code", "text"), [(0, "exit code 0"), (1, "exit code 1"), (-4, "killed by SIGILL")]
)
def test_how_a_job_ended(code: int, text: str) -> None:
    assert doctor._ending(code) == text


def test_the_report_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Probe:
        return Probe(error="libmlx.so: cannot open shared object file")

    assert doctor.run(probe=broken) == Exit.CANNOT_WORK
    text = capsys.readouterr().out
    assert "FAIL  MLX cannot be used: libmlx.so" in text
    assert "[mlx_unusable]" in text and "pip install" in text
    assert text.endswith("This machine cannot serve.\n")
    assert doctor.run(json=True, probe=broken) == Exit.CANNOT_WORK
    report = json.loads(capsys.readouterr().out)
    assert report["able"] is False
    assert {"code", "level", "message"} <= set(report["findings"][0])


def test_the_job_measures_this_machine() -> None:
    command = [sys.executable, "-m", "mlx_serving.runtime.doctor", "--json", "--budget-s", "0.01"]
    job = subprocess.run(command, capture_output=True, text=True, check=True)
    probe: dict[str, Any] = json.loads(job.stdout)
    assert probe["error"] is None
    assert probe["mlx_version"]
    assert probe["f32_gflops"] > 0
    assert probe["q4_gbytes_per_s"] > 0
