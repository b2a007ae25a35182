// One position's vector in a KV slab: plain numbers, or codes in affine groups.
//
// What is written are the bits of mx.quantize. A group that holds a number
// which is not finite reads as NaN.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace MS_NS {
using namespace ms;

static inline float load_number(Type t, const uint8_t* p) {
  float f;
  to_float(t, p, 1, &f, 1);
  return f;
}

template <int BITS>
static inline void decode_groups(const Line& line, const uint8_t* codes, float* out) {
  const uint8_t* scale = codes + line.codes_bytes();
  const uint8_t* bias = scale + line.affine_bytes();
  const int es = size_of(line.type);
  for (int g = 0; g < line.dim; g += line.group, scale += es, bias += es) {
    const vf s = vset(load_number(line.type, scale)), b = vset(load_number(line.type, bias));
    for (int i = g; i < g + line.group; i += 16) {
      const vf code = BITS == 8 ? vload_u8(codes + i) : vload_u4(codes + i / 2);
      vstore(out + i, vfma(code, s, b));
    }
  }
}

static inline void decode_line(const Line& line, const void* src, float* out) {
  if (line.bits == 8) decode_groups<8>(line, (const uint8_t*)src, out);
  else if (line.bits == 4) decode_groups<4>(line, (const uint8_t*)src, out);
  else to_float(line.type, src, 1, out, line.dim);
}

static inline void encode_group(const float* x, int n, int bits, uint8_t* codes, float& scale, float& bias) {
  const float bins = bits == 8 ? 255.f : 15.f;
  vf low = vset(INFINITY), high = vset(-INFINITY), poison = vzero();
  for (int i = 0; i < n; i += 16) {
    const vf v = vload(x + i);
    low = vmin(v, low);
    high = vmax(v, high);
    poison = vfma(v, vzero(), poison);  // NaN if any value is not finite
  }
  const float least = -vmaxlane(vsub(vzero(), low)), most = vmaxlane(high), bad = vsum(poison);
  const bool from_least = __builtin_fabsf(least) > __builtin_fabsf(most);
  scale = (most - least) / bins;
  scale = scale > 1e-7f ? scale : 1e-7f;
  if (!from_least) scale = -scale;
  // The end that is farther from zero is kept as it is, and zero is a code.
  const float edge = from_least ? least : most, steps = __builtin_rintf(edge / scale);
  bias = 0.f;
  if (steps != 0.f) scale = edge / steps, bias = edge;
  alignas(16) int8_t q[16];
  for (int i = 0; i < n; i += 16) {
    const vf t = vround(vdiv(vsub(vload(x + i), vset(bias)), vset(scale)));
    istore_i8(q, f2i(vmin(vmax(t, vzero()), vset(bins))));
    if (bits == 8) {
      memcpy(codes + i, q, 16);
    } else {
      for (int j = 0; j < 8; j++) codes[i / 2 + j] = uint8_t(q[2 * j] | q[2 * j + 1] << 4);
    }
  }
  scale += bad, bias += bad;
}

static void encode_line(const Line& line, const float* x, void* dst) {
  if (!line.bits) {
    from_float(line.type, x, dst, line.dim);
    return;
  }
  uint8_t* codes = (uint8_t*)dst;
  uint8_t* scales = codes + line.codes_bytes();
  uint8_t* biases = scales + line.affine_bytes();
  for (int g = 0; g < line.dim / line.group; g++) {
    float s, b;
    encode_group(x + g * line.group, line.group, line.bits, codes + size_t(g) * line.group * line.bits / 8, s, b);
    from_float(line.type, &s, scales + g * size_of(line.type), 1);
    from_float(line.type, &b, biases + g * size_of(line.type), 1);
  }
}

}  // namespace MS_NS
