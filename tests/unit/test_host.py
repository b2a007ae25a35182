"""Verdicts on hosts that we do not have, and reading the one that we do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_serving import host
from mlx_serving.host import Host, Probe, able, judge_host, judge_probe

GIB = 1024**3
LINUX: dict[str, Any] = {
    "python": (3, 12, 1),
    "system": "Linux",
    "machine": "x86_64",
    "glibc": (2, 36),
    "avx2": True,
    "memory_bytes": 16 * GIB,
    "cpus": 8,
}
MAC: dict[str, Any] = {
    "python": (3, 12, 1),
    "system": "Darwin",
    "machine": "arm64",
    "macos": (15, 1),
    "memory_bytes": 16 * GIB,
    "cpus": 8,
}


@pytest.mark.parametrize(
    ("base", "change", "code", "level"),
    [
        (LINUX, {}, None, None),
        (MAC, {}, None, None),
        (LINUX, {"machine": "aarch64", "avx2": None}, None, None),
        (MAC, {"macos": (14, 0)}, None, None),
        (MAC, {"macos": (26, 0)}, None, None),
        (MAC, {"macos": None}, None, None),
        (LINUX, {"python": (3, 11, 0)}, None, None),
        (LINUX, {"glibc": (2, 35)}, None, None),
        (LINUX, {"python": (3, 10, 13)}, "python_too_old", "fail"),
        (LINUX, {"python": (3, 14, 0)}, "python_untested", "warn"),
        (LINUX, {"avx2": False}, "no_avx2", "fail"),
        (LINUX, {"avx2": None}, "avx2_unknown", "warn"),
        (LINUX, {"glibc": (2, 34)}, "glibc_too_old", "fail"),
        (LINUX, {"glibc": None}, "glibc_too_old", "fail"),
        (LINUX, {"machine": "riscv64"}, "platform_unsupported", "fail"),
        (LINUX, {"system": "Windows", "machine": "AMD64"}, "platform_unsupported", "fail"),
        (LINUX, {"memory_bytes": GIB}, "memory_low", "warn"),
        (LINUX, {"memory_limit_bytes": GIB}, "memory_low", "warn"),
        (LINUX, {"memory_limit_bytes": 64 * GIB}, None, None),
        (MAC, {"macos": (13, 6, 7)}, "macos_too_old", "fail"),
        (MAC, {"machine": "x86_64"}, "macos_not_arm64", "fail"),
    ],
)
def test_hosts(
    base: dict[str, Any], change: dict[str, Any], code: str | None, level: str | None
) -> None:
    findings = judge_host(Host(**{**base, **change}))
    remarkable = [(f.code, f.level) for f in findings if f.level != "ok"]
    assert remarkable == ([] if code is None else [(code, level)])
    assert able(findings) == (level != "fail")


def test_a_failure_says_what_is_needed() -> None:
    old = judge_host(Host(**{**MAC, "macos": (13, 6), "python": (3, 9, 18)}))
    assert [f.message for f in old if f.level == "fail"] == [
        "Python 3.9.18: 3.11 or newer is needed",
        "macOS 13.6: MLX needs 14.0 or newer",
    ]


CPU = Probe(
    mlx_version="0.32.4",
    mlx_lm_version="0.32.2",
    device="AMD EPYC",
    compiler="/usr/bin/g++",
    native=True,
    native_detail="avx512",
    f32_gflops=100.0,
    q4_gbytes_per_s=10.0,
)


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({}, {}),
        ({"compiler": None}, {"no_compiler": "warn"}),
        ({"native": False, "native_detail": "not built"}, {"native_unavailable": "warn"}),
        ({"backend": "metal", "compiler": None, "native": False}, {}),
        ({"backend": "cuda", "compiler": None, "native": False}, {}),
        ({"error": "No module named 'mlx'"}, {"mlx_unusable": "fail"}),
    ],
)
def test_probes(change: dict[str, Any], codes: dict[str, str]) -> None:
    import msgspec

    findings = judge_probe(msgspec.structs.replace(CPU, **change))
    assert {f.code: f.level for f in findings if f.level != "ok"} == codes


def test_this_machine_can_be_looked_at() -> None:
    here = host.look()
    assert here.memory_bytes > GIB // 2
    assert here.cpus > 0
    assert here.system in ("Linux", "Darwin")
    assert not [f for f in judge_host(here) if f.code == "python_too_old"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx avx2 fma\n", True),
        ("processor : 0\nflags\t\t: fpu avx fma avx2\n", True),
        ("processor : 0\nflags\t\t: fpu avx avx512f\n", False),
        ("processor : 0\n", None),
    ],
)
def test_avx2_is_read_from_cpuinfo(tmp_path: Path, content: str, expected: bool | None) -> None:
    (tmp_path / "cpuinfo").write_text(content)
    assert host._has_avx2(tmp_path / "cpuinfo") is expected
    assert host._has_avx2(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("text", "version"), [("14.2.1", (14, 2, 1)), ("2.36", (2, 36)), ("", None), ("15b", None)]
)
def test_versions(text: str, version: tuple[int, ...] | None) -> None:
    assert host.parse_version(text) == version


def _tree(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")


@pytest.mark.parametrize(
    ("membership", "files", "limits"),
    [
        # v2: the tightest of the group and those above it; one of them is unlimited.
        (
            "0::/system.slice/x.service",
            {
                "memory.max": "max",
                "system.slice/memory.max": "4000",
                "system.slice/cpu.max": "max 100000",
                "system.slice/x.service/memory.max": "8000",
                "system.slice/x.service/cpu.max": "150000 100000",
            },
            (4000, 1.5),
        ),
        # v2 in a container: the group's own folder is the root.
        ("0::/", {"memory.max": "1000", "cpu.max": "200000 100000"}, (1000, 2.0)),
        # v1: a hierarchy a controller, and "unlimited" as a huge number.
        (
            "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/x",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/docker/abc/memory.limit_in_bytes": "5000",
                "cpu/docker/abc/cpu.cfs_quota_us": "50000",
                "cpu/docker/abc/cpu.cfs_period_us": "100000",
            },
            (5000, 0.5),
        ),
        (
            "4:memory:/\n3:cpu:/",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
            },
            (None, None),
        ),
        # v1 in a container whose path outside is not visible inside.
        ("4:memory:/docker/abc", {"memory/memory.limit_in_bytes": "7000"}, (7000, None)),
    ],
)
def test_cgroup_limits(
    tmp_path: Path,
    membership: str,
    files: dict[str, str],
    limits: tuple[int | None, float | None],
) -> None:
    (tmp_path / "cgroup").write_text(membership + "\n")
    _tree(tmp_path / "fs", files)
    assert host.cgroup_limits(tmp_path / "cgroup", tmp_path / "fs") == limits


def test_no_cgroups(tmp_path: Path) -> None:
    assert host.cgroup_limits(tmp_path / "none", tmp_path) == (None, None)
