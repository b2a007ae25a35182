// Attention of some queries over one split of one KV head's keys.
//
// Every query does the same arithmetic whatever stands beside it: key blocks
// of 64 at fixed absolute positions, dot products as 16 partial sums added by
// one tree, values added key by key. Two loops exist for the dot products
// (keys in place for few queries, keys transposed for many); they perform the
// same additions in the same order, so a position's output has the same bits
// computed by decoding and by any prefill chunk.
#pragma once
#include "kernel_line.h"
#include "kernels.h"
#include "simd.h"

namespace MS_NS {
using namespace ms;

// s[j] = q . key[j]; keys of d floats, `stride` apart; n <= 64.
static inline void scores_in_place(const float* q, int d, const float* k, int64_t stride, int n, float* s, float* part) {
  for (int j0 = 0; j0 < n; j0 += 16) {
    const int nj = n - j0 < 16 ? n - j0 : 16;
    for (int j = 0; j < nj; j++) {
      const float* key = k + (j0 + j) * stride;
      vf t = vmul(vload(q), vload(key));
      for (int i = 16; i < d; i += 16) t = vfma(vload(q + i), vload(key + i), t);
      vstore(part + 16 * j, t);
    }
    for (int j = nj; j < 16; j++) vstore(part + 16 * j, vzero());
    vstore(s + j0, reduce16(part));
  }
}

template <int NQ, int NV>
static inline void partial(const float* q, int d, const float* kt, int lane, vf out[NQ][NV]) {
#pragma GCC unroll 2
  for (int v = 0; v < NV; v++) {
    vf k = vload(kt + lane * kKeyBlock + 16 * v);
#pragma GCC unroll 2
    for (int a = 0; a < NQ; a++) out[a][v] = vmul(vset(q[a * d + lane]), k);
  }
  for (int i = lane + 16; i < d; i += 16) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) {
      vf k = vload(kt + int64_t(i) * kKeyBlock + 16 * v);
#pragma GCC unroll 2
      for (int a = 0; a < NQ; a++) out[a][v] = vfma(vset(q[a * d + i]), k, out[a][v]);
    }
  }
}

// The tree of vsum over partial sums `lane`, lane + W, ...: W halves each level.
template <int NQ, int NV, int W>
static inline void tree(const float* q, int d, const float* kt, int lane, vf out[NQ][NV]) {
  if constexpr (W == 16) {
    partial<NQ, NV>(q, d, kt, lane, out);
  } else {
    vf b[NQ][NV];
    tree<NQ, NV, W * 2>(q, d, kt, lane, out);
    tree<NQ, NV, W * 2>(q, d, kt, lane + W, b);
#pragma GCC unroll 2
    for (int a = 0; a < NQ; a++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) out[a][v] = vadd(out[a][v], b[a][v]);
  }
}

// s[a][j] = q[a] . key[j] with keys transposed: kt[d][64].
template <int NQ>
static inline void scores_transposed(const float* q, int d, const float* kt, float* s) {
  for (int v = 0; v < kKeyBlock; v += 32) {
    vf r[NQ][2];
    tree<NQ, 2, 1>(q, d, kt + v, 0, r);
    for (int a = 0; a < NQ; a++) {
      vstore(s + a * kKeyBlock + v, r[a][0]);
      vstore(s + a * kKeyBlock + v + 16, r[a][1]);
    }
  }
}

// o[a] = o[a] * alpha[a] + sum over keys [j0, j1) of p[a][j] v[j]
template <int NQ, int NV>
static inline void values_tile(const float* p, const float* alpha, const float* v, int64_t stride, int j0, int j1, float* o, int dv, int d0) {
  vf acc[NQ][NV];
#pragma GCC unroll 4
  for (int a = 0; a < NQ; a++)
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++) acc[a][i] = vmul(vload(o + a * dv + d0 + 16 * i), vset(alpha[a]));
  for (int j = j0; j < j1; j++) {
    const float* row = v + j * stride + d0;
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++) {
      vf x = vload(row + 16 * i);
#pragma GCC unroll 4
      for (int a = 0; a < NQ; a++) acc[a][i] = vfma(vset(p[a * kKeyBlock + j]), x, acc[a][i]);
    }
  }
