// A whole transformer decoder over the slabs, as one call. No MLX here.
#pragma once
#include <memory>
#include <vector>

#include "ops.h"

namespace ms {

struct LayerSpec {
  Weight qkv, o, gate, up, down;  // qkv: the three projections stacked
  const float* qkv_bias = nullptr;
  const float* o_bias = nullptr;
  const float* in_norm = nullptr;
  const float* mlp_norm = nullptr;
  const float* q_norm = nullptr;         // [head_dim], absent: no norm
  const float* k_norm = nullptr;
  const float* post_attn_norm = nullptr;  // on a block's output before it is added (gemma)
  const float* post_mlp_norm = nullptr;
  RopeTable* rope = nullptr;
  int window = 0;
};

struct DecoderSpec {
  int hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, intermediate = 0;
  float eps = 1e-5f, scale = 1.f, embed_scale = 1.f;
  Act act = Act::silu;
  Mode mode = Mode::exact;
  Weight embedding;
  const float* final_norm = nullptr;
  std::vector<LayerSpec> layers;
};

// x: [count * length, hidden] floats (overwritten) -> out, the same shape, after the final norm.
// keys, values: one slab a layer, written at each row's positions.
void decode(const DecoderSpec& d, float* x, const std::vector<Slab>& keys, const std::vector<Slab>& values, const Batch& b, float* out);

}  // namespace ms
