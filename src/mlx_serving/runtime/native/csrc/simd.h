// One vector type of 16 float lanes on every instruction set.
//
// The lane count, the use of fused multiply-add and the shape of every
// reduction tree are the same on all of them, so a kernel written once gives
// the same bits with AVX2 and with AVX-512.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(MS_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(MS_ISA_AVX2)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

#include "types.h"

namespace MS_NS {

static inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exp = (h >> 10) & 31, man = h & 1023, bits;
  if (exp == 31) {
    bits = sign | 0x7f800000u | (man << 13);
  } else if (exp) {
    bits = sign | ((exp + 112) << 23) | (man << 13);
  } else {
    float f = float(man) * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

static inline uint16_t float_to_half(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint32_t sign = (u >> 16) & 0x8000, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00);
  if (a < 0x38800000u) {  // subnormal: let the float adder round to nearest even
    float m;
    memcpy(&m, &a, 4);
    m += 0.5f;
    uint32_t r;
    memcpy(&r, &m, 4);
    return uint16_t(sign | (r - 0x3f000000u));
  }
  uint32_t r = a + 0xfff + ((a >> 13) & 1) - 0x38000000u;
  return uint16_t(sign | (r >> 13));
}

static inline float bf16_to_float(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline uint16_t float_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 64);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// n elements of any supported type, `stride` elements apart, to float.
static inline void to_float(Type t, const void* src, int64_t stride, float* dst, int64_t n) {
  if (t == Type::f32 && stride == 1) {
    memcpy(dst, src, size_t(n) * 4);
    return;
  }
  int64_t i = 0;
  if (stride == 1) {
    const uint16_t* p = static_cast<const uint16_t*>(src);
    if (t == Type::bf16) {
      for (; i + 16 <= n; i += 16) vstore(dst + i, vload_bf16(p + i));
    } else {
      for (; i + 16 <= n; i += 16) vstore(dst + i, vload_f16(p + i));
    }
  }
  for (; i < n; i++) {
    if (t == Type::f32) {
      dst[i] = static_cast<const float*>(src)[i * stride];
    } else {
      uint16_t h = static_cast<const uint16_t*>(src)[i * stride];
      dst[i] = t == Type::bf16 ? bf16_to_float(h) : half_to_float(h);
    }
  }
}

static inline void from_float(Type t, const float* src, void* dst, int64_t n) {
  if (t == Type::f32) {
    memcpy(dst, src, size_t(n) * 4);
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(dst);
  for (int64_t i = 0; i < n; i++) {
    p[i] = t == Type::bf16 ? float_to_bf16(src[i]) : float_to_half(src[i]);
  }
}

static inline vf vload_n(const float* p, int n) {
  if (n >= 16) return vload(p);
  alignas(64) float t[16] = {};
  memcpy(t, p, size_t(n) * 4);
  return vload(t);
}

static inline void vstore_n(float* p, vf v, int n) {
  if (n >= 16) {
    vstore(p, v);
    return;
  }
  alignas(64) float t[16];
  vstore(t, v);
  memcpy(p, t, size_t(n) * 4);
}

// e^x. Cephes' polynomial, within 2 ulp; below the normal range the result is
// zero; NaN passes through (hence the operand order of min and max).
static inline vf vexp(vf x) {
  vf c = vmin(vset(88.7f), vmax(vset(-87.3f), x));
  vf n = vround(vmul(c, vset(1.44269504088896341f)));
  vf r = vfnma(n, vset(0.693359375f), c);
  r = vfnma(n, vset(-2.12194440e-4f), r);
  vf p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  p = vfma(p, vmul(r, r), vadd(r, vset(1.f)));
  return vzero_below(vscale2(p, n), x, -87.3f);
}

static inline float sexp(float x) { return vfirst(vexp(vset(x))); }

}  // namespace MS_NS
