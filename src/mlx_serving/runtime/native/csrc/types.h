// Element types shared by the kernels and the MLX side.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ms {
enum class Type : int { f32 = 0, f16 = 1, bf16 = 2 };
inline constexpr int size_of(Type t) { return t == Type::f32 ? 4 : 2; }

// How one position's vector lies in a KV slab: `dim` numbers of `type`; or,
// with `bits` (8 or 4), their codes as mx.quantize packs them in affine groups
// along the vector, then every group's scale, then every group's bias, of `type`.
struct Line {
  Type type = Type::f32;
  int dim = 0, bits = 0, group = 0;
  size_t codes_bytes() const { return size_t(dim) * bits / 8; }
  size_t affine_bytes() const { return size_t(dim / group) * size_of(type); }
  size_t bytes() const { return bits ? codes_bytes() + 2 * affine_bytes() : size_t(dim) * size_of(type); }
};

// How activations enter a quantised matmul.
//   exact: two int8 planes, about 15 bits per value and group
//   fast:  one int8 plane
//   f32:   unquantised
enum class Mode : int { exact = 0, fast = 1, f32 = 2 };
enum class Act : int { silu = 0, gelu_tanh = 1, gelu_erf = 2 };
}  // namespace ms
using ms::Act;
using ms::Mode;
using ms::Type;
