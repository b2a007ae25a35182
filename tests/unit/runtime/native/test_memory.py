"""No kernel touches memory outside its operands: guard pages and sanitizers."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[4] / "src/mlx_serving/runtime/native/csrc"
ISAS = {
    "generic": [],
    "avx2": ["-DMS_ISA_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avxvnni": ["-DMS_ISA_AVX2", "-DMS_ISA_AVXVNNI", "-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
    "avx512": [
        "-DMS_ISA_AVX512",
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
        *("-mfma", "-mf16c"),
    ],
}


def build_and_run(folder: Path, flags: list[str]) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if platform.system() != "Linux":
        pytest.skip("the kernels are built on Linux only")
    x86 = platform.machine() == "x86_64"
    common = [compiler, "-std=c++20", "-ffp-contract=off", "-w", "-Wno-psabi", "-c", *flags]
    jobs = []
    for name, isa in ISAS.items():
        if name == "generic" or x86:
            define = [f"-DMS_NS=ms_{name}", f'-DMS_NAME="{name}"', *isa]
            output = folder / f"isa_{name}.o"
            jobs.append([*common, *define, str(SOURCES / "kernels_isa.cpp"), "-o", str(output)])
    for name in ("check", "dispatch", "ops", "pool"):
        define = ["-DMS_X86"] if x86 else []
        output = folder / f"{name}.o"
        jobs.append([*common, *define, str(SOURCES / f"{name}.cpp"), "-o", str(output)])
    for job in jobs:
        subprocess.run(job, check=True, timeout=600)
    binary = folder / "check"
    objects = [str(o) for o in sorted(folder.glob("*.o"))]
    subprocess.run([compiler, *flags, "-pthread", *objects, "-o", str(binary)], check=True)
    return subprocess.run([str(binary)], capture_output=True, text=True, timeout=600)


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
