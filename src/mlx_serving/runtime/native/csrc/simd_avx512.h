// 16 lanes in one zmm register; needs AVX-512 F/BW/VL/DQ and VNNI.
#pragma once
#include <immintrin.h>

namespace MS_NS {
using vf = __m512;
using vi = __m512i;

static inline vf vload(const float* p) { return _mm512_loadu_ps(p); }
static inline void vstore(float* p, vf v) { _mm512_storeu_ps(p, v); }
static inline vf vset(float x) { return _mm512_set1_ps(x); }
static inline vf vzero() { return _mm512_setzero_ps(); }
static inline vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vfnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
// Both return the second operand when either is NaN.
static inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vabs(vf a) { return _mm512_abs_ps(a); }
static inline vf vround(vf a) { return _mm512_roundscale_ps(a, 0); }
static inline vf vscale2(vf a, vf n) { return _mm512_scalef_ps(a, n); }
static inline vf vzero_below(vf v, vf x, float limit) {
  return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_LT_OQ), _mm512_setzero_ps());
}
static inline float vfirst(vf a) { return _mm512_cvtss_f32(a); }
static inline vf vload_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline vf vload_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// 16 bytes, and 16 half bytes with the low one of each byte first.
static inline vf vload_u8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))); }
static inline vf vload_u4(const uint8_t* p) {
  __m128i x = _mm_loadl_epi64((const __m128i*)p), m = _mm_set1_epi8(15);
  x = _mm_unpacklo_epi8(_mm_and_si128(x, m), _mm_and_si128(_mm_srli_epi16(x, 4), m));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x));
}
// 16 numbers of E4M3, divided by 256: their bits in the places of a half's.
static inline vf vload_fp8(const uint8_t* p) {
  __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
  __m256i sign = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8);
  return _mm512_cvtph_ps(_mm256_or_si256(sign, _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x7f)), 7)));
}
// Lanes [lo, hi) kept, the others replaced.
static inline vf vkeep(vf a, int lo, int hi, float other) {
  __mmask16 m = hi >= 16 ? 0xffff : hi <= 0 ? 0 : __mmask16((1u << hi) - 1);
  if (lo > 0) m &= lo >= 16 ? 0 : __mmask16(~((1u << lo) - 1));
  return _mm512_mask_blend_ps(m, _mm512_set1_ps(other), a);
}
// Swaps the members of each pair of lanes.
static inline vf vswap_pairs(vf a) { return _mm512_permute_ps(a, 0xb1); }

// The tree is (j, j+8), (j, j+4), (j, j+2), (0, 1): see reduce16.
static inline float vsum(vf a) {
  __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
static inline float vmaxlane(vf a) { return _mm512_reduce_max_ps(a); }

// Lane k of the result is vsum(r[k]), by the same tree.
static inline vf reduce16(const float* rows) {
  vf q[4];
#pragma GCC unroll 4
  for (int e = 0; e < 4; e++) {
    vf a = vload(rows + 16 * e), b = vload(rows + 16 * (e + 4)), c = vload(rows + 16 * (e + 8)), d = vload(rows + 16 * (e + 12));
    vf ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    vf cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    q[e] = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  }
  auto pair = [](vf x, vf y) {
    __m512d u = _mm512_castps_pd(x), v = _mm512_castps_pd(y);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(u, v)), _mm512_castpd_ps(_mm512_unpackhi_pd(u, v)));
  };
  vf x = pair(q[0], q[1]), y = pair(q[2], q[3]);
  return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd));
}

// out[i][j] = in[j][i] for 16 rows, `stride` floats apart on each side.
static inline void transpose16(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  vf r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = vload(in + i * in_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  auto lo = [](vf a, vf b) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
  auto hi = [](vf a, vf b) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[4 * i] = lo(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = hi(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = lo(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = hi(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    vstore(out + i * out_stride, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    vstore(out + (i + 8) * out_stride, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
    vstore(out + (i + 4) * out_stride, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
    vstore(out + (i + 12) * out_stride, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
  }
}

static inline vi iload(const void* p) { return _mm512_loadu_si512(p); }
static inline vi izero() { return _mm512_setzero_si512(); }
static inline vi iadd(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vi ishl7(vi a) { return _mm512_slli_epi32(a, 7); }
static inline vf i2f(vi a) { return _mm512_cvtepi32_ps(a); }
static inline vi nibble_lo(vi a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
static inline vi nibble_hi(vi a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
// Each byte, 0 to 15, looked up in a table of 16.
static inline vi lookup16(const uint8_t* table, vi a) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), a);
}
// Field of `bits` bits at `shift` of each 32-bit lane, as float.
template <int BITS>
static inline vf ifield(vi a, int shift) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srl_epi32(a, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32((1 << BITS) - 1)));
}
static inline vi dot4(vi acc, vi w, int x) { return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x)); }
template <int BITS>
static inline vi dot_u(vi acc, vi w, int x) { return dot4(acc, w, x); }

// Rounds to the nearest integer (even at ties) and keeps the low byte.
static inline void istore_i8(int8_t* p, vi v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }
static inline vi f2i(vf a) { return _mm512_cvtps_epi32(a); }
static inline vi iset(int x) { return _mm512_set1_epi32(x); }
static inline vi isub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
static inline vi isar7(vi a) { return _mm512_srai_epi32(a, 7); }
static inline int isum(vi a) { return _mm512_reduce_add_epi32(a); }
}  // namespace MS_NS
