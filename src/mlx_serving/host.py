"""Can this machine do the work? Facts are gathered, then judged by pure functions.

`Host` costs a millisecond and is looked at before every `serve`; `Probe` is what a job that
imported MLX measured (runtime/doctor.py). Each `Finding` has a stable `code`; one whose level is
`fail` means that this host cannot serve.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Literal

import msgspec

MIN_PYTHON = (3, 11)
TESTED_PYTHON = (3, 13)
MIN_MACOS = (14, 0)
MIN_GLIBC = (2, 35)
"""The oldest that MLX's Linux wheels load with."""
LOW_MEMORY_BYTES = 2 * 1024**3
CPU_SHARE = 0.6
"""Of the machine's (or the cgroup's) memory that models may take; the gateway and others share it."""
GPU_SHARE = 0.85
"""Of a GPU's working set: the rest is for activations and the allocator's cache."""

Version = tuple[int, ...]


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What can be known without importing MLX."""

    python: Version
    system: str
    """`Linux` or `Darwin`, as `platform.system()` says."""
    machine: str
    macos: Version | None = None
    glibc: Version | None = None
    """None on macOS, and on Linux where the C library is another (musl)."""
    avx2: bool | None = None
    """None: not an x86-64 CPU, or its flags cannot be read."""
    memory_bytes: int = 0
    memory_limit_bytes: int | None = None
    """The tightest cgroup limit above this process; None: no limit."""
    cpus: float = 1.0
    """Cores that this process may use: affinity and cgroup quota."""


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """What a process that imported MLX found. `error` set: nothing else is known."""

    error: str | None = None
    mlx_version: str = ""
    mlx_lm_version: str = ""
    backend: Literal["cpu", "metal", "cuda"] = "cpu"
    device: str = ""
    device_memory_bytes: int = 0
    compiler: str | None = None
    """Path of g++, which MLX's CPU backend runs to fuse kernels."""
    native: bool = False
    native_detail: str = ""
    """What the native kernels use, or why there are none."""
    f32_gflops: float = 0.0
    """Measured float32 matrix product, 1024³."""
    q4_gbytes_per_s: float = 0.0
    """Measured rate at which 4-bit weights pass through a matrix-vector product."""


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    code: str
    level: Literal["ok", "warn", "fail"]
    message: str
    remedy: str | None = None


def able(findings: list[Finding]) -> bool:
    return all(finding.level != "fail" for finding in findings)


def usable_memory_bytes(host: Host) -> int:
    return min(host.memory_bytes, host.memory_limit_bytes or host.memory_bytes)


def memory_budget_bytes(given: float | None, host: Host, device_bytes: int | None = None) -> int:
    """What models may take of this machine, or of its GPU (`device_bytes`, where MLX names them).

    `given` is in bytes above 1, and up to 1 a share of what there is.
    """
    base = usable_memory_bytes(host) if device_bytes is None else device_bytes
    if given is None:
        return int(base * (CPU_SHARE if device_bytes is None else GPU_SHARE))
    return int(base * given) if given <= 1 else int(given)


# ------------------------------------------------------------------- judging


def judge_host(host: Host) -> list[Finding]:
    """The cheap half: interpreter, platform, CPU, memory."""
    return [_python(host), *_platform(host), _memory(host)]


def judge_probe(probe: Probe) -> list[Finding]:
    """The measured half; meaningful only where `judge_host` found nothing fatal."""
    if probe.error is not None:
        return [
            Finding(
                code="mlx_unusable",
                level="fail",
                message=f"MLX cannot be used: {probe.error}",
                remedy="install an MLX backend: pip install 'mlx-serving[cpu]' (Linux), "
                "'mlx-serving[cuda13]' (NVIDIA), 'mlx-serving' (macOS)",
            )
        ]
    memory = f", {_gib(probe.device_memory_bytes)}" if probe.device_memory_bytes else ""
    findings = [
        _ok("mlx", f"MLX {probe.mlx_version}, mlx-lm {probe.mlx_lm_version}"),
        _ok("device", f"{probe.backend}: {probe.device or 'unnamed'}{memory}"),
    ]
    if probe.backend == "cpu":
        findings += [_compiler(probe), _native(probe)]
    findings.append(
        _ok(
            "speed",
            f"float32 matmul {probe.f32_gflops:.0f} GFLOP/s, "
            f"4-bit matrix-vector {probe.q4_gbytes_per_s:.1f} GB/s of weights",
        )
    )
    return findings


