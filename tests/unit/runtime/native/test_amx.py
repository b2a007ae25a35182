"""AMX's tiles in the module as it is built; where the CPU has none, their instructions are emulated."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_serving.runtime import native
from mlx_serving.runtime.native import _load, ops

SOURCES = Path(__file__).parents[4] / "src/mlx_serving/runtime/native/csrc"


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels named `amx` can run."""
    if not native.available() or "avx512" not in _load.require().isas().split(","):
        pytest.skip("the kernels for AMX need AVX-512 beside it")
    if native.isa() == "amx":
        yield
        return
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("amx") / "emulator.so"
    command = [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", str(SOURCES / "amx_emulator.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True, timeout=300)
    emulator = ctypes.CDLL(str(library))
    if not emulator.emulate_amx():
        pytest.skip("the CPU has AMX, but this process may not use it")
    yield
    emulator.end_amx_emulation()


@pytest.fixture
def both(tiles: None) -> Iterator[list[str]]:
    yield ["amx", "avx512"]
    _load.require().force_isa("")


def bits_by(isa: str, x: mx.array, packed: ops.Packed, mode: ops.Mode) -> np.ndarray:
    assert _load.require().force_isa(isa, True)
    return np.array(ops.linear(x, packed, None, mode)).view(np.uint32)


FORMATS = [
    ("affine", 32, 4),
    ("affine", 64, 4),
    ("affine", 128, 4),
    ("affine", 32, 8),
    ("affine", 128, 8),
    ("mxfp4", 32, 4),
    ("nvfp4", 16, 4),
]


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_bits_are_those_of_vnni(
    both: list[str], form: tuple[str, int, int], mode: ops.Mode
) -> None:
    name, group, bits = form
    w = mx.random.normal((100, 256), key=mx.random.key(0))
    parts = mx.quantize(w, group, bits, mode=name)
    packed = ops.pack_quantized(*parts, *([] if len(parts) == 3 else [None]), group, bits)
    for rows in (16, 20, 21, 100):
        x = mx.random.normal((rows, 256), key=mx.random.key(rows))
        with_tiles, without = (bits_by(isa, x, packed, mode) for isa in both)
        assert (with_tiles == without).all(), rows


def test_what_is_not_finite_stays_in_its_row(both: list[str]) -> None:
    packed = ops.pack_quantized(*mx.quantize(mx.random.normal((40, 128)), 32, 4), 32, 4)
    x = np.random.default_rng(0).normal(size=(20, 128)).astype(np.float32)
    clean = bits_by("amx", mx.array(x), packed, "exact")
    x[4, 70], x[5, 3] = np.nan, np.inf
    got = bits_by("amx", mx.array(x), packed, "exact")
    assert not np.isfinite(got[4:6].view(np.float32)).any()
    assert (np.delete(got, (4, 5), 0) == np.delete(clean, (4, 5), 0)).all()


def test_experts_with_many_rows(both: list[str]) -> None:
    packed = ops.pack_quantized(*mx.quantize(mx.random.normal((96, 64)), 32, 4), 32, 4)
    x = mx.random.normal((60, 64))
    experts = mx.array([0] * 37 + [2] * 18 + [1] * 5)
    results = []
    for isa in both:
        assert _load.require().force_isa(isa, True)
        results.append(np.array(ops.gather_linear(x, experts, packed, 32)).view(np.uint32))
    assert (results[0] == results[1]).all()


def test_products_that_differ_from_vnnis_are_told() -> None:
    def module(faulty: bool, why: str) -> SimpleNamespace:
        return SimpleNamespace(
            mlx_version=_load.MLX_VERSION,
            interface=_load.INTERFACE,
            isa=lambda: "avx512",
            amx=lambda: (faulty, why),
        )

    with pytest.warns(RuntimeWarning, match="AMX is not used: its products differed"):
        _load.check(module(True, "its products differed"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _load.check(module(False, "the kernel does not permit it"))
        _load.check(module(False, ""))
