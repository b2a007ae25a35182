"""Attention over a compressed latent (MLA) where it lies in the slabs.

mlx-lm's model files absorb a projection into the queries of one position, and expand every latent to
keys and values for more. Here queries are absorbed for any number of positions, so that what all
heads share is read as it is kept, and a position has the same bits however its prompt was cut.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import deepseek_v3, glm4_moe_lite

from mlx_serving.runtime.native import ops, slab

FAMILIES = (deepseek_v3.DeepseekV3Attention, glm4_moe_lite.Glm4MoeLiteAttention)
"""Classes of model files whose latent attention is this one."""


def methods(cls: type) -> dict[str, Any]:
    """Of a subclass of one of them."""
    return {"__call__": _attend, "_copying": cls.__call__, "_native_attention": True}


def _attend(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    if not isinstance(mask, slab.RowMask):
        out: mx.array = self._copying(x, mask, cache)
        return out
    batch, length, _ = x.shape
    if self.q_lora_rank is None:
        q = self.q_proj(x)
    else:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
    q = q.reshape(batch, length, self.num_heads, self.q_head_dim).transpose(0, 2, 1, 3)
    q_nope, q_rope = mx.split(q, [self.qk_nope_head_dim], axis=-1)
    latent, k_rope = mx.split(self.kv_a_proj_with_mqa(x), [self.kv_lora_rank], axis=-1)
    latent, k_rope = self.kv_a_layernorm(latent)[:, None], k_rope[:, None]
    k_rope, q_rope = self.rope(k_rope, cache.offset), self.rope(q_rope, cache.offset)
    latents, ropes = cache.update_and_fetch(latent, k_rope)
    queries = mx.concatenate([self.embed_q(q_nope), q_rope], axis=-1)
    codes = getattr(cache, "codes", slab.PLAIN)
    where = mask.rows, mask.offsets
    out = ops.latent_attention(queries, latents, ropes, *where, self.scale, *codes)
    out = self.unembed_out(out).transpose(0, 2, 1, 3).reshape(batch, length, -1)
    return self.o_proj(out)