def _python(host: Host) -> Finding:
    version = _dotted(host.python)
    if host.python[:2] < MIN_PYTHON:
        return Finding(
            code="python_too_old",
            level="fail",
            message=f"Python {version}: {_dotted(MIN_PYTHON)} or newer is needed",
            remedy=f"make serve PYTHON=python{_dotted(MIN_PYTHON)}",
        )
    if host.python[:2] > TESTED_PYTHON:
        newest = _dotted(TESTED_PYTHON)
        return Finding(
            code="python_untested",
            level="warn",
            message=f"Python {version} is newer than the newest tested, {newest}",
        )
    return _ok("python", f"Python {version}")


def _platform(host: Host) -> list[Finding]:
    match host.system, host.machine:
        case "Darwin", "arm64":
            return [_macos(host)]
        case "Darwin", machine:
            return [
                Finding(
                    code="macos_not_arm64",
                    level="fail",
                    message=f"this Python runs as {machine}: MLX needs Apple silicon and a native "
                    "arm64 Python",
                    remedy="install an arm64 Python; one under Rosetta does not do",
                )
            ]
        case "Linux", "x86_64":
            return [_glibc(host), _avx2(host)]
        case "Linux", "aarch64" | "arm64":
            return [_glibc(host)]
        case system, machine:
            return [
                Finding(
                    code="platform_unsupported",
                    level="fail",
                    message=f"{system} on {machine}: MLX runs on macOS (arm64) and Linux "
                    "(x86-64, arm64)",
                )
            ]


def _macos(host: Host) -> Finding:
    if host.macos is not None and host.macos < MIN_MACOS:
        return Finding(
            code="macos_too_old",
            level="fail",
            message=f"macOS {_dotted(host.macos)}: MLX needs {_dotted(MIN_MACOS)} or newer",
            remedy="update macOS",
        )
    return _ok("platform", f"macOS {_dotted(host.macos or ())} on arm64")


def _glibc(host: Host) -> Finding:
    if host.glibc is None or host.glibc < MIN_GLIBC:
        have = f"glibc {_dotted(host.glibc)}" if host.glibc else "not glibc"
        return Finding(
            code="glibc_too_old",
            level="fail",
            message=f"C library is {have}: MLX's wheels need glibc {_dotted(MIN_GLIBC)} or newer",
            remedy="use a newer distribution or container image (Debian 12, Ubuntu 22.04)",
        )
    return _ok("platform", f"Linux on {host.machine}, glibc {_dotted(host.glibc)}")


def _avx2(host: Host) -> Finding:
    match host.avx2:
        case True:
            return _ok("avx2", "the CPU has AVX2")
        case False:
            return Finding(
                code="no_avx2",
                level="fail",
                message="the CPU has no AVX2, which MLX's CPU backend is compiled for",
                remedy="use a CPU from 2013 or later; in a virtual machine, pass the host's CPU "
                "flags through",
            )
        case None:
            return Finding(
                code="avx2_unknown",
                level="warn",
                message="the CPU's flags cannot be read; AVX2 is needed",
            )


def _memory(host: Host) -> Finding:
    usable = usable_memory_bytes(host)
    limit = f", limited to {_gib(usable)} by its cgroup" if usable < host.memory_bytes else ""
    message = f"{_gib(host.memory_bytes)} of memory{limit}; {host.cpus:g} CPU core(s)"
    if usable < LOW_MEMORY_BYTES:
        return Finding(
            code="memory_low",
            level="warn",
            message=message,
            remedy=f"models beyond the smallest need more than {_gib(LOW_MEMORY_BYTES)}",
        )
    return _ok("memory", message)