#pragma GCC unroll 4
  for (int a = 0; a < NQ; a++)
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++) vstore(o + a * dv + d0 + 16 * i, acc[a][i]);
}

template <int NQ>
static void values(const float* p, const float* alpha, const float* v, int64_t stride, int j0, int j1, float* o, int dv) {
  int d0 = 0;
  for (; d0 + 64 <= dv; d0 += 64) values_tile<NQ, 4>(p, alpha, v, stride, j0, j1, o, dv, d0);
  for (; d0 < dv; d0 += 16) values_tile<NQ, 1>(p, alpha, v, stride, j0, j1, o, dv, d0);
}

// Scores to probabilities over keys [lo, hi) of the block; the sum and maximum updated.
static inline float softmax_step(float* s, int lo, int hi, float& m, float& l) {
  vf x[4], top = vset(-INFINITY);
  for (int i = 0; i < 4; i++) {
    x[i] = vkeep(vload(s + 16 * i), lo - 16 * i, hi - 16 * i, -INFINITY);
    top = vmax(top, x[i]);
  }
  const float now = vmaxlane(top), next = m > now ? m : now;
  vf sum = vzero();
  for (int i = 0; i < 4; i++) {
    vf e = vkeep(vexp(vsub(x[i], vset(next))), lo - 16 * i, hi - 16 * i, 0.f);
    vstore(s + 16 * i, e);
    sum = vadd(sum, e);
  }
  const float alpha = sexp(m - next);
  l = __builtin_fmaf(l, alpha, vsum(sum));
  m = next;
  return alpha;
}

// Vectors of n positions as floats: where they lie, or decoded into `buffer`.
struct Floats {
  const float* p;
  int64_t stride;
  Floats(const Line& line, const char* src, int64_t bytes, int n, float* buffer) : p(buffer), stride(line.dim) {
    if (!line.bits && line.type == Type::f32) {
      p = (const float*)src, stride = bytes / 4;
      return;
    }
    for (int j = 0; j < n; j++) decode_line(line, src + j * bytes, buffer + j * stride);
  }
};

// Keys of both lines side by side, d floats apart.
static inline void side_by_side(const AttentionTask& t, int d, int j0, int n, float* out) {
  for (int j = j0; j < j0 + n; j++, out += d) {
    decode_line(t.k_line, t.k + j * t.k_stride, out);
    decode_line(t.v_line, t.v + j * t.v_stride, out + t.k_line.dim);
  }
}

