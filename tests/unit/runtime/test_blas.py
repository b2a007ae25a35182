"""A process without the native module: which BLAS MLX then calls, and what `doctor` says of it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import mlx_serving

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="OpenBLAS is an extra for Linux on x86-64",
)

PRODUCT = """
from mlx_serving.runtime import doctor
print(doctor.probe(0.01).native_detail)
import mlx.core as mx
a = mx.arange(64 * 64, dtype=mx.float32).reshape(64, 64) / 4096
mx.set_default_device(mx.cpu)
print(mx.max(mx.abs((a @ a) - mx.sum(a[:, :, None] * a[None], axis=1))).item() < 1e-4)
"""


@pytest.fixture(scope="module")
def without_native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package as an installation without a compiler leaves it."""
    folder = tmp_path_factory.mktemp("package")
    source = Path(mlx_serving.__file__).parent
    ignore = shutil.ignore_patterns("_native*.so", "csrc", "__pycache__")
    shutil.copytree(source, folder / "mlx_serving", ignore=ignore)
    return folder


def _gfortran(folder: Path) -> str:
    """A path on which OpenBLAS finds libgfortran.so.5: MLX's CPU wheel has one by another name."""
    spec = importlib.util.find_spec("mlx")
    assert spec is not None and spec.submodule_search_locations
    libraries = Path(next(iter(spec.submodule_search_locations))).parent / "mlx_cpu.libs"
    for file in libraries.glob("libgfortran-*"):
        (folder / "libgfortran.so.5").symlink_to(file)
    return f"{folder}:{libraries}"


def _run(package: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        # Without .pth files, through which an editable installation would come first.
        [sys.executable, "-S", "-c", PRODUCT],
        env={**os.environ, "PYTHONPATH": f"{package}:{sysconfig.get_path('purelib')}", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def test_mlx_calls_openblas(without_native: Path, tmp_path: Path) -> None:
    done = _run(without_native, LD_LIBRARY_PATH=_gfortran(tmp_path), LD_DEBUG="bindings")
    detail, right = done.stdout.splitlines()[-2:]
    assert detail.startswith("not built") and "products by OpenBLAS 0." in detail
    assert right == "True"
    bound = [line for line in done.stderr.splitlines() if "`cblas_sgemm'" in line]
    assert any("libmlx.so" in line and "libopenblas.so.0" in line for line in bound), bound


def test_a_library_that_cannot_be_loaded_is_said(without_native: Path, tmp_path: Path) -> None:
    (tmp_path / "libgfortran.so.5").write_bytes(b"not a library")
    detail, right = _run(without_native, LD_LIBRARY_PATH=str(tmp_path)).stdout.splitlines()[-2:]
    assert "OpenBLAS cannot be loaded" in detail and "libgfortran" in detail
    assert right == "True"


def test_native_kernels_need_no_openblas() -> None:
    from mlx_serving.runtime import blas, native

    if native.available():
        assert blas.preload() == "OpenBLAS is not needed beside native kernels"
    else:
        assert "OpenBLAS" in blas.preload()