def _compiler(probe: Probe) -> Finding:
    if probe.compiler is None:
        return Finding(
            code="no_compiler",
            level="warn",
            message="no g++: MLX's CPU backend cannot fuse kernels at run time and is slower",
            remedy="install g++ (Debian, Ubuntu: apt install g++)",
        )
    return _ok("compiler", probe.compiler)


def _native(probe: Probe) -> Finding:
    if not probe.native:
        return Finding(
            code="native_unavailable",
            level="warn",
            message=f"no native CPU kernels: {probe.native_detail}; MLX's own are used",
        )
    return _ok("native", f"native CPU kernels: {probe.native_detail}")


def _ok(code: str, message: str) -> Finding:
    return Finding(code=code, level="ok", message=message)


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def _gib(size: int) -> str:
    return f"{size / 1024**3:.1f} GiB"


# ------------------------------------------------------------------- gathering


def look() -> Host:
    """This machine's facts; under a millisecond, no subprocess."""
    system = platform.system()
    memory, cpus = _cgroup_limits() if system == "Linux" else (None, None)
    affinity = len(os.sched_getaffinity(0)) if system == "Linux" else os.cpu_count() or 1
    return Host(
        python=tuple(sys.version_info[:3]),
        system=system,
        machine=platform.machine(),
        macos=parse_version(platform.mac_ver()[0]) if system == "Darwin" else None,
        glibc=_glibc_version() if system == "Linux" else None,
        avx2=_has_avx2(Path("/proc/cpuinfo")) if platform.machine() == "x86_64" else None,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        memory_limit_bytes=memory,
        cpus=min(affinity, cpus or affinity),
    )


def rss_bytes() -> int:
    """This process's resident set; where the system does not say, the largest that it was."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """The largest that this process's resident set was."""
    import resource

    unit = 1024 if sys.platform == "linux" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def parse_version(text: str) -> Version | None:
    parts = text.split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else None


def _glibc_version() -> Version | None:
    try:
        text = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return None
    name, _, version = text.partition(" ")
    return parse_version(version) if name == "glibc" else None


def _has_avx2(cpuinfo: Path) -> bool | None:
    try:
        with cpuinfo.open() as lines:
            flags = next((line for line in lines if line.startswith("flags")), None)
    except OSError:
        return None
    return None if flags is None else " avx2 " in flags.replace("\n", " ")


def _cgroup_limits() -> tuple[int | None, float | None]:
    return cgroup_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))


def cgroup_limits(membership: Path, root: Path) -> tuple[int | None, float | None]:
    """The tightest memory limit (bytes) and CPU quota (cores) on the way up to the root; v1 and v2.

    Args:
        membership: /proc/self/cgroup, or a file like it.
        root: where cgroups are mounted.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None, None
    memory: list[int] = []
    cpus: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            for folder in _ancestors(root / name, path):
                memory += _memory_limit(folder)
                cpus += _cpu_quota(folder)
    return min(memory, default=None), min(cpus, default=None)


def _ancestors(mount: Path, path: str) -> list[Path]:
    """From the mount down to the group; in a container the lower ones may not be visible."""
    parts = [part for part in path.split("/") if part]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]


def _memory_limit(folder: Path) -> list[int]:
    texts = _read(folder / "memory.max") + _read(folder / "memory.limit_in_bytes")
    # v1 writes "no limit" as the largest page-aligned number.
    return [int(text) for text in texts if text.isdigit() and int(text) < 1 << 62]


def _cpu_quota(folder: Path) -> list[float]:
    for text in _read(folder / "cpu.max"):
        quota, period = text.split()
        return [] if quota == "max" else [int(quota) / int(period)]
    for quota, period in zip(
        _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"), strict=False
    ):
        return [int(quota) / int(period)] if int(quota) > 0 else []
    return []


def _read(file: Path) -> list[str]:
    try:
        return [file.read_text().strip()]
    except OSError:
        return []
