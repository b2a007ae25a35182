"""How a model's prefixes are cut into blocks, how many are kept, and why so."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from mlx_serving.errors import ModelBroken
from mlx_serving.types import PrefixReuse
from mlx_serving.worker.wire import ModelOptions

log = logging.getLogger(__name__)

BLOCK_TOKENS = 16
"""Where any position may end a block. Of a shared prefix, half of this is computed again on average."""
PREFILL_GRAIN = 8
"""Rows that the kernels' widest tile computes at once: shorter cuts would waste some."""
SHARE = 0.25
"""Of the memory beside the weights, unless the configuration says how many bytes."""


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    reuse: PrefixReuse
    why: str
    blocks: int = 0
    block_tokens: int = BLOCK_TOKENS
    block_bytes: int = 0
    whole_chunks: bool = False

    @property
    def total_bytes(self) -> int:
        return self.blocks * self.block_bytes


def prefill_grain(
    ability: PrefixReuse, invariant: bool, step_size: int, options: ModelOptions
) -> int:
    """Where a prompt may be cut for the sake of running streams; 0: only as ever."""
    if invariant and ability == "blocks":
        return PREFILL_GRAIN
    if options.max_itl_ms:
        log.warning(
            "max_itl_ms: this model's results may depend on where prompts are cut, so chunks stay "
            "%d tokens; a smaller prefill_step_size shortens the gaps",
            step_size,
        )
    return 0


def prefix_plan(
    ability: PrefixReuse,
    step_size: int,
    invariant: bool,
    kv_bytes: int,
    state_bytes: int,
    room: int,
    options: ModelOptions,
) -> PrefixPlan:
    """`ability` is the store's. `invariant`: a position's result is the same bits wherever chunks are
    cut; elsewhere a block is one whole prefill chunk, so that a copy is always what computing would
    give. `kv_bytes` are a token's, `state_bytes` a row's, `room` what the weights leave.

    Raises ModelBroken if the bytes asked for are not there.
    """
    asked = options.prefix_cache_bytes
    if ability == "none":
        return PrefixPlan("none", "the model's caches have no row slots")
    if asked == 0:
        return PrefixPlan("none", "prefix_cache_bytes is 0")
    if asked is not None and asked > room:
        raise ModelBroken(f"prefix_cache_bytes is {asked}, and the weights leave {room} bytes")
    whole_chunks = ability == "snapshots" or not invariant
    size = step_size if whole_chunks else BLOCK_TOKENS
    block_bytes = size * kv_bytes + state_bytes
    blocks = int(room * SHARE if asked is None else asked) // max(block_bytes, 1)
    if blocks < 1:
        return PrefixPlan("none", f"a block of {size} tokens takes {block_bytes} bytes: too much")
    why = f"any {size} tokens: results do not depend on where prompts are cut"
    if ability == "snapshots":
        why = f"every {size} tokens of a prompt, where recurrent state is kept"
    elif whole_chunks:
        why = f"every {size} tokens of a prompt, as it is computed: results may depend on the cuts"
    return PrefixPlan(ability, why, blocks, size, block_bytes, whole_chunks)
