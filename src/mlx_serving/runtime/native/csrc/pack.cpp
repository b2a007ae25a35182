// Packing of weights at load: see Weight for the layout.
#include <cstring>
#include <stdexcept>

#include "primitives.h"

namespace ms {
namespace {
Type type_of(const mx::array& a) {
  if (a.dtype() == mx::float32) return Type::f32;
  if (a.dtype() == mx::float16) return Type::f16;
  if (a.dtype() == mx::bfloat16) return Type::bf16;
  throw std::invalid_argument("native: expected float32, float16 or bfloat16");
}

mx::array ready(const mx::array& a) {
  // Evaluated where it already lives: a scheduler thread has no stream to wait on.
  mx::array c = mx::contiguous(a, false, mx::Device(mx::Device::cpu));
  c.eval();
  return c;
}

mx::array bytes_array(size_t bytes) {
  mx::array a(mx::Shape{int(0)}, mx::uint8, nullptr, {});
  if (bytes > size_t(INT32_MAX)) {
    // MLX's shapes are 32-bit: rows of 4096 bytes hold what one axis cannot.
    const size_t rows = (bytes + 4095) / 4096;
    a = mx::array(mx::Shape{int(rows), 4096}, mx::uint8, nullptr, {});
    bytes = rows * 4096;
  } else {
    a = mx::array(mx::Shape{int(bytes)}, mx::uint8, nullptr, {});
  }
  a.set_data(mx::allocator::malloc(bytes));
  a.set_status(mx::array::Status::available);
  return a;
}

bool survives(Type t, const std::vector<float>& v) {
  const Kernels& k = kernels();
  std::vector<uint16_t> h(4096);
  std::vector<float> back(4096);
  for (size_t i = 0; i < v.size(); i += 4096) {
    const int64_t n = std::min<size_t>(4096, v.size() - i);
    k.from_float(t, v.data() + i, h.data(), n);
    k.to_float(t, h.data(), 1, back.data(), n);
    if (memcmp(back.data(), v.data() + i, size_t(n) * 4) != 0) return false;
  }
  return true;
}

std::vector<float> floats(const mx::array& a) {
  std::vector<float> v(a.size());
  kernels().to_float(type_of(a), a.data<void>(), 1, v.data(), int64_t(a.size()));
  return v;
}
}  // namespace

PackedPtr Packed::quantized(const mx::array& w_, const mx::array& scales_, const mx::array& biases_, int group, int bits) {
  if (bits != 4 && bits != 8) throw std::invalid_argument("native: 4 or 8 bits");
  if (group != 32 && group != 64 && group != 128) throw std::invalid_argument("native: group size 32, 64 or 128");
  if (w_.ndim() != 2 || w_.dtype() != mx::uint32) throw std::invalid_argument("native: weights must be [n, words] uint32");
  const int n = w_.shape(0), k = w_.shape(1) * 32 / bits, groups = k / group;
  const mx::Shape expected{n, groups};
  if (groups * group != k || scales_.shape() != expected || biases_.shape() != expected) {
    throw std::invalid_argument("native: scales and biases must be [n, k / group_size]");
  }
  const mx::array w = ready(w_), scales = ready(scales_), biases = ready(biases_);
  const std::vector<float> s = floats(scales), b = floats(biases);
  Weight meta;
  meta.n = n, meta.k = k, meta.bits = bits, meta.group = group;
  // Half precision where it loses nothing: fewer bytes to read for the same values.
  meta.scale_type = Type::f32;
  for (Type t : {Type::f16, Type::bf16}) {
    if (survives(t, s) && survives(t, b)) {
      meta.scale_type = t;
      break;
    }
  }
  mx::array data = bytes_array(meta.bytes());
  uint8_t* out = data.data<uint8_t>();
  memset(out, 0, meta.bytes());
  const uint8_t* codes = w.data<uint8_t>();
  const size_t row_bytes = size_t(k) * bits / 8;
  const int es = size_of(meta.scale_type);
  const Kernels& kern = kernels();
  parallel_rows(meta.blocks(), int64_t(n) * k, [&](int b0, int b1) {
    for (int block = b0; block < b1; block++) {
      for (int g = 0; g < groups; g++) {
        uint8_t* p = out + block * meta.block_bytes() + g * meta.group_bytes();
        uint8_t* q = p + 2 * kLanes * es;
        for (int c = 0; c < kLanes && block * kLanes + c < n; c++) {
          const size_t row = size_t(block) * kLanes + c;
          kern.from_float(meta.scale_type, &s[row * groups + g], p + c * es, 1);
          kern.from_float(meta.scale_type, &b[row * groups + g], p + (kLanes + c) * es, 1);
          const uint8_t* src = codes + row * row_bytes + size_t(g) * group * bits / 8;
          if (bits == 8) {
            for (int i = 0; i < group; i += 4) memcpy(q + i / 4 * 64 + c * 4, src + i, 4);
          } else {
            // MLX keeps inputs 2i, 2i + 1 in byte i; here i and i + 4 of each 8 share one.
            for (int i = 0; i < group; i += 8) {
              uint8_t v[8];
              for (int j = 0; j < 4; j++) v[2 * j] = src[i / 2 + j] & 15, v[2 * j + 1] = src[i / 2 + j] >> 4;
              for (int j = 0; j < 4; j++) q[i / 8 * 64 + c * 4 + j] = uint8_t(v[j] | v[j + 4] << 4);
            }
          }
        }
      }
    }
  });
  return std::make_shared<Packed>(meta, data);
}

PackedPtr Packed::dense(const mx::array& w_) {
  if (w_.ndim() != 2) throw std::invalid_argument("native: weights must be [n, k]");
  const mx::array w = ready(w_);
  Weight meta;
  meta.n = w.shape(0), meta.k = w.shape(1);
  meta.scale_type = type_of(w);
  meta.bits = 8 * size_of(meta.scale_type);
  mx::array data = bytes_array(meta.bytes());
  uint8_t* out = data.data<uint8_t>();
  memset(out, 0, meta.bytes());
  const uint8_t* src = w.data<uint8_t>();
  const size_t es = size_of(meta.scale_type);
  parallel_rows(meta.blocks(), int64_t(meta.n) * meta.k, [&](int b0, int b1) {
    for (int block = b0; block < b1; block++)
      for (int c = 0; c < kLanes && block * kLanes + c < meta.n; c++)
        for (int i = 0; i < meta.k; i++) {
          memcpy(out + block * meta.block_bytes() + (size_t(i) * kLanes + c) * es, src + ((size_t(block) * kLanes + c) * meta.k + i) * es, es);
        }
  });
  return std::make_shared<Packed>(meta, data);
}

PackedPtr Packed::slice(int start, int stop) const {
  if (start < 0 || start >= stop || stop > meta_.n || start % kLanes) {
    throw std::invalid_argument("native: a slice of outputs starts at a multiple of 16");
  }
  auto p = std::make_shared<Packed>(*this);
  p->meta_.n = stop - start;
  p->offset_ = offset_ + size_t(start / kLanes) * meta_.block_bytes();
  return p;
}

}  // namespace ms
