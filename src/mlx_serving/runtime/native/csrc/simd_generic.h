// 16 lanes as compiler vectors, for any CPU: NEON on arm64, SSE2 on old x86-64.
#pragma once
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace MS_NS {
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));

#define MS_LANES for (int i = 0; i < 16; i++)
static inline float half_to_float(uint16_t h);

static inline vf vload(const float* p) {
  vf r;
  memcpy(&r, p, 64);
  return r;
}
static inline void vstore(float* p, vf v) { memcpy(p, &v, 64); }
static inline vf vset(float x) { return x - vf{}; }
static inline vf vzero() { return vf{}; }
static inline vf vadd(vf x, vf y) { return x + y; }
static inline vf vsub(vf x, vf y) { return x - y; }
static inline vf vmul(vf x, vf y) { return x * y; }
static inline vf vdiv(vf x, vf y) { return x / y; }
static inline vf vmax(vf x, vf y) { return x > y ? x : y; }
static inline vf vmin(vf x, vf y) { return x < y ? x : y; }
#if defined(__aarch64__)
static inline vf vfma(vf x, vf y, vf z) {
  float32x4_t a[4], b[4], c[4];
  memcpy(a, &x, 64), memcpy(b, &y, 64), memcpy(c, &z, 64);
  for (int i = 0; i < 4; i++) c[i] = vfmaq_f32(c[i], a[i], b[i]);
  memcpy(&z, c, 64);
  return z;
}
#else
// Without an FMA instruction a fused result is a library call per lane.
static inline vf vfma(vf x, vf y, vf z) { return x * y + z; }
#endif
static inline vf vfnma(vf x, vf y, vf z) { return vfma(-x, y, z); }
static inline vf vabs(vf x) {
  vi b;
  memcpy(&b, &x, 64);
  b &= 0x7fffffff;
  memcpy(&x, &b, 64);
  return x;
}
// Adding 1.5 * 2^23 rounds to the nearest integer for |x| < 2^22, the callers' range.
static inline vf vround(vf x) { return (x + 12582912.f) - 12582912.f; }
static inline vi f2i(vf x) {
  vf y = x + 12582912.f;
  vi b;
  memcpy(&b, &y, 64);
  return (b & 0x7fffff) - 0x400000;
}
static inline vf vscale2(vf x, vf n) {
  vi k = f2i(n), h = k >> 1, a = (h + 127) << 23, b = (k - h + 127) << 23;
  vf u, w;
  memcpy(&u, &a, 64);
  memcpy(&w, &b, 64);
  return x * (u * w);
}
static inline vf vzero_below(vf v, vf x, float limit) { return x < vset(limit) ? vf{} : v; }
static inline float vfirst(vf x) { return x[0]; }
static inline vf vload_bf16(const uint16_t* p) {
  vu b;
  MS_LANES b[i] = uint32_t(p[i]) << 16;
  vf r;
  memcpy(&r, &b, 64);
  return r;
}
static inline vf vload_f16(const uint16_t* p) {
  vf r;
  MS_LANES r[i] = half_to_float(p[i]);
  return r;
}
static inline vf vload_u8(const uint8_t* p) {
  vi r;
  MS_LANES r[i] = p[i];
  return __builtin_convertvector(r, vf);
}
static inline vf vload_u4(const uint8_t* p) {
  vi r;
  MS_LANES r[i] = p[i / 2] >> (i % 2 * 4) & 15;
  return __builtin_convertvector(r, vf);
}
static inline vf vload_fp8(const uint8_t* p) {
  vf r;
  MS_LANES r[i] = half_to_float(uint16_t((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7));
  return r;
}
static inline vf vkeep(vf x, int lo, int hi, float other) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return ((lane >= lo) & (lane < hi)) ? x : vset(other);
}
static inline vf vswap_pairs(vf x) {
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}
static inline float vsum(vf x) {
  float t[16];
  memcpy(t, &x, 64);
  for (int w = 8; w; w >>= 1)
    for (int i = 0; i < w; i++) t[i] += t[i + w];
  return t[0];
}
static inline float vmaxlane(vf x) {
  float m = x[0];
  MS_LANES m = x[i] > m ? x[i] : m;
  return m;
}
static inline vf reduce16(const float* rows) {
  vf r;
  for (int k = 0; k < 16; k++) r[k] = vsum(vload(rows + 16 * k));
  return r;
}
static inline void transpose16(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) out[j * out_stride + i] = in[i * in_stride + j];
}
static inline vi iload(const void* p) {
  vi r;
  memcpy(&r, p, 64);
  return r;
}
static inline vi iset(int x) { return x - vi{}; }
static inline vi izero() { return vi{}; }
static inline vi iadd(vi x, vi y) { return x + y; }
static inline vi isub(vi x, vi y) { return x - y; }
static inline vi ishl7(vi x) { return x * 128; }
static inline vi isar7(vi x) { return x >> 7; }
static inline vf i2f(vi x) { return __builtin_convertvector(x, vf); }
static inline vi nibble_lo(vi x) { return x & 0x0f0f0f0f; }
static inline vi nibble_hi(vi x) { return (x >> 4) & 0x0f0f0f0f; }
static inline vi lookup16(const uint8_t* table, vi x) {
#if defined(__aarch64__)
  uint8x16_t t = vld1q_u8(table), c[4];
  memcpy(c, &x, 64);
  for (int i = 0; i < 4; i++) c[i] = vqtbl1q_u8(t, c[i]);
  memcpy(&x, c, 64);
  return x;
#else
  uint8_t b[64];
  memcpy(b, &x, 64);
  for (int i = 0; i < 64; i++) b[i] = table[b[i]];
  memcpy(&x, b, 64);
  return x;
#endif
}
template <int BITS>
static inline vf ifield(vi x, int shift) {
  return i2f((x >> shift) & ((1 << BITS) - 1));
}
#if defined(__ARM_FEATURE_DOTPROD)
// SDOT takes signed bytes: full ones are shifted by 128, and what that takes is added again.
template <int BITS>
static inline vi dot_u(vi acc, vi w, int x) {
  int8x16_t v = vreinterpretq_s8_s32(vdupq_n_s32(x)), codes[4];
  int32x4_t sum[4];
  memcpy(codes, &w, 64), memcpy(sum, &acc, 64);
  for (int i = 0; i < 4; i++) {
    if (BITS == 8) {
      codes[i] = veorq_s8(codes[i], vdupq_n_s8(-128));
      sum[i] = vdotq_s32(vdotq_s32(sum[i], vdupq_n_s8(64), v), vdupq_n_s8(64), v);
    }
    sum[i] = vdotq_s32(sum[i], codes[i], v);
  }
  memcpy(&acc, sum, 64);
  return acc;
}
#else
template <int BITS>
static inline vi dot_u(vi acc, vi w, int x) {
  int8_t b[4];
  memcpy(b, &x, 4);
  for (int i = 0; i < 4; i++) acc += ((w >> (8 * i)) & 255) * int(b[i]);
  return acc;
}
#endif
static inline void istore_i8(int8_t* p, vi v) { MS_LANES p[i] = int8_t(v[i]); }
static inline int isum(vi v) {
  int s = 0;
  MS_LANES s += v[i];
  return s;
}
#undef MS_LANES
}  // namespace MS_NS
