// The kernels over whole matrices and batches, spread over the pool. No MLX here.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "kernels.h"

namespace ms {

// Growing aligned memory; contents do not survive a larger get().
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(p_); }
  template <class T = float>
  T* get(size_t count) {
    const size_t bytes = count * sizeof(T) + 64;
    if (bytes > size_) {
      std::free(p_);
      size_ = (bytes + 4095) & ~size_t(4095);
      p_ = std::aligned_alloc(4096, size_);
      if (!p_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return static_cast<T*>(p_);
  }

 private:
  void* p_ = nullptr;
  size_t size_ = 0;
};

// Owns the planes, scales and sums of one matmul's input.
class Prepared {
 public:
  // x: [rows, w.k] floats, kept by reference.
  void reset(const float* x, int rows, const Weight& w, Mode mode);
  void rows(int row0, int row1);  // prepares these rows; any thread
  void all(int rows);             // prepares all, in parallel if there are many
  const Activations& view() const { return a_; }

 private:
  Activations a_;
  Mode mode_ = Mode::exact;
  bool needed_ = false;
  Buffer hi_, lo_, scale_, sum_;
};

// out[rows, ld] = a @ w.T
void matmul(const Weight& w, const Activations& a, Mode mode, int rows, float* out, int64_t ld);
// out[rows, n] = act(a @ gate.T) * (a @ up.T)
void gated_matmul(const Weight& gate, const Weight& up, const Activations& a, Mode mode, Act act, int rows, float* out);

// out[rows, n]: rows [begin[e], begin[e + 1]) times outputs [e * n, (e + 1) * n) of w.
void gathered_matmul(const Weight& w, int n, const Activations& a, Mode mode, const std::vector<int>& begin, float* out);

// f(row0, row1) over [0, rows) in chunks; on the caller alone when `work` (floats) is small.
template <class F>
void parallel_rows(int rows, int64_t work, F&& f);

// cos and sin of every position, computed in double when first needed.
class RopeTable {
 public:
  RopeTable(std::vector<double> inv_freq, bool traditional, double magnitude);
  int dims() const { return 2 * int(inv_freq_.size()); }
  bool traditional() const { return traditional_; }
  void ensure(int64_t positions);  // before row(), for positions below this
  const float* row(int64_t pos) const { return chunks_[pos / kChunk].get() + (pos % kChunk) * width(); }

 private:
  static constexpr int64_t kChunk = 512;
  int64_t width() const { return int64_t(inv_freq_.size()) * (traditional_ ? 4 : 2); }
  std::vector<double> inv_freq_;
  bool traditional_;
  double magnitude_;
  std::mutex mu_;
  // A fixed spine, so that readers need no lock while another thread appends.
  std::unique_ptr<std::unique_ptr<float[]>[]> chunks_;
  int64_t made_ = 0;
  static constexpr int64_t kSpine = 1 << 14;  // 8 Mi positions
};

// One layer's slab of keys or values: a line for each of [rows, heads, capacity].
struct Slab {
  char* data = nullptr;
  Line line;
  int rows = 0, heads = 0, capacity = 0;
  int64_t row_stride = 0, head_stride = 0, pos_stride = 0;  // bytes
  char* at(int64_t row, int64_t head, int64_t pos) const { return data + row * row_stride + head * head_stride + pos * pos_stride; }
};

// Query i of batch row b stands at position offsets[b] + i of slab row rows[b].
struct Batch {
  const int32_t* rows;
  const int32_t* offsets;
  int count, length;
};
// Throws std::out_of_range if a row or position is outside the slab.
void check(const Batch& b, const Slab& s);

struct AttentionParams {
  int heads;
  float scale;
  int window;          // 0: none
  const float* sinks;  // [heads] or null
  bool latent = false; // a key is k's and v's lines side by side, and its value is k's
  int key_dim(const Slab& k, const Slab& v) const { return latent ? k.line.dim + v.line.dim : k.line.dim; }
  int value_dim(const Slab& k, const Slab& v) const { return latent ? k.line.dim : v.line.dim; }
};
// q: [count, length, heads, key_dim] -> out: [count, length, heads, value_dim]
void attention(const float* q, const Slab& k, const Slab& v, const Batch& b, const AttentionParams& p, float* out);

}  // namespace ms

#include "pool.h"

namespace ms {
template <class F>
void parallel_rows(int rows, int64_t work, F&& f) {
  const int threads = Pool::get().threads();
  if (threads <= 1 || work < 16384 || rows < 2) {
    f(0, rows);
    return;
  }
  const int chunk = std::max(1, rows / (threads * 4)), n = (rows + chunk - 1) / chunk;
  Pool::get().run(n, [&](int i) { f(i * chunk, std::min(rows, (i + 1) * chunk)); });
}
}  // namespace ms