static void attention(const AttentionTask& t) {
  constexpr int kTile = 4;
  const int d = t.key_dim(), dv = t.value_dim();
  float* kt = t.scratch;
  float* kf = kt + kKeyBlock * d;
  float* vf32 = kf + kKeyBlock * d;
  float* s = vf32 + kKeyBlock * dv;
  float* part = s + kTile * kKeyBlock;
  const bool many = t.nq > 8;
  for (int a = 0; a < t.nq; a++) {
    t.m[a] = -INFINITY;
    t.l[a] = 0.f;
    memset(t.o + int64_t(a) * dv, 0, size_t(dv) * 4);
  }
  auto first = [&](int a) { return t.window > 0 && t.pos[a] + 1 > t.window ? t.pos[a] + 1 - t.window : 0; };
  for (int j0 = t.begin; j0 < t.end; j0 += kKeyBlock) {
    const int n = t.end - j0 < kKeyBlock ? t.end - j0 : kKeyBlock;
    bool seen = false;
    for (int a = 0; a < t.nq && !seen; a++) seen = t.pos[a] >= j0 && first(a) < j0 + n;
    if (!seen) continue;
    const float *k = kf, *v = kf;
    int64_t ks = d, vs = d;
    if (t.latent) {
      side_by_side(t, d, j0, n, kf);
    } else {
      const Floats keys(t.k_line, t.k + j0 * t.k_stride, t.k_stride, n, kf);
      const Floats vals(t.v_line, t.v + j0 * t.v_stride, t.v_stride, n, vf32);
      k = keys.p, ks = keys.stride;
      v = vals.p, vs = vals.stride;
    }
    if (many) {
      if (n % 16) {  // whole vectors are transposed: pad the last one
        if (k != kf) {
          for (int j = 0; j < n; j++) memcpy(kf + j * d, k + j * ks, size_t(d) * 4);
          k = kf, ks = d;
        }
        memset(kf + n * d, 0, size_t(16 - n % 16) * d * 4);
      }
      for (int j = 0; j < kKeyBlock; j += 16)
        for (int i = 0; i < d; i += 16) {
          if (j < n) transpose16(k + j * ks + i, ks, kt + i * kKeyBlock + j, kKeyBlock);
          else
            for (int l = 0; l < 16; l++) vstore(kt + (i + l) * kKeyBlock + j, vzero());
        }
    }
    for (int a0 = 0; a0 < t.nq; a0 += kTile) {
      const int na = t.nq - a0 < kTile ? t.nq - a0 : kTile;
      int lo[kTile], hi[kTile];
      float alpha[kTile];
      bool whole = true, any = false;
      for (int a = 0; a < na; a++) {
        int f = first(a0 + a) - j0, e = t.pos[a0 + a] + 1 - j0;
        lo[a] = f > 0 ? f : 0;
        hi[a] = e < n ? e : n;
        any = any || lo[a] < hi[a];
        whole = whole && lo[a] == lo[0] && hi[a] == hi[0];
      }
      if (!any) continue;
      const float* q = t.q + int64_t(a0) * d;
      if (many) {
        int a = 0;
        for (; a + 2 <= na; a += 2) scores_transposed<2>(q + a * d, d, kt, s + a * kKeyBlock);
        if (a < na) scores_transposed<1>(q + a * d, d, kt, s + a * kKeyBlock);
      } else {
        for (int a = 0; a < na; a++) {
          if (lo[a] < hi[a]) scores_in_place(q + a * d, d, k, ks, hi[a], s + a * kKeyBlock, part);
        }
      }
      for (int a = 0; a < na; a++) {
        if (lo[a] < hi[a]) alpha[a] = softmax_step(s + a * kKeyBlock, lo[a], hi[a], t.m[a0 + a], t.l[a0 + a]);
      }
      float* o = t.o + int64_t(a0) * dv;
      if (whole && na == 4) {
        values<4>(s, alpha, v, vs, lo[0], hi[0], o, dv);
      } else if (whole && na == 3) {
        values<3>(s, alpha, v, vs, lo[0], hi[0], o, dv);
      } else if (whole && na == 2) {
        values<2>(s, alpha, v, vs, lo[0], hi[0], o, dv);
      } else {
        // A key that one query may not see must not reach it even as 0 * NaN.
        for (int a = 0; a < na; a++) {
          if (lo[a] < hi[a]) values<1>(s + a * kKeyBlock, alpha + a, v, vs, lo[a], hi[a], o + a * dv, dv);
        }
      }
    }
  }
}

static void attention_merge(float* o, float* m, float* l, const float* o2, const float* m2, const float* l2, int nq, int dv) {
  for (int a = 0; a < nq; a++, o += dv, o2 += dv) {
    if (m2[a] == -INFINITY && l2[a] == 0.f) continue;
    if (m[a] == -INFINITY && l[a] == 0.f) {
      m[a] = m2[a], l[a] = l2[a];
      memcpy(o, o2, size_t(dv) * 4);
      continue;
    }
    const float top = m[a] > m2[a] ? m[a] : m2[a], x = sexp(m[a] - top), y = sexp(m2[a] - top);
    m[a] = top;
    l[a] = __builtin_fmaf(l[a], x, l2[a] * y);
    for (int d = 0; d < dv; d += 16) vstore(o + d, vfma(vload(o + d), vset(x), vmul(vload(o2 + d), vset(y))));
  }
}

static void attention_finish(float* o, const float* m, const float* l, const float* sink, int nq, int dv) {
  for (int a = 0; a < nq; a++, o += dv) {
    float r;
    if (sink) {
      // The sink is one more key with no value.
      const float top = m[a] > sink[a] ? m[a] : sink[a], x = sexp(m[a] - top);
      r = x / __builtin_fmaf(l[a], x, sexp(sink[a] - top));
    } else {
      r = 1.f / l[a];
    }
    for (int d = 0; d < dv; d += 16) vstore(o + d, vmul(vload(o + d), vset(r)));
  }
}

}  // namespace MS_NS
