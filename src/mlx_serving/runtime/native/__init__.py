"""C++ kernels for MLX's CPU backend, beside a slow obvious reference.

Importable anywhere: without the compiled module `available()` is False and `why()` says why.
`ops` has the kernels, `install.accelerate` moves a loaded model to them, `slab` is how a KV cache
takes part, `reference` is what the kernels are tested against. docs/kernels.md tells the rest.
"""

from __future__ import annotations

from mlx_serving.runtime.native import _load


def available() -> bool:
    """The kernels can be used in this process."""
    return _load.module is not None


def why() -> str:
    """Why they cannot; empty if they can."""
    return _load.reason


def describe() -> tuple[bool, str]:
    """Whether the kernels can be used, and what they use or why not, for people to read."""
    if not available():
        return False, why()
    _, amx = _load.require().amx()
    return True, f"{isa()}{f' (AMX is not used: {amx})' if amx else ''}, {threads()} threads"


def isa() -> str:
    """The instruction set in use: amx, avx512, avxvnni, avx2 or generic."""
    return str(_load.require().isa())


def threads() -> int:
    """Threads a kernel uses, the caller's included; at first what affinity and cgroup allow."""
    return int(_load.require().threads())


def set_threads(n: int) -> None:
    """Use n threads (1 to 256) from the next operation on."""
    _load.require().set_threads(n)


__all__ = ["available", "describe", "isa", "set_threads", "threads", "why"]
