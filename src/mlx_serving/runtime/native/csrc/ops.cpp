#include "ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace ms {

void Prepared::reset(const float* x, int rows, const Weight& w, Mode mode) {
  mode_ = mode;
  needed_ = w.integers();
  a_ = {};
  a_.x = x;
  a_.k = w.k;
  a_.group = w.group;
  if (!needed_) return;
  const size_t values = size_t(rows) * w.k, groups = size_t(rows) * w.groups();
  a_.scale = scale_.get<float>(groups);
  a_.sum = sum_.get<float>(groups);
  if (mode != Mode::f32) a_.hi = hi_.get<int8_t>(values);
  if (mode == Mode::exact) a_.lo = lo_.get<int8_t>(values);
}

void Prepared::rows(int row0, int row1) {
  if (needed_) kernels().quantize(a_, mode_, row0, row1);
}

void Prepared::all(int rows) {
  if (!needed_) return;
  parallel_rows(rows, int64_t(rows) * a_.k, [&](int r0, int r1) { this->rows(r0, r1); });
}

namespace {
// Weight blocks and rows of one task: rows enough to reuse the weights from
// the first-level cache, blocks few enough to keep the rows in the second.
struct Grid {
  int row_chunk, block_chunk, row_tasks, block_tasks;
  Grid(const Weight& w, int rows, int threads) {
    row_chunk = rows <= 96 ? rows : 64;
    row_tasks = (rows + row_chunk - 1) / row_chunk;
    const int blocks = w.blocks();
    const int tasks = threads <= 1 ? 1 : std::max(1, threads * 6 / row_tasks);
    block_chunk = std::clamp((blocks + tasks - 1) / tasks, 1, 64);
    // Small tasks cost more to claim than to compute.
    const int64_t per_block = int64_t(w.block_bytes()) * row_chunk;
    while (int64_t(block_chunk) * per_block < 8192 && block_chunk < blocks) block_chunk++;
    block_tasks = (blocks + block_chunk - 1) / block_chunk;
  }
  int tasks() const { return row_tasks * block_tasks; }
};
}  // namespace

void matmul(const Weight& w, const Activations& a, Mode mode, int rows, float* out, int64_t ld) {
  const Kernels& k = kernels();
  Pool& pool = Pool::get();
  const Grid g(w, rows, pool.threads());
  pool.run(g.tasks(), [&](int t) {
    const int r = t % g.row_tasks * g.row_chunk, b = t / g.row_tasks * g.block_chunk;
    k.matmul(w, a, mode, b, std::min(w.blocks(), b + g.block_chunk), r, std::min(rows, r + g.row_chunk), out, ld);
  });
}

void gated_matmul(const Weight& gate, const Weight& up, const Activations& a, Mode mode, Act act, int rows, float* out) {
  const Kernels& k = kernels();
  Pool& pool = Pool::get();
  const Grid g(gate, rows, pool.threads());
  pool.run(g.tasks(), [&](int t) {
    thread_local Buffer tile;
    const int r0 = t % g.row_tasks * g.row_chunk, r1 = std::min(rows, r0 + g.row_chunk);
    const int b0 = t / g.row_tasks * g.block_chunk, b1 = std::min(gate.blocks(), b0 + g.block_chunk);
    const int c0 = b0 * kLanes, width = std::min(gate.n, b1 * kLanes) - c0, ld = (b1 - b0) * kLanes;
    float* x = tile.get(size_t(2) * ld * (r1 - r0));
    float* y = x + size_t(ld) * (r1 - r0);
    // The kernels index outputs by absolute row and column.
    const int64_t shift = int64_t(r0) * ld + c0;
    k.matmul(gate, a, mode, b0, b1, r0, r1, x - shift, ld);
    k.matmul(up, a, mode, b0, b1, r0, r1, y - shift, ld);
    for (int r = r0; r < r1; r++) {
      const int64_t i = int64_t(r - r0) * ld;
      k.act_mul(act, x + i, y + i, out + int64_t(r) * gate.n + c0, width);
    }
  });
}

