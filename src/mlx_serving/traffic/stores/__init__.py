"""Where whole answers are kept: in memory, on disk, or in a Redis that several servers share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal, assert_never

from mlx_serving.errors import ConfigError
from mlx_serving.traffic.stores.port import Bounds, Store

Kind = Literal["memory", "disk", "redis"]


def open_store(kind: Kind, bounds: Bounds, folder: Path, url: str) -> Store:
    """Nothing is opened or connected before its first use. Raises ConfigError."""
    match kind:
        case "memory":
            from mlx_serving.traffic.stores.memory import MemoryStore

            return MemoryStore(bounds)
        case "disk":
            from mlx_serving.traffic.stores.disk import DiskStore

            return DiskStore(bounds, folder / "responses.sqlite3")
        case "redis":
            if importlib.util.find_spec("redis") is None:
                raise ConfigError(
                    "response_cache redis needs its client: pip install 'mlx-serving[redis]'",
                    param="response_cache",
                )
            from mlx_serving.traffic.stores.redis import RedisStore

            return RedisStore(bounds, url)
        case _:
            assert_never(kind)
