#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace ms {
namespace {
// Rows of the MLP worked on at once; bounds its scratch, which is the widest.
constexpr int kMlpRows = 512;

struct Scratch {
  Buffer h, qkv, q, att, r, gated;
  Prepared in, att_in, mlp_in, down_in;
};
}  // namespace

void decode(const DecoderSpec& d, float* x, const std::vector<Slab>& keys, const std::vector<Slab>& values, const Batch& b, float* out) {
  const Kernels& k = kernels();
  thread_local Scratch mine;
  Scratch& s = mine;  // named in a lambda, a thread_local would be the helper's own
  const int m = b.count * b.length, e = d.hidden, hd = d.head_dim, h = d.heads, kv = d.kv_heads;
  const int width = (h + 2 * kv) * hd, aw = h * hd;
  const int64_t row_work = int64_t(m) * e;
  float* hbuf = s.h.get(size_t(m) * e);
  float* qkv = s.qkv.get(size_t(m) * width);
  float* q = s.q.get(size_t(m) * aw);
  float* att = s.att.get(size_t(m) * aw);
  float* r = s.r.get(size_t(m) * e);
  int64_t last = 0;
  for (int i = 0; i < b.count; i++) last = std::max<int64_t>(last, b.offsets[i]);
  for (size_t l = 0; l < d.layers.size(); l++) {
    check(b, keys[l]);
    check(b, values[l]);
    d.layers[l].rope->ensure(last + b.length);
  }

  // x += norm(r) or r, then hbuf = norm(x), for rows [r0, r1).
  auto residual = [&](int r0, int r1, bool add, const float* post, const float* norm) {
    for (int i = r0; i < r1; i++) {
      float* ri = r + int64_t(i) * e;
      if (add && post) k.rms_norm(ri, nullptr, post, d.eps, ri, e);
      k.rms_norm(x + int64_t(i) * e, add ? ri : nullptr, norm, d.eps, hbuf + int64_t(i) * e, e);
    }
  };

  const float* post = nullptr;
  for (size_t li = 0; li < d.layers.size(); li++) {
    const LayerSpec& y = d.layers[li];
    s.in.reset(hbuf, m, y.qkv, d.mode);
    parallel_rows(m, row_work, [&](int r0, int r1) {
      residual(r0, r1, li > 0, post, y.in_norm);
      s.in.rows(r0, r1);
    });
    matmul(y.qkv, s.in.view(), d.mode, m, qkv, width);

    parallel_rows(m, int64_t(m) * width, [&](int r0, int r1) {
      for (int i = r0; i < r1; i++) {
        float* p = qkv + int64_t(i) * width;
        if (y.qkv_bias) k.add(p, y.qkv_bias, width);
        const int row = b.rows[i / b.length], pos = b.offsets[i / b.length] + i % b.length;
        const float* t = y.rope->row(pos);
        for (int j = 0; j < h + kv; j++) {
          float* v = p + j * hd;
          const float* norm = j < h ? y.q_norm : y.k_norm;
          if (norm) k.rms_norm(v, nullptr, norm, d.eps, v, hd);
          k.rope(v, t, y.rope->dims(), y.rope->traditional());
        }
        memcpy(q + int64_t(i) * aw, p, size_t(aw) * 4);
        for (int j = 0; j < kv; j++) {
          k.encode_line(keys[li].line, p + (h + j) * hd, keys[li].at(row, j, pos));
          k.encode_line(values[li].line, p + (h + kv + j) * hd, values[li].at(row, j, pos));
        }
      }
    });
    attention(q, keys[li], values[li], b, {h, d.scale, y.window, nullptr}, att);

    s.att_in.reset(att, m, y.o, d.mode);
    s.att_in.all(m);
    matmul(y.o, s.att_in.view(), d.mode, m, r, e);
    if (y.o_bias) {
      for (int i = 0; i < m; i++) k.add(r + int64_t(i) * e, y.o_bias, e);
    }

    s.mlp_in.reset(hbuf, m, y.gate, d.mode);
    parallel_rows(m, row_work, [&](int r0, int r1) {
      residual(r0, r1, true, y.post_attn_norm, y.mlp_norm);
      s.mlp_in.rows(r0, r1);
    });
    float* gated = s.gated.get(size_t(std::min(m, kMlpRows)) * d.intermediate);
    for (int i = 0; i < m; i += kMlpRows) {
      const int n = std::min(kMlpRows, m - i);
      Activations a = s.mlp_in.view();
      a.x += int64_t(i) * a.k;
      if (a.hi) a.hi += int64_t(i) * a.k;
      if (a.lo) a.lo += int64_t(i) * a.k;
      if (a.scale) {
        a.scale += int64_t(i) * (a.k / a.group);
        a.sum += int64_t(i) * (a.k / a.group);
      }
      gated_matmul(y.gate, y.up, a, d.mode, d.act, n, gated);
      s.down_in.reset(gated, n, y.down, d.mode);
      s.down_in.all(n);
      matmul(y.down, s.down_in.view(), d.mode, n, r + int64_t(i) * e, e);
    }
    post = y.post_mlp_norm;
  }
  parallel_rows(m, row_work, [&](int r0, int r1) { residual(r0, r1, !d.layers.empty(), post, d.final_norm); });
  memcpy(out, hbuf, size_t(m) * e * 4);
}

}  // namespace ms
