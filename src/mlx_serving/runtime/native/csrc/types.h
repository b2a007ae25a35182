// Element types shared by the kernels and the MLX side.
#pragma once
#include <cstdint>

namespace ms {
enum class Type : int { f32 = 0, f16 = 1, bf16 = 2 };
inline constexpr int size_of(Type t) { return t == Type::f32 ? 4 : 2; }

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
