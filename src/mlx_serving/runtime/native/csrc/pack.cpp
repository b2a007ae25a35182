// Packing of weights at load: see Weight for the layout.
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "mlx_task.h"
#include "primitives.h"

namespace ms {
namespace {
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
  kernels().to_float(type_of(a.dtype()), a.data<void>(), 1, v.data(), int64_t(a.size()));
  return v;
}

// Codes of `bits` bits, lowest first, one after another.
void read_codes(const uint8_t* src, int64_t first, int count, int bits, uint8_t* out) {
  for (int i = 0; i < count; i++) {
    const int64_t bit = (first + i) * bits;
    unsigned word = src[bit / 8];
    if (bit % 8 + bits > 8) word |= unsigned(src[bit / 8 + 1]) << 8;
    out[i] = uint8_t(word >> (bit % 8) & ((1u << bits) - 1));
  }
}

// One column's codes of one group into their places among the 16 columns'.
void place_codes(const uint8_t* codes, int group, int bits, int column, uint8_t* q) {
  if (bits == 8) {
    for (int i = 0; i < group; i += 4) memcpy(q + i / 4 * 64 + column * 4, codes + i, 4);
    return;
  }
  for (int i = 0; i < group; i += 8)
    for (int j = 0; j < 4; j++) q[i / 8 * 64 + column * 4 + j] = uint8_t(codes[i + j] | codes[i + j + 4] << 4);
}

// Codes of 4 bits, eight a word: what read_codes and place_codes do, several times faster.
void place_nibbles(const uint8_t* src, int group, int column, uint8_t* q) {
  const auto spread = [](uint32_t x) {
    x = (x | x << 8) & 0x00FF00FFu;
    return (x | x << 4) & 0x0F0F0F0Fu;
  };
  for (int i = 0; i < group; i += 8) {
    uint32_t word;
    memcpy(&word, src + i / 2, 4);
    const uint32_t placed = spread(word & 0xFFFF) | spread(word >> 16) << 4;
    memcpy(q + i / 8 * 64 + column * 4, &placed, 4);
  }
}

// The mx formats' scales are exponents, nvfp4's are E4M3.
std::vector<float> float_scales(const mx::array& scales, bool exponents) {
  const uint8_t* e = scales.data<uint8_t>();
  std::vector<float> s(scales.size());
  for (size_t i = 0; i < s.size(); i++) {
    const int exponent = e[i] >> 3 & 15, mantissa = e[i] & 7;
    const float v = exponent ? std::ldexp(8.f + float(mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
    s[i] = exponents ? std::ldexp(1.f, int(e[i]) - 127) : e[i] & 128 ? -v : v;
  }
  return s;
}

// How weights without biases are kept, by bits and group.
Codes codes_of(int bits, int group) {
  if (bits == 4 && (group == 32 || group == 16)) return Codes::fp4;
  if (bits == 8 && group == 32) return Codes::fp8;
  throw std::invalid_argument("native: without biases, mxfp4 (4 bits, groups of 32), nvfp4 (4, 16) or mxfp8 (8, 32)");
}
}  // namespace

PackedPtr Packed::quantized(const mx::array& w_, const mx::array& scales_, const std::optional<mx::array>& biases_, int group, int bits) {
  const Codes kind = biases_ ? Codes::affine : codes_of(bits, group);
  if (bits < 2 || bits > 8 || bits == 7) throw std::invalid_argument("native: 2, 3, 4, 5, 6 or 8 bits");
  if (biases_ && group != 32 && group != 64 && group != 128) throw std::invalid_argument("native: group size 32, 64 or 128");
  if (!biases_ && scales_.dtype() != mx::uint8) throw std::invalid_argument("native: without biases, scales are uint8");
  if (w_.ndim() != 2 || w_.dtype() != mx::uint32) throw std::invalid_argument("native: weights must be [n, words] uint32");
  const int n = w_.shape(0), k = int(int64_t(w_.shape(1)) * 32 / bits), groups = k / group;
  const mx::Shape expected{n, groups};
  if (groups * group != k || scales_.shape() != expected || (biases_ && biases_->shape() != expected)) {
    throw std::invalid_argument("native: scales and biases must be [n, k / group_size]");
  }
  const mx::array w = ready(w_), scales = ready(scales_);
  std::vector<float> s, b;
  if (!biases_) {
    s = float_scales(scales, group == 32);
    // E2M1 is affine in kFp4's integers.
    if (kind == Codes::fp4) {
      for (float& f : s) f *= 0.5f;
    }
    for (float f : s) b.push_back(-12.f * f);
  } else {
    s = floats(scales), b = floats(ready(*biases_));
  }
  Weight meta;
  // Odd widths are kept in the next even one that a kernel reads.
  meta.n = n, meta.k = k, meta.bits = bits <= 4 ? 4 : 8, meta.group = group, meta.codes = kind;
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
  const uint8_t* packed = w.data<uint8_t>();
  const size_t row_bytes = size_t(w.shape(1)) * 4;
  const int es = size_of(meta.scale_type);
  const Kernels& kern = kernels();
  parallel_rows(meta.blocks(), int64_t(n) * k, [&](int b0, int b1) {
    uint8_t codes[128];
    for (int block = b0; block < b1; block++) {
      for (int g = 0; g < groups; g++) {
        uint8_t* p = out + block * meta.block_bytes() + g * meta.group_bytes();
        for (int c = 0; c < kLanes && block * kLanes + c < n; c++) {
          const size_t row = size_t(block) * kLanes + c;
          kern.from_float(meta.scale_type, &s[row * groups + g], p + c * es, 1);
          if (kind != Codes::fp8) kern.from_float(meta.scale_type, &b[row * groups + g], p + (kLanes + c) * es, 1);
          const uint8_t* src = packed + row * row_bytes;
          uint8_t* q = p + meta.affine_bytes();
          if (bits == 4) {
            place_nibbles(src + size_t(g) * group / 2, group, c, q);
            continue;
          }
          read_codes(src, int64_t(g) * group, group, bits, codes);
          if (kind == Codes::fp8) {
            for (int i = 0; i < group; i++) q[i * kLanes + c] = codes[i];
          } else {
            place_codes(codes, group, meta.bits, c, q);
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
  meta.scale_type = type_of(w.dtype());
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
