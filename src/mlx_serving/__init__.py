"""Serve language and vision-language models with MLX.

`Engine` and `SyncEngine` are the library; importing this package costs nothing until they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_serving.config import Config
    from mlx_serving.engine import Answer, Chunk, Completion, Engine, SyncEngine
    from mlx_serving.errors import MLXServingError

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Chunk",
    "Completion",
    "Config",
    "Engine",
    "MLXServingError",
    "SyncEngine",
    "__version__",
]

_HOMES = {"Config": "mlx_serving.config", "MLXServingError": "mlx_serving.errors"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mlx_serving' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES.get(name, "mlx_serving.engine")), name)
