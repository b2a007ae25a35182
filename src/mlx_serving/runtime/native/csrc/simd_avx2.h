// 16 lanes in two ymm registers; needs AVX2, FMA and F16C. With MS_ISA_AVXVNNI
// the dot products use the 256-bit VNNI instruction.
#pragma once
#include <immintrin.h>

namespace MS_NS {
struct vf {
  __m256 a, b;
};
struct vi {
  __m256i a, b;
};

#define MS_BOTH(f) \
  { f(x.a, y.a), f(x.b, y.b) }
static inline vf vload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void vstore(float* p, vf v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
static inline vf vset(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline vf vzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline vf vadd(vf x, vf y) { return MS_BOTH(_mm256_add_ps); }
static inline vf vsub(vf x, vf y) { return MS_BOTH(_mm256_sub_ps); }
static inline vf vmul(vf x, vf y) { return MS_BOTH(_mm256_mul_ps); }
static inline vf vdiv(vf x, vf y) { return MS_BOTH(_mm256_div_ps); }
static inline vf vmax(vf x, vf y) { return MS_BOTH(_mm256_max_ps); }
static inline vf vmin(vf x, vf y) { return MS_BOTH(_mm256_min_ps); }
static inline vf vfma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline vf vfnma(vf x, vf y, vf z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
static inline vf vabs(vf x) {
  __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
static inline vf vround(vf x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
static inline __m256 pow2(__m256 n) {
  // Two factors, since 2^n alone leaves the exponent's range at n = 128.
  __m256i i = _mm256_cvtps_epi32(n), h = _mm256_srai_epi32(i, 1), k = _mm256_set1_epi32(127);
  __m256 u = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(h, k), 23));
  __m256 v = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, h), k), 23));
  return _mm256_mul_ps(u, v);
}
static inline vf vscale2(vf x, vf n) { return {_mm256_mul_ps(x.a, pow2(n.a)), _mm256_mul_ps(x.b, pow2(n.b))}; }
static inline vf vzero_below(vf v, vf x, float limit) {
  __m256 l = _mm256_set1_ps(limit);
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.a, l, _CMP_LT_OQ), v.a), _mm256_andnot_ps(_mm256_cmp_ps(x.b, l, _CMP_LT_OQ), v.b)};
}
static inline float vfirst(vf x) { return _mm256_cvtss_f32(x.a); }
static inline vf vload_bf16(const uint16_t* p) {
  auto f = [](const uint16_t* q) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)q)), 16));
  };
  return {f(p), f(p + 8)};
}
static inline vf vload_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
static inline vf from_bytes(__m128i x) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)))};
}
static inline vf vload_u8(const uint8_t* p) { return from_bytes(_mm_loadu_si128((const __m128i*)p)); }
static inline vf vload_u4(const uint8_t* p) {
  __m128i x = _mm_loadl_epi64((const __m128i*)p), m = _mm_set1_epi8(15);
  return from_bytes(_mm_unpacklo_epi8(_mm_and_si128(x, m), _mm_and_si128(_mm_srli_epi16(x, 4), m)));
}
static inline vf vload_fp8(const uint8_t* p) {
  __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
  __m256i sign = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8);
  x = _mm256_or_si256(sign, _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x7f)), 7));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}
static inline vf vkeep(vf x, int lo, int hi, float other) {
  __m256i i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), l = _mm256_set1_epi32(lo), h = _mm256_set1_epi32(hi);
  __m256 o = _mm256_set1_ps(other);
  auto f = [&](__m256 v, __m256i k) {
    __m256i drop = _mm256_or_si256(_mm256_cmpgt_epi32(l, k), _mm256_xor_si256(_mm256_cmpgt_epi32(h, k), _mm256_set1_epi32(-1)));
    return _mm256_blendv_ps(v, o, _mm256_castsi256_ps(drop));
  };
  return {f(x.a, i), f(x.b, _mm256_add_epi32(i, _mm256_set1_epi32(8)))};
}
static inline vf vswap_pairs(vf x) { return {_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)}; }
static inline float vsum(vf x) {
  __m256 b = _mm256_add_ps(x.a, x.b);
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
static inline float vmaxlane(vf x) {
  __m256 b = _mm256_max_ps(x.a, x.b);
  __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}
static inline vf reduce16(const float* rows) {
  alignas(64) float t[16];
  for (int k = 0; k < 16; k++) t[k] = vsum(vload(rows + 16 * k));
  return vload(t);
}
static inline void transpose16(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) out[j * out_stride + i] = in[i * in_stride + j];
}

static inline vi iload(const void* p) {
  const __m256i* q = (const __m256i*)p;
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
static inline vi izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline vi iadd(vi x, vi y) { return MS_BOTH(_mm256_add_epi32); }
static inline vi isub(vi x, vi y) { return MS_BOTH(_mm256_sub_epi32); }
static inline vi iset(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline vi ishl7(vi x) { return {_mm256_slli_epi32(x.a, 7), _mm256_slli_epi32(x.b, 7)}; }
static inline vi isar7(vi x) { return {_mm256_srai_epi32(x.a, 7), _mm256_srai_epi32(x.b, 7)}; }
static inline vf i2f(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline vi f2i(vf x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
static inline vi nibble_lo(vi x) {
  __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
static inline vi nibble_hi(vi x) {
  return nibble_lo({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
}
static inline vi lookup16(const uint8_t* table, vi x) {
  __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return {_mm256_shuffle_epi8(t, x.a), _mm256_shuffle_epi8(t, x.b)};
}
template <int BITS>
static inline vf ifield(vi x, int shift) {
  __m128i s = _mm_cvtsi32_si128(shift);
  __m256i m = _mm256_set1_epi32((1 << BITS) - 1);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(x.a, s), m)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(x.b, s), m))};
}
static inline __m256i dot_half(__m256i acc, __m256i w, __m256i x) {
#if defined(MS_ISA_AVXVNNI)
  return _mm256_dpbusd_avx_epi32(acc, w, x);
#else
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
#endif
}
template <int BITS>
static inline vi dot_u(vi acc, vi w, int x) {
  __m256i v = _mm256_set1_epi32(x);
#if !defined(MS_ISA_AVXVNNI)
  if constexpr (BITS == 8) {
    // vpmaddubsw saturates on full bytes, so their nibbles go separately.
    vi lo = nibble_lo(w), hi = nibble_hi(w);
    vi h = {dot_half(_mm256_setzero_si256(), hi.a, v), dot_half(_mm256_setzero_si256(), hi.b, v)};
    acc.a = _mm256_add_epi32(dot_half(acc.a, lo.a, v), _mm256_slli_epi32(h.a, 4));
    acc.b = _mm256_add_epi32(dot_half(acc.b, lo.b, v), _mm256_slli_epi32(h.b, 4));
    return acc;
  }
#endif
  return {dot_half(acc.a, w.a, v), dot_half(acc.b, w.b, v)};
}
static inline void istore_i8(int8_t* p, vi v) {
  alignas(32) int32_t t[16];
  _mm256_store_si256((__m256i*)t, v.a);
  _mm256_store_si256((__m256i*)(t + 8), v.b);
  for (int i = 0; i < 16; i++) p[i] = int8_t(t[i]);
}
static inline int isum(vi v) {
  alignas(32) int32_t t[8];
  _mm256_store_si256((__m256i*)t, _mm256_add_epi32(v.a, v.b));
  int s = 0;
  for (int i = 0; i < 8; i++) s += t[i];
  return s;
}
#undef MS_BOTH
}  // namespace MS_NS
