// Activation quantisation and the matmul kernels.
//
// Each output is a sum over groups in ascending order, one fused multiply-add
// for the scale and one for the bias; inside a group the integers are exact.
// So the result of a row does not depend on how many rows stand beside it.
#pragma once
#include "kernel_group.h"

namespace MS_NS {
using namespace ms;

static void quantize_rows(const Activations& a, Mode mode, int row0, int row1) {
  const int groups = a.k / a.group;
  const float top = mode == Mode::exact ? 16256.f : 127.f;  // 16256 = 127 * 128
  for (int r = row0; r < row1; r++) {
    for (int g = 0; g < groups; g++) {
      const float* x = a.x + int64_t(r) * a.k + g * a.group;
      float* scale = a.scale + int64_t(r) * groups + g;
      float* sum = a.sum + int64_t(r) * groups + g;
      if (mode == Mode::f32) {
        vf t = vzero();
        for (int i = 0; i < a.group; i += 16) t = vadd(t, vload(x + i));
        *sum = vsum(t);
        continue;
      }
      vf m = vzero(), poison = vzero();
      for (int i = 0; i < a.group; i += 16) {
        vf v = vload(x + i);
        m = vmax(m, vabs(v));
        poison = vfma(v, vzero(), poison);  // NaN if any value is not finite
      }
      float amax = vmaxlane(m), d = amax / top + vsum(poison);
      float inv = d > 0.f ? 1.f / d : 0.f;
      if (inv > 3.0e38f) inv = 0.f, d = d != d ? d : 0.f;  // amax below what 1/d can hold
      vi total = izero();
      int8_t* hi = a.hi + int64_t(r) * a.k + g * a.group;
      int8_t* lo = a.lo + int64_t(r) * a.k + g * a.group;
      for (int i = 0; i < a.group; i += 16) {
        vi q = f2i(vmul(vload(x + i), vset(inv)));
        total = iadd(total, q);
        if (mode == Mode::exact) {
          vi h = isar7(iadd(q, iset(64)));
          istore_i8(hi + i, h);
          istore_i8(lo + i, isub(q, ishl7(h)));
        } else {
          istore_i8(hi + i, q);
        }
      }
      *scale = d;
      *sum = d * float(isum(total));
    }
  }
}

static inline int word(const int8_t* p) {
  int x;
  memcpy(&x, p, 4);
  return x;
}

template <int BITS, int PLANES, int MB, bool FP4 = false>
static inline void integer_block(const Weight& w, const Activations& a, const uint8_t* p, int row, float* out, int64_t ld, int n) {
  const int groups = w.groups(), gs = w.group, sb = kLanes * size_of(w.scale_type);
  vf acc[MB];
  for (int m = 0; m < MB; m++) acc[m] = vzero();
  for (int g = 0; g < groups; g++) {
    vf s = load_scale(w.scale_type, p), b = load_scale(w.scale_type, p + sb);
    p += 2 * sb;
    vi h[MB], l[MB];
    for (int m = 0; m < MB; m++) h[m] = l[m] = izero();
    const int8_t* xh = a.hi + int64_t(row) * a.k + g * gs;
    const int8_t* xl = a.lo + int64_t(row) * a.k + g * gs;
    constexpr int STEP = BITS == 4 ? 8 : 4;
#pragma GCC unroll 4
    for (int j = 0; j < gs; j += STEP, p += 64) {
      vi q = iload(p);
      if constexpr (BITS == 4) {
        vi w0 = codes_lo<FP4>(q), w1 = codes_hi<FP4>(q);
#pragma GCC unroll 8
        for (int m = 0; m < MB; m++) {
          h[m] = dot_u<4>(h[m], w0, word(xh + int64_t(m) * a.k + j));
          if constexpr (PLANES == 2) l[m] = dot_u<4>(l[m], w0, word(xl + int64_t(m) * a.k + j));
          h[m] = dot_u<4>(h[m], w1, word(xh + int64_t(m) * a.k + j + 4));
          if constexpr (PLANES == 2) l[m] = dot_u<4>(l[m], w1, word(xl + int64_t(m) * a.k + j + 4));
        }
      } else {
#pragma GCC unroll 8
        for (int m = 0; m < MB; m++) {
          h[m] = dot_u<8>(h[m], q, word(xh + int64_t(m) * a.k + j));
          if constexpr (PLANES == 2) l[m] = dot_u<8>(l[m], q, word(xl + int64_t(m) * a.k + j));
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MB; m++) {
      vi t = PLANES == 2 ? both_planes(h[m], l[m]) : h[m];
      const int64_t i = int64_t(row + m) * groups + g;
      acc[m] = add_group(acc[m], t, s, b, a.scale[i], a.sum[i]);
    }
  }
  for (int m = 0; m < MB; m++) vstore_n(out + m * ld, acc[m], n);
}

template <int BITS, int MB, bool FP4 = false>
static inline void float_block(const Weight& w, const Activations& a, const uint8_t* p, int row, float* out, int64_t ld, int n) {
  const int groups = w.groups(), gs = w.group, sb = kLanes * size_of(w.scale_type);
  vf acc[MB];
  for (int m = 0; m < MB; m++) acc[m] = vzero();
  for (int g = 0; g < groups; g++) {
    vf s = load_scale(w.scale_type, p), b = load_scale(w.scale_type, p + sb);
    p += 2 * sb;
    vf t0[MB], t1[MB];  // two chains, since one waits for the adder
    for (int m = 0; m < MB; m++) t0[m] = t1[m] = vzero();
    const float* x = a.x + int64_t(row) * a.k + g * gs;
    constexpr int STEP = BITS == 4 ? 8 : 4;
    for (int j = 0; j < gs; j += STEP, p += 64) {
      vi q = iload(p), lo = q, hi = q;
      if constexpr (FP4) lo = codes_lo<true>(q), hi = codes_hi<true>(q);
#pragma GCC unroll 4
      for (int i = 0; i < STEP / 2; i++) {
        // 4 bits: inputs i and i + 4 share a byte. 8 bits: inputs i and i + 2.
        vf u = FP4 ? ifield<8>(lo, 8 * i) : ifield<BITS>(q, 8 * i);
        vf v = FP4 ? ifield<8>(hi, 8 * i) : ifield<BITS>(q, BITS == 4 ? 8 * i + 4 : 8 * (i + 2));
#pragma GCC unroll 8
        for (int m = 0; m < MB; m++) {
          const float* y = x + int64_t(m) * a.k + j + i;
          t0[m] = vfma(u, vset(y[0]), t0[m]);
          t1[m] = vfma(v, vset(y[STEP / 2]), t1[m]);
        }
      }
    }
    for (int m = 0; m < MB; m++) {
      acc[m] = vfma(vadd(t0[m], t1[m]), s, acc[m]);
      acc[m] = vfma(b, vset(a.sum[int64_t(row + m) * groups + g]), acc[m]);
    }
  }
  for (int m = 0; m < MB; m++) vstore_n(out + m * ld, acc[m], n);
}

template <int MB, int NV>
static inline void fp8_block(const Weight& w, const Activations& a, int block, int row, float* out, int64_t ld) {
  const size_t bb = w.block_bytes(), sb = w.affine_bytes();
  const uint8_t* p = w.data + block * bb;
  vf acc[MB][NV];
  for (int m = 0; m < MB; m++)
    for (int v = 0; v < NV; v++) acc[m][v] = vzero();
  const float* x = a.x + int64_t(row) * a.k;
  for (int g = 0; g < w.groups(); g++, p += w.group_bytes(), x += w.group) {
    vf t[MB][NV];
    for (int m = 0; m < MB; m++)
      for (int v = 0; v < NV; v++) t[m][v] = vzero();
    for (int i = 0; i < w.group; i++) {
      vf c[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) c[v] = vload_fp8(p + v * bb + sb + i * kLanes);
#pragma GCC unroll 4
      for (int m = 0; m < MB; m++) {
        vf y = vset(x[int64_t(m) * a.k + i]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) t[m][v] = vfma(c[v], y, t[m][v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      const vf s = load_scale(w.scale_type, p + v * bb);
#pragma GCC unroll 4
      for (int m = 0; m < MB; m++) acc[m][v] = vfma(vmul(t[m][v], vset(256.f)), s, acc[m][v]);
    }
  }
  for (int m = 0; m < MB; m++)
    for (int v = 0; v < NV; v++) {
      const int n = w.n - (block + v) * kLanes;
      vstore_n(out + m * ld + (block + v) * kLanes, acc[m][v], n);
    }
}

template <int MB>
static void fp8_rows(const Weight& w, const Activations& a, int block0, int block1, int row, float* out, int64_t ld) {
  constexpr int NV = MB == 4 ? 2 : 4;  // sums of the group and of all before it fill the registers
  int b = block0;
  for (; b + NV <= block1; b += NV) fp8_block<MB, NV>(w, a, b, row, out, ld);
  for (; b < block1; b++) fp8_block<MB, 1>(w, a, b, row, out, ld);
}

template <int MB, int NV>
static inline void dense_block(const Weight& w, const Activations& a, int block, int row, float* out, int64_t ld) {
  const size_t bb = w.block_bytes();
  const uint8_t* p = w.data + block * bb;
  const int eb = kLanes * (w.bits / 8);
  vf acc[MB][NV];
  for (int m = 0; m < MB; m++)
    for (int v = 0; v < NV; v++) acc[m][v] = vzero();
  const float* x = a.x + int64_t(row) * a.k;
  const Type t = w.bits == 32 ? Type::f32 : w.scale_type;
  for (int k = 0; k < w.k; k++, p += eb) {
    vf c[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) c[v] = load_scale(t, p + v * bb);
#pragma GCC unroll 4
    for (int m = 0; m < MB; m++) {
      vf y = vset(x[int64_t(m) * a.k + k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[m][v] = vfma(c[v], y, acc[m][v]);
    }
  }
  for (int m = 0; m < MB; m++)
    for (int v = 0; v < NV; v++) {
      int n = w.n - (block + v) * kLanes;
      vstore_n(out + m * ld + (block + v) * kLanes, acc[m][v], n);
    }
}

template <int MB>
static void dense_rows(const Weight& w, const Activations& a, int block0, int block1, int row, float* out, int64_t ld) {
  int b = block0;
  for (; b + 4 <= block1; b += 4) dense_block<MB, 4>(w, a, b, row, out, ld);
  for (; b < block1; b++) dense_block<MB, 1>(w, a, b, row, out, ld);
}

// Tiles of 8, 4, 2 and 1 rows. Where 16 lanes fill four registers, 2 rows are
// already too many for a bigger tile to pay, and they compile in a quarter of the time.
#if defined(MS_ISA_AVX512) || defined(MS_ISA_AVX2)
#define MS_ROWS(call)                                       \
  {                                                         \
    int r = row0;                                           \
    for (; r + 8 <= row1; r += 8) call(8);                  \
    for (; r + 4 <= row1; r += 4) call(4);                  \
    for (; r + 2 <= row1; r += 2) call(2);                  \
    if (r < row1) call(1);                                  \
  }
#else
#define MS_ROWS(call)                      \
  {                                        \
    int r = row0;                          \
    for (; r + 2 <= row1; r += 2) call(2); \
    if (r < row1) call(1);                 \
  }
#endif

static void matmul(const Weight& w, const Activations& a, Mode mode, int block0, int block1, int row0, int row1, float* out, int64_t ld) {
  auto o = [&](int row) { return out + int64_t(row) * ld; };
  if (w.bits > 8) {
    int r = row0;
    for (; r + 4 <= row1; r += 4) dense_rows<4>(w, a, block0, block1, r, o(r), ld);
    if (r + 2 <= row1) dense_rows<2>(w, a, block0, block1, r, o(r), ld), r += 2;
    if (r < row1) dense_rows<1>(w, a, block0, block1, r, o(r), ld);
    return;
  }
  if (w.codes == Codes::fp8) {
    int r = row0;
    for (; r + 4 <= row1; r += 4) fp8_rows<4>(w, a, block0, block1, r, o(r), ld);
    if (r + 2 <= row1) fp8_rows<2>(w, a, block0, block1, r, o(r), ld), r += 2;
    if (r < row1) fp8_rows<1>(w, a, block0, block1, r, o(r), ld);
    return;
  }
  const bool fp4 = w.codes == Codes::fp4;
  const size_t bb = w.block_bytes();
  for (int b = block0; b < block1; b++) {
    const uint8_t* p = w.data + b * bb;
    const int n = w.n - b * kLanes;
    float* to = out + int64_t(b) * kLanes;
#define MS_INT(B, P, M) integer_block<B, P, M>(w, a, p, r, to + int64_t(r) * ld, ld, n)
#define MS_FPE(M) integer_block<4, 2, M, true>(w, a, p, r, to + int64_t(r) * ld, ld, n)
#define MS_FPF(M) integer_block<4, 1, M, true>(w, a, p, r, to + int64_t(r) * ld, ld, n)
#define MS_FPX(M) float_block<4, M, true>(w, a, p, r, to + int64_t(r) * ld, ld, n)
#define MS_4E(M) MS_INT(4, 2, M)
#define MS_8E(M) MS_INT(8, 2, M)
#define MS_4F(M) MS_INT(4, 1, M)
#define MS_8F(M) MS_INT(8, 1, M)
#define MS_4X(M) float_block<4, M>(w, a, p, r, to + int64_t(r) * ld, ld, n)
#define MS_8X(M) float_block<8, M>(w, a, p, r, to + int64_t(r) * ld, ld, n)
    if (mode == Mode::exact) {
      if (fp4) MS_ROWS(MS_FPE) else if (w.bits == 4) MS_ROWS(MS_4E) else MS_ROWS(MS_8E)
    } else if (mode == Mode::fast) {
      if (fp4) MS_ROWS(MS_FPF) else if (w.bits == 4) MS_ROWS(MS_4F) else MS_ROWS(MS_8F)
    } else {
      if (fp4) MS_ROWS(MS_FPX) else if (w.bits == 4) MS_ROWS(MS_4X) else MS_ROWS(MS_8X)
    }
  }
}

static void dequantize_row(const Weight& w, int row, float* out) {
  const uint8_t* p = w.data + size_t(row / kLanes) * w.block_bytes();
  const int c = row % kLanes;
  if (w.bits > 8) {
    const Type t = w.bits == 32 ? Type::f32 : w.scale_type;
    to_float(t, p + size_t(c) * size_of(t), kLanes, out, w.k);
    return;
  }
  const int sb = kLanes * size_of(w.scale_type);
  for (int g = 0; g < w.groups(); g++, p += w.group_bytes()) {
    float s, b;
    if (w.codes == Codes::fp8) {
      to_float(w.scale_type, p + c * size_of(w.scale_type), 1, &s, 1);
      for (int i = 0; i < w.group; i++) {
        float v[kLanes];
        vstore(v, vload_fp8(p + sb + i * kLanes));
        out[g * w.group + i] = s * (256.f * v[c]);
      }
      continue;
    }
    to_float(w.scale_type, p + c * size_of(w.scale_type), 1, &s, 1);
    to_float(w.scale_type, p + sb + c * size_of(w.scale_type), 1, &b, 1);
    const uint8_t* q = p + 2 * sb;
    for (int i = 0; i < w.group; i++) {
      int code = w.bits == 4 ? (q[i / 8 * 64 + c * 4 + i % 4] >> (i % 8 / 4 * 4)) & 15 : q[i / 4 * 64 + c * 4 + i % 4];
      out[g * w.group + i] = s * float(w.codes == Codes::fp4 ? kFp4[code] : code) + b;
    }
  }
}

}  // namespace MS_NS
