"""No kernel touches memory outside its operands: guard pages and sanitizers."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[4] / "src/mlx_serving/runtime/native/csrc"
AVX512 = [
    "-DMS_ISA_AVX512",
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"),
]
TILES = ["-mamx-tile", "-mamx-int8"]
ARM_ISAS: dict[str, list[str]] = {"generic": [], "neondot": ["-march=armv8.2-a+dotprod"]}
ISAS: dict[str, list[str]] = {
    "generic": [],
    "avx2": ["-DMS_ISA_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avxvnni": ["-DMS_ISA_AVX2", "-DMS_ISA_AVXVNNI", "-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
    "avx512": AVX512,
    "amx": [*AVX512, *TILES],
}
SHARED = ("check", "dispatch", "ops", "pool")
X86_ONLY = ("amx", "amx_emulator", "check_amx")


def build_and_run(folder: Path, flags: list[str]) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if platform.system() != "Linux":
        pytest.skip("the kernels are built on Linux only")
    arm = platform.machine() == "aarch64"
    binary = build(folder, compiler, flags, ARM_ISAS if arm else ISAS)
    return subprocess.run([str(binary)], capture_output=True, text=True, timeout=600)


def build(folder: Path, compiler: str, flags: list[str], isas: dict[str, list[str]]) -> Path:
    common = [compiler, "-std=c++20", "-ffp-contract=off", "-w", "-Wno-psabi", "-c", *flags]
    jobs = []
    for name, isa in isas.items():
        define = [f"-DMS_NS=ms_{name}", f'-DMS_NAME="{name}"', *isa]
        source = SOURCES / ("kernels_amx.cpp" if name == "amx" else "kernels_isa.cpp")
        jobs.append([*common, *define, str(source), "-o", str(folder / f"isa_{name}.o")])
    arm = "neondot" in isas
    for name in SHARED if arm else SHARED + X86_ONLY:
        define = ["-DMS_ARM"] if arm else ["-DMS_X86", *(TILES if name == "check_amx" else [])]
        source, output = SOURCES / f"{name}.cpp", folder / f"{name}.o"
        jobs.append([*common, *define, str(source), "-o", str(output)])
    for job in jobs:
        subprocess.run(job, check=True, timeout=600)
    binary = folder / "check"
    objects = [str(o) for o in sorted(folder.glob("*.o"))]
    subprocess.run([compiler, *flags, "-pthread", *objects, "-o", str(binary)], check=True)
    return binary


@pytest.mark.slow
def test_guard_pages(tmp_path: Path) -> None:
    done = build_and_run(tmp_path, ["-O1"])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_sanitizers(tmp_path: Path) -> None:
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    done = build_and_run(tmp_path, flags)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_threads_under_the_sanitizer(tmp_path: Path) -> None:
    done = build_and_run(tmp_path, ["-O1", "-g", "-fsanitize=thread"])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_arm_under_emulation(tmp_path: Path) -> None:
    """NEON, without and with dot products, between guard pages; needs a cross compiler and qemu-user."""
    names = ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++-12", "aarch64-linux-gnu-g++-14")
    compiler = next((name for name in names if shutil.which(name)), None)
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("no compiler for arm64, or no qemu-aarch64")
    binary = build(tmp_path, compiler, ["-O1", "-static"], ARM_ISAS)
    run = [emulator, "-cpu", "max", str(binary)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neondot,generic" in done.stdout