void gathered_matmul(const Weight& w, int n, const Activations& a, Mode mode, const std::vector<int>& begin, float* out) {
  struct Task {
    int expert, block0, block1;
  };
  const Kernels& k = kernels();
  Pool& pool = Pool::get();
  Weight one = w;
  one.n = n;
  const int experts = int(begin.size()) - 1;
  thread_local std::vector<Task> mine;
  mine.clear();
  int active = 0;
  for (int e = 0; e < experts; e++) active += begin[e] < begin[e + 1];
  // Enough tasks for all threads, however few experts were chosen.
  const int parts = std::max(1, pool.threads() * 4 / std::max(1, active));
  const int chunk = std::clamp((one.blocks() + parts - 1) / parts, 1, 64);
  for (int e = 0; e < experts; e++) {
    if (begin[e] == begin[e + 1]) continue;
    for (int b = 0; b < one.blocks(); b += chunk) mine.push_back({e, b, std::min(one.blocks(), b + chunk)});
  }
  const Task* tasks = mine.data();
  pool.run(int(mine.size()), [&, tasks](int i) {
    const Task& t = tasks[i];
    Weight expert = one;
    expert.data = w.data + size_t(t.expert) * one.bytes();
    k.matmul(expert, a, mode, t.block0, t.block1, begin[t.expert], begin[t.expert + 1], out, n);
  });
}

RopeTable::RopeTable(std::vector<double> inv_freq, bool traditional, double magnitude)
    : inv_freq_(std::move(inv_freq)), traditional_(traditional), magnitude_(magnitude), chunks_(new std::unique_ptr<float[]>[kSpine]) {}

void RopeTable::ensure(int64_t positions) {
  std::lock_guard<std::mutex> lock(mu_);
  if (positions > kSpine * kChunk) throw std::out_of_range("rope: position beyond the table's limit");
  const int64_t h = int64_t(inv_freq_.size());
  for (; made_ * kChunk < positions; made_++) {
    std::unique_ptr<float[]> chunk(new float[kChunk * width()]);
    for (int64_t p = 0; p < kChunk; p++) {
      float* t = chunk.get() + p * width();
      for (int64_t i = 0; i < h; i++) {
        const double angle = double(made_ * kChunk + p) * inv_freq_[i];
        const float c = float(std::cos(angle) * magnitude_), s = float(std::sin(angle) * magnitude_);
        if (traditional_) {
          t[2 * i] = t[2 * i + 1] = c;
          t[2 * h + 2 * i] = -s;
          t[2 * h + 2 * i + 1] = s;
        } else {
          t[i] = c;
          t[h + i] = s;
        }
      }
    }
    chunks_[made_] = std::move(chunk);
  }
}

void check(const Batch& b, const Slab& s) {
  for (int i = 0; i < b.count; i++) {
    if (b.rows[i] < 0 || b.rows[i] >= s.rows) throw std::out_of_range("native: slab row out of range");
    if (b.offsets[i] < 0 || int64_t(b.offsets[i]) + b.length > s.capacity) {
      throw std::out_of_range("native: position beyond the slab's capacity");
    }
  }
}

namespace {
struct Partial {
  float *o, *m, *l;
  Partial(float* p, int nq, int dv) : o(p), m(p + size_t(nq) * dv), l(m + nq) {}
  static size_t size(int nq, int dv) { return size_t(nq) * dv + 2 * size_t(nq) + 32; }
};

// Queries [l0, l1) of batch row b that share KV head h.
struct QueryBlock {
  int b, h, l0, l1;
};
}  // namespace

