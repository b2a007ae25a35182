"""Between the prefix blocks on the device and the folder that keeps them: obeys a plan's DiskOrders.

A block on its way to disk is copied by the device behind the step that publishes it, and handed to
the folder's thread once that step is over; one from disk is staged by that thread and put into the
pool before the rows that begin with it start.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_serving.errors import ModelBroken
from mlx_serving.runtime.backend.block_file import Layout
from mlx_serving.runtime.backend.disk import Bytes, DiskFolder
from mlx_serving.runtime.backend.identity import identity
from mlx_serving.runtime.backend.kv import KVStore
from mlx_serving.runtime.backend.prefix import PrefixPlan
from mlx_serving.runtime.core.disk import BlockFile, DiskEvent, DiskOrders, NotWritten
from mlx_serving.runtime.native import _load
from mlx_serving.worker.wire import ModelOptions

log = logging.getLogger(__name__)

FILE_OVERHEAD_BYTES = 32 * 1024
"""A block file's header is smaller."""


@dataclass(slots=True)
class Copies:
    """Blocks on their way to disk: `data` is `[files, bytes of a block]`."""

    files: Sequence[BlockFile]
    layout: Layout
    data: mx.array


class Tier:
    """Everything is called on the runner's thread."""

    def __init__(self, folder: DiskFolder, store: KVStore) -> None:
        self._folder = folder
        self._store = store
        self._copies: list[Copies] = []
        """Not yet handed over."""

    def before(self, orders: DiskOrders) -> None:
        """What comes before the plan's starts."""
        if orders.drop:
            self._folder.drop(orders.drop)
        if orders.forget:
            self._folder.take(orders.forget)
        blocks = [block for _, block in orders.fill]
        for run, lines in self._folder.take([key for key, _ in orders.fill]):
            data = (
                run.data if lines == list(range(run.data.shape[0])) else run.data[mx.array(lines)]
            )
            self._store.fill_blocks(blocks[: len(lines)], run.layout, data)
            del blocks[: len(lines)]
        if orders.read:
            self._folder.read(orders.read)

    def after(self, orders: DiskOrders) -> Copies | None:
        """Copies of what is to be written, which the device makes now."""
        if not orders.write:
            return None
        layout, data = self._store.copy_out([block for _, block in orders.write])
        copies = Copies([file for file, _ in orders.write], layout, data)
        self._copies.append(copies)
        mx.async_eval(data)
        return copies

    def collect(self, copies: Copies | None, *, wait: bool) -> list[DiskEvent]:
        """A step is over: hand its copies to the folder, and hear what has come of all orders."""
        if copies is not None and copies in self._copies:
            self._copies.remove(copies)
            mx.eval(copies.data)
            self._folder.write(copies.files, copies.layout, np.array(copies.data, copy=False))
        return self._folder.events(wait=wait)

    def reset(self) -> None:
        """The steps in flight are over, whatever they would have computed."""
        for copies in self._copies:
            self._folder.report([NotWritten(file.key) for file in copies.files])
        self._copies.clear()

    def close(self) -> None:
        self._folder.close()


def to_device(data: Bytes) -> mx.array:
    """A copy. Evaluated, so that any thread may use it."""
    return mx.array(data)


def open_folder(
    path: Path,
    config: dict[str, Any],
    options: ModelOptions,
    prefix: PrefixPlan,
    step_size: int,
    kernels: str,
    dtype: str,
) -> DiskFolder | None:
    """Where a model's prefix blocks are kept for later workers; None: nowhere, or there are no blocks.

    Raises ModelBroken if the folder cannot be made.
    """
    if options.kv_disk_path is None or not options.kv_disk_bytes:
        return None
    if not prefix.blocks:
        log.warning("%s: nothing is cached on disk: %s", path, prefix.why)
        return None
    root = Path(options.kv_disk_path)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise ModelBroken(f"kv_disk_path cannot be used: {e}") from e
    # Where blocks are whole chunks, their bits may depend on how long chunks are.
    cuts = prefix.block_tokens, prefix.whole_chunks, step_size if prefix.whole_chunks else 0
    kernels = f"{kernels} {_native_digest()}"
    device = str(mx.default_device())
    how = {"dtype": dtype, "kernels": kernels, "device": device, "kv_bits": options.kv_bits}
    of = identity(path, config, cuts=cuts, **how)
    return DiskFolder(root, of, options.kv_disk_bytes, to_device=to_device)


def _native_digest() -> str:
    """Of the compiled kernels: arithmetic may change with them while the version stays."""
    file = getattr(_load.module, "__file__", None)
    return "" if file is None else blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()
