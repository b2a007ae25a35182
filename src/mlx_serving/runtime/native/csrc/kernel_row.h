// Kernels over one row: norm, rope, gated activation.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace MS_NS {
using namespace ms;

static void rms_norm(float* x, const float* add, const float* w, float eps, float* out, int k) {
  vf t = vzero();
  for (int i = 0; i < k; i += 16) {
    vf v = vload_n(x + i, k - i);
    if (add) {
      v = vadd(v, vload_n(add + i, k - i));
      vstore_n(x + i, v, k - i);
    }
    t = vfma(v, v, t);
  }
  vf s = vset(1.f / __builtin_sqrtf(vsum(t) / float(k) + eps));
  for (int i = 0; i < k; i += 16) {
    vf v = vmul(vload_n(x + i, k - i), s);
    if (w) v = vmul(v, vload_n(w + i, k - i));
    vstore_n(out + i, v, k - i);
  }
}

static void rope(float* x, const float* table, int dims, bool traditional) {
  if (traditional) {
    // table: dims cosines (each twice), dims sines (negated at even places).
    for (int i = 0; i < dims; i += 16) {
      vf v = vload_n(x + i, dims - i);
      vf r = vmul(vswap_pairs(v), vload_n(table + dims + i, dims - i));
      vstore_n(x + i, vfma(v, vload_n(table + i, dims - i), r), dims - i);
    }
    return;
  }
  const int h = dims / 2;  // table: h cosines, h sines
  for (int i = 0; i < h; i += 16) {
    vf a = vload_n(x + i, h - i), b = vload_n(x + h + i, h - i);
    vf c = vload_n(table + i, h - i), s = vload_n(table + h + i, h - i);
    vstore_n(x + i, vfnma(b, s, vmul(a, c)), h - i);
    vstore_n(x + h + i, vfma(a, s, vmul(b, c)), h - i);
  }
}

static inline vf sigmoid(vf x) { return vdiv(vset(1.f), vadd(vset(1.f), vexp(vsub(vzero(), x)))); }

static void act_mul(Act act, const float* gate, const float* up, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const int m = n - i < 16 ? int(n - i) : 16;
    vf g = vload_n(gate + i, m), u = vload_n(up + i, m), a;
    if (act == Act::silu) {
      a = vmul(g, sigmoid(g));
    } else if (act == Act::gelu_tanh) {
      // 0.5 (1 + tanh z) = sigmoid(2 z)
      vf z = vmul(vset(1.5957691216057308f), vmul(g, vfma(vmul(g, g), vset(0.044715f), vset(1.f))));
      a = vmul(g, sigmoid(z));
    } else {
      alignas(64) float t[16];
      vstore(t, g);
      for (int j = 0; j < 16; j++) t[j] = 0.5f * t[j] * (1.f + erff(t[j] * 0.70710678118654752f));
      a = vload(t);
    }
    vstore_n(out + i, vmul(a, u), m);
  }
}

static void add(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const int m = n - i < 16 ? int(n - i) : 16;
    vstore_n(x + i, vadd(vload_n(x + i, m), vload_n(y + i, m)), m);
  }
}

static void scale(const float* x, float s, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const int m = n - i < 16 ? int(n - i) : 16;
    vstore_n(out + i, vmul(vload_n(x + i, m), vset(s)), m);
  }
}

}  // namespace MS_NS
