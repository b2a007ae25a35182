// What a quantised weight's groups are made of, and the one way in which they are added.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace MS_NS {
using namespace ms;

static inline vf load_scale(Type t, const uint8_t* p) {
  if (t == Type::f32) return vload((const float*)p);
  return t == Type::f16 ? vload_f16((const uint16_t*)p) : vload_bf16((const uint16_t*)p);
}

template <bool FP4>
static inline vi codes_lo(vi q) {
  return FP4 ? lookup16(kFp4, nibble_lo(q)) : nibble_lo(q);
}
template <bool FP4>
static inline vi codes_hi(vi q) {
  return FP4 ? lookup16(kFp4, nibble_hi(q)) : nibble_hi(q);
}

// A group's products with both planes as one integer.
static inline vi both_planes(vi hi, vi lo) { return iadd(ishl7(hi), lo); }

// One row's sum with a group more. t: its integer products; s, b: the weight's
// scales and biases; scale, sum: the row's.
static inline vf add_group(vf acc, vi t, vf s, vf b, float scale, float sum) {
  acc = vfma(i2f(t), vmul(s, vset(scale)), acc);
  return vfma(b, vset(sum), acc);
}
}  // namespace MS_NS