void attention(const float* q, const Slab& k, const Slab& v, const Batch& batch, const AttentionParams& p, float* out) {
  const Kernels& kern = kernels();
  Pool& pool = Pool::get();
  const int kv = k.heads, group = p.heads / kv, d = p.key_dim(k, v), dv = p.value_dim(k, v), length = batch.length;
  const int per_block = std::max(1, std::min(length, 64 / group));
  const int blocks = (length + per_block - 1) / per_block;

  auto query_block = [&](int t) {
    QueryBlock qb;
    // Later queries see more keys: they go first, so that the last task is short.
    const int i = blocks - 1 - t / (batch.count * kv);
    qb.h = t % kv;
    qb.b = t / kv % batch.count;
    qb.l0 = i * per_block;
    qb.l1 = std::min(length, qb.l0 + per_block);
    return qb;
  };
  auto key_range = [&](const QueryBlock& qb, int& first, int& last) {
    const int pos0 = batch.offsets[qb.b] + qb.l0;
    last = batch.offsets[qb.b] + qb.l1;
    first = p.window > 0 ? std::max(0, pos0 + 1 - p.window) / kKeySplit : 0;
  };
  // Partial result of one split into `part`; scratch holds the queries too.
  auto compute = [&](const QueryBlock& qb, int split, int end, const Partial& part, float* scratch) {
    const int nq = (qb.l1 - qb.l0) * group;
    float* qs = scratch;
    int32_t* pos = reinterpret_cast<int32_t*>(qs + size_t(nq) * d);
    for (int l = qb.l0, i = 0; l < qb.l1; l++, i += group) {
      const float* src = q + ((int64_t(qb.b) * length + l) * p.heads + qb.h * group) * d;
      kern.scale(src, p.scale, qs + size_t(i) * d, int64_t(group) * d);
      for (int g = 0; g < group; g++) pos[i + g] = batch.offsets[qb.b] + l;
    }
    AttentionTask t;
    t.q = qs;
    t.pos = pos;
    t.nq = nq;
    t.k = k.at(batch.rows[qb.b], qb.h, 0);
    t.v = v.at(batch.rows[qb.b], qb.h, 0);
    t.k_stride = k.pos_stride, t.v_stride = v.pos_stride;
    t.k_line = k.line, t.v_line = v.line;
    t.latent = p.latent;
    t.window = p.window;
    t.begin = split * kKeySplit;
    t.end = std::min(end, (split + 1) * kKeySplit);
    t.o = part.o, t.m = part.m, t.l = part.l;
    t.scratch = qs + ((size_t(nq) * (d + 1) + 15) & ~size_t(15));
    kern.attention(t);
  };
  auto scratch_size = [&](int nq) { return size_t(nq) * (d + 1) + 64 + attention_scratch(d, dv); };
  auto finish = [&](const QueryBlock& qb, const Partial& part) {
    for (int l = qb.l0, i = 0; l < qb.l1; l++, i += group) {
      kern.attention_finish(part.o + size_t(i) * dv, part.m + i, part.l + i, p.sinks ? p.sinks + qb.h * group : nullptr, group, dv);
    }
    for (int l = qb.l0, i = 0; l < qb.l1; l++, i += group) {
      memcpy(out + ((int64_t(qb.b) * length + l) * p.heads + qb.h * group) * dv, part.o + size_t(i) * dv, size_t(group) * dv * 4);
    }
  };

  const int tasks = blocks * batch.count * kv, nq_max = per_block * group;
  // Few heads and a long context: the splits are the tasks. Either way they
  // are merged in ascending order.
  int64_t splits = 0;
  if (tasks < pool.threads() * 4) {
    for (int t = 0; t < tasks; t++) {
      int first, last;
      key_range(query_block(t), first, last);
      splits += (last + kKeySplit - 1) / kKeySplit - first;
    }
  }
  if (splits > tasks && splits <= kMaxTasks) {
    struct Item {
      QueryBlock qb;
      int split, end, first, last_split;
    };
    thread_local std::vector<Item> items;
    items.clear();
    for (int t = 0; t < tasks; t++) {
      const QueryBlock qb = query_block(t);
      int first, last;
      key_range(qb, first, last);
      for (int s = first; s * kKeySplit < last; s++) items.push_back({qb, s, last, first, (last + kKeySplit - 1) / kKeySplit});
    }
    thread_local Buffer partials;
    const size_t ps = Partial::size(nq_max, dv);
    float* base = partials.get(ps * items.size());
    const Item* it = items.data();
    pool.run(int(items.size()), [&, it](int i) {
      thread_local Buffer scratch;
      compute(it[i].qb, it[i].split, it[i].end, Partial(base + ps * i, nq_max, dv), scratch.get(scratch_size(nq_max)));
    });
    for (size_t i = 0; i < items.size();) {
      const Partial sum(base + ps * i, nq_max, dv);
      const int nq = (items[i].qb.l1 - items[i].qb.l0) * group;
      const QueryBlock qb = items[i].qb;
      const int n = items[i].last_split - items[i].first;
      for (int s = 1; s < n; s++) {
        const Partial next(base + ps * (i + s), nq_max, dv);
        kern.attention_merge(sum.o, sum.m, sum.l, next.o, next.m, next.l, nq, dv);
      }
      finish(qb, sum);
      i += n;
    }
    return;
  }
  pool.run(tasks, [&](int t) {
    thread_local Buffer scratch;
    const QueryBlock qb = query_block(t);
    const int nq = (qb.l1 - qb.l0) * group;
    const size_t ps = (Partial::size(nq_max, dv) + 15) & ~size_t(15);
    float* base = scratch.get(2 * ps + scratch_size(nq_max));
    const Partial sum(base, nq_max, dv), next(base + ps, nq_max, dv);
    int first, last;
    key_range(qb, first, last);
    for (int s = first; s * kKeySplit < last; s++) {
      compute(qb, s, last, s == first ? sum : next, base + 2 * ps);
      if (s > first) kern.attention_merge(sum.o, sum.m, sum.l, next.o, next.m, next.l, nq, dv);
    }
    finish(qb, sum);
  });
}

}  // namespace ms
