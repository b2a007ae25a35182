"""OpenBLAS in the place of the reference BLAS that MLX's CPU wheel brings, where no native kernels are.

MLX calls `cblas_sgemm` by name; a library loaded before it, with its symbols public, answers first.
Products of float32 matrices then run at the machine's speed; quantised ones are MLX's own as before.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

PACKAGE = "cmeel-openblas"
"""A build whose functions have their plain names, unlike those that NumPy and SciPy bring."""
_NATIVE = "mlx_serving.runtime.native._native"


@functools.cache
def preload() -> str:
    """Load OpenBLAS if it helps and is there; the answer says what came of it. Must be called before
    MLX is first imported."""
    if platform.system() != "Linux":
        return "MLX brings its own BLAS here"
    if _native_is_built():
        return "OpenBLAS is not needed beside native kernels"
    library = _library()
    if library is None:
        return f"OpenBLAS is not installed (pip install {PACKAGE})"
    if "mlx.core" in sys.modules:
        return "OpenBLAS was not loaded: MLX was imported before"
    try:
        ctypes.CDLL(str(library), mode=os.RTLD_GLOBAL | os.RTLD_NOW)
    except OSError as error:
        hint = " (Debian, Ubuntu: apt install libgfortran5)" if "libgfortran" in str(error) else ""
        return f"OpenBLAS cannot be loaded: {error}{hint}"
    return f"float32 products by OpenBLAS {importlib.metadata.version(PACKAGE)}"


def _native_is_built() -> bool:
    """Told by asking the finders: to look for it by its whole name would import its package, and MLX.
    An editable installation keeps it apart from the sources."""
    where = [str(Path(__file__).parent / "native")]
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    return any(finder.find_spec(_NATIVE, where) is not None for finder in finders)


def _library() -> Path | None:
    try:
        files = importlib.metadata.files(PACKAGE) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name == "libopenblas.so.0"), None)
