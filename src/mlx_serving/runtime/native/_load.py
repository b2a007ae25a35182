"""Finds the compiled module, or the reason why it cannot be used."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import platform
import warnings
from typing import Any

MLX_VERSION = "0.32.4"
"""The MLX whose C++ interface the kernels use. Another version may differ in layout, not in name,
so it is compared before the module is loaded."""


INTERFACE = 5
"""What the module must be able to do, as in primitives.h: a module left from an earlier build has
another number."""


def _find() -> tuple[Any, str]:
    if platform.system() != "Linux":
        return None, "built on Linux only; elsewhere MLX has a faster backend"
    try:
        installed = importlib.metadata.version("mlx")
    except importlib.metadata.PackageNotFoundError:
        return None, "MLX is not installed"
    if installed != MLX_VERSION:
        reason = f"built for MLX {MLX_VERSION}, but {installed} is installed"
        warnings.warn(f"native CPU kernels are off: {reason}", RuntimeWarning, stacklevel=2)
        return None, reason
    try:
        import mlx.core  # noqa: F401 - its library must be loaded before ours links to it

        module = importlib.import_module(f"{__package__}._native")
    except ImportError as error:
        with contextlib.suppress(ImportError):  # written by the build when it skips the kernels
            return None, importlib.import_module(f"{__package__}._not_built").REASON
        if isinstance(error, ModuleNotFoundError):
            return None, "not built: the package was installed without running its build"
        warnings.warn(f"native CPU kernels are off: {error}", RuntimeWarning, stacklevel=2)
        return None, f"cannot be loaded: {error}"
    return check(module)


def check(module: Any) -> tuple[Any, str]:
    """The module, or None and why it cannot be used."""
    if module.mlx_version != MLX_VERSION:
        reason = f"built with MLX {module.mlx_version}, but {MLX_VERSION} is installed"
        warnings.warn(f"native CPU kernels are off: {reason}", RuntimeWarning, stacklevel=2)
        return None, reason
    if getattr(module, "interface", 1) != INTERFACE:
        reason = "the compiled module is of another version of this package; build it again"
        warnings.warn(f"native CPU kernels are off: {reason}", RuntimeWarning, stacklevel=2)
        return None, reason
    if module.isa() == "generic" and platform.machine() in ("x86_64", "AMD64"):
        return None, "the CPU lacks AVX2, FMA or F16C"
    faulty, why = module.amx()
    if faulty:
        warnings.warn(f"AMX is not used: {why}", RuntimeWarning, stacklevel=2)
    return module, ""


module, reason = _find()


def require() -> Any:
    """The compiled module. Raises RuntimeError with the reason if there is none."""
    if module is None:
        raise RuntimeError(f"native kernels are not available: {reason}")
    return module
