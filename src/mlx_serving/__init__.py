"""Serve language models with MLX.

`Engine` and `SyncEngine` are the library; importing this package costs nothing until they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_serving.answers import Answer, Chunk, Completion
    from mlx_serving.config import Config
    from mlx_serving.engine import Engine
    from mlx_serving.errors import MLXServingError
    from mlx_serving.sync import SyncEngine

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

_HOMES = {
    "Config": "config",
    "Engine": "engine",
    "MLXServingError": "errors",
    "SyncEngine": "sync",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mlx_serving' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"mlx_serving.{_HOMES.get(name, 'answers')}"), name)
