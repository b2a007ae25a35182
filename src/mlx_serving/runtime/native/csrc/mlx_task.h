// What MLX operations over the kernels share: views of arrays, and tasks on the CPU's stream.
#pragma once
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "ops.h"

namespace ms {
namespace mx = mlx::core;

inline mx::Stream cpu() { return mx::default_stream(mx::Device(mx::Device::cpu)); }

inline Type type_of(mx::Dtype d) {
  if (d == mx::float32) return Type::f32;
  if (d == mx::float16) return Type::f16;
  if (d == mx::bfloat16) return Type::bf16;
  throw std::invalid_argument("native: expected float32, float16 or bfloat16");
}

// The rows (last axis) of an array of any strides, as floats.
struct View {
  const char* p;
  Type type;
  std::vector<int64_t> shape, stride;
  int64_t rows = 1;
  int k;
  bool plain = true;  // row-contiguous

  explicit View(const mx::array& a, std::vector<int> axes = {}) : p(a.data<char>()), type(type_of(a.dtype())) {
    if (axes.empty()) {
      for (int i = 0; i < int(a.ndim()); i++) axes.push_back(i);
    }
    for (int i : axes) {
      shape.push_back(a.shape(i));
      stride.push_back(a.strides(i));
    }
    k = int(shape.back());
    int64_t expected = 1;
    for (int i = int(shape.size()) - 1; i >= 0; i--) {
      if (shape[i] != 1 && stride[i] != expected) plain = false;
      expected *= shape[i];
      if (i + 1 < int(shape.size())) rows *= shape[i];
    }
  }
  const char* row(int64_t r) const {
    int64_t o = 0;
    for (int i = int(shape.size()) - 2; i >= 0; i--) {
      o += r % shape[i] * stride[i];
      r /= shape[i];
    }
    return p + o * size_of(type);
  }
  void read(int64_t r0, int64_t r1, float* dst) const {
    const Kernels& kern = kernels();
    for (int64_t r = r0; r < r1; r++) kern.to_float(type, row(r), stride.back(), dst + (r - r0) * k, k);
  }
  // In place if the floats lie ready, else through `buffer`.
  const float* floats(Buffer& buffer) const {
    if (plain && type == Type::f32) return reinterpret_cast<const float*>(p);
    float* dst = buffer.get(size_t(rows) * k);
    parallel_rows(int(rows), rows * k, [&](int r0, int r1) { read(r0, r1, dst + int64_t(r0) * k); });
    return dst;
  }
};

// Read when the task runs: before that the values may not have been computed.
struct Ints {
  const int32_t* p;
  size_t n;
  int64_t stride;
  explicit Ints(const mx::array& a) : p(a.data<int32_t>()), n(a.size()), stride(a.ndim() ? a.strides(-1) : 0) {}
  std::vector<int32_t> read() const {
    std::vector<int32_t> v(n);
    for (size_t i = 0; i < n; i++) v[i] = p[i * stride];
    return v;
  }
};

inline Slab slab_of(const mx::array& a, const Line& line) {
  if (a.ndim() != 4 || (a.strides(3) != 1 && a.shape(3) != 1)) throw std::invalid_argument("native: a slab is [rows, heads, capacity, dim]");
  Slab s;
  s.data = const_cast<char*>(a.data<char>());
  s.line = line;
  s.rows = a.shape(0), s.heads = a.shape(1), s.capacity = a.shape(2);
  const int64_t es = int64_t(a.itemsize());
  s.row_stride = a.strides(0) * es, s.head_stride = a.strides(1) * es, s.pos_stride = a.strides(2) * es;
  return s;
}

// The output takes the input's memory: a slab is handed over, not shared. MLX's
// own test for that (is_donatable) never holds here, since every output of a
// primitive keeps a reference to its inputs.
inline void take(const mx::array& in, mx::array& out, bool& copy) {
  copy = !in.flags().row_contiguous || in.data_size() != in.size();
  if (copy) out.set_data(mx::allocator::malloc(out.nbytes()));
  else out.copy_shared_buffer(in);
}

inline void copy_slab(const Slab& from, const Slab& to) {
  const size_t line = from.line.bytes();
  for (int r = 0; r < from.rows; r++)
    for (int h = 0; h < from.heads; h++) {
      if (from.pos_stride == int64_t(line)) memcpy(to.at(r, h, 0), from.at(r, h, 0), line * from.capacity);
      else
        for (int p = 0; p < from.capacity; p++) memcpy(to.at(r, h, p), from.at(r, h, p), line);
    }
}

class CpuPrimitive : public mx::Primitive {
 public:
  explicit CpuPrimitive(const char* name) : Primitive(cpu()), name_(name) {}
  const char* name() const override { return name_; }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("native: CPU only");
  }

 protected:
  template <class F>
  void dispatch(F&& f) {
    mx::cpu::get_command_encoder(stream()).dispatch(std::forward<F>(f));
  }

 private:
  const char* name_;
};

inline void allocate(mx::array& a) { a.set_data(mx::allocator::malloc(a.nbytes())); }

inline mx::array as(const mx::array& a, mx::Dtype d) { return a.dtype() == d ? a : mx::astype(a, d, cpu()); }
inline mx::array flat(const mx::array& a, mx::Dtype d) { return mx::contiguous(as(a, d), false, cpu()); }

inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("native: ") + what);
}

}  // namespace ms
