// The table of kernels that each instruction set provides, and their operands.
#pragma once
#include <cstddef>
#include <cstdint>

#include "types.h"

namespace ms {

constexpr int kLanes = 16;      // output columns of one packed weight block
constexpr int kKeyBlock = 64;   // keys per step of the online softmax
constexpr int kKeySplit = 256;  // keys per partial result; merged in ascending order

// What a quantised weight's codes stand for: integers of an affine group, E2M1, or E4M3.
enum class Codes : int { affine, fp4, fp8 };

// E2M1 as integers: twice the value, plus 12. So mxfp4 and nvfp4 are affine in them.
constexpr uint8_t kFp4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// A weight matrix [n, k], packed in blocks of 16 output columns.
//   bits 4, 8:  per block, per group: 16 scales, 16 biases, then the codes,
//               64 bytes for every 8 (4 bits) or 4 (8 bits) inputs; lane c of
//               those 64 bytes holds column c.
//               With fp4, a 4-bit code stands for kFp4[code].
//   fp8:        per block, per group: 16 scales, then 16 codes per input. E4M3
//               has no integers, so its products are those of floats.
//   bits 16, 32: per block, per input: 16 values (bf16 or f16 by `scale_type`; f32).
struct Weight {
  const uint8_t* data = nullptr;
  int n = 0, k = 0, bits = 0, group = 0;
  Type scale_type = Type::f32;
  Codes codes = Codes::affine;

  // Activations are quantised for it.
  bool integers() const { return bits <= 8 && codes != Codes::fp8; }
  int groups() const { return group ? k / group : 0; }
  int blocks() const { return (n + kLanes - 1) / kLanes; }
  size_t affine_bytes() const { return size_t(codes == Codes::fp8 ? 1 : 2) * kLanes * size_of(scale_type); }
  size_t group_bytes() const { return affine_bytes() + size_t(2) * group * bits; }
  size_t block_bytes() const {
    return bits <= 8 ? size_t(groups()) * group_bytes() : size_t(k) * kLanes * (bits / 8);
  }
  size_t bytes() const { return size_t(blocks()) * block_bytes(); }
};

// Activations ready for a quantised matmul: rows of k values.
//   value ~ scale[g] * (128 * hi + lo), or scale[g] * hi with one plane.
struct Activations {
  const float* x = nullptr;  // [rows, k], used by Mode::f32 and dense weights
  int8_t* hi = nullptr;      // [rows, k]
  int8_t* lo = nullptr;      // [rows, k]
  float* scale = nullptr;    // [rows, groups]
  float* sum = nullptr;      // [rows, groups] the group's sum of (quantised) values
  int k = 0, group = 0;
};

// One slab row and KV head, and the queries that attend to it.
struct AttentionTask {
  const float* q;      // [nq, d], already scaled
  const int32_t* pos;  // [nq] absolute position of each query: it sees keys 0..pos
  int nq;
  const char* k;       // key of position 0
  const char* v;
  int64_t k_stride, v_stride;  // bytes between positions
  Line k_line, v_line;
  bool latent;         // a key is both lines side by side, and its value is the first
  int window;          // keys a query sees at most; 0: all
  int begin, end;      // the split's key range; begin is a multiple of kKeySplit
  float* o;            // [nq, dv] unnormalised
  float* m;            // [nq] running maximum, -inf where the query saw no key
  float* l;            // [nq] running sum
  float* scratch;      // attention_scratch(d, dv) floats
  int key_dim() const { return latent ? k_line.dim + v_line.dim : k_line.dim; }
  int value_dim() const { return latent ? k_line.dim : v_line.dim; }
};
inline size_t attention_scratch(int d, int dv) {
  return size_t(kKeyBlock) * (2 * size_t(d) + size_t(dv)) + 16 * 1024;
}

// What is done to one row of logits before a token is chosen; see sampler.py.
struct LogitEdit {
  float* x;  // [n], in place
  int n;
  const uint8_t* allowed = nullptr;  // a bit a token, what is not set becomes -inf
  const float* bias = nullptr;       // [n], added
  const int32_t* output = nullptr;   // [n], how often each token occurs: all penalties, or none
  const int32_t* prompt = nullptr;
  float repetition = 1.f, presence = 0.f, frequency = 0.f;
  const float* ban = nullptr;  // [n], added unless that leaves nothing
};

struct DrawTask {
  float* x;  // [n] logits, overwritten
  int n;
  float temperature;
  int top_k;        // 0: all
  float top_p;      // 1: all
  float log_min_p;  // -inf: all
  uint32_t key0, key1;
  uint32_t* words;  // [n]
  float* scratch;   // [n]
};

struct Kernels {
  const char* name;
  void (*to_float)(Type, const void* src, int64_t stride, float* dst, int64_t n);
  void (*from_float)(Type, const float* src, void* dst, int64_t n);
  // One position's vector into a slab, and out of it.
  void (*encode_line)(const Line&, const float* x, void* dst);
  void (*decode_line)(const Line&, const void* src, float* out);
  // Rows [row0, row1) of a.x into planes, scales and sums.
  void (*quantize)(const Activations& a, Mode mode, int row0, int row1);
  // out[r * ld + 0 .. n) for weight blocks [block0, block1) and rows [row0, row1).
  void (*matmul)(const Weight& w, const Activations& a, Mode mode, int block0, int block1, int row0, int row1, float* out, int64_t ld);
  // out = x / rms(x) * w; with `add`, x becomes x + add first.
  void (*rms_norm)(float* x, const float* add, const float* w, float eps, float* out, int k);
  // In place over x[0, dims). Table row: cos, sin (see RopeTable).
  void (*rope)(float* x, const float* table, int dims, bool traditional);
  // out = act(gate) * up
  void (*act_mul)(Act act, const float* gate, const float* up, float* out, int64_t n);
  void (*add)(float* x, const float* y, int64_t n);
  void (*scale)(const float* x, float s, float* out, int64_t n);
  void (*attention)(const AttentionTask& t);
  // (o, m, l) <- (o, m, l) merged with a later split's (o2, m2, l2); rows of dv.
  void (*attention_merge)(float* o, float* m, float* l, const float* o2, const float* m2, const float* l2, int nq, int dv);
  // o / l, with an optional attention sink per query.
  void (*attention_finish)(float* o, const float* m, const float* l, const float* sink, int nq, int dv);
  // One dequantised row of a packed weight.
  void (*dequantize_row)(const Weight& w, int row, float* out);
  void (*edit_logits)(const LogitEdit& e);
  // The first index of the largest value.
  int (*argmax)(const float* x, int n);
  int (*draw_token)(const DrawTask& t);
};

// The best table for this CPU, or the one named by force_isa(); never null.
const Kernels& kernels();
// Names that this CPU can run, best first, comma separated.
const char* isa_names();
// Chooses a table by name ("" for the best). False if this CPU cannot run it,
// unless a test says that what it lacks is emulated.
bool force_isa(const char* name, bool emulated = false);

// Whether the tiles of kernels_amx.cpp are used; decided before the first kernel runs.
struct AmxUse {
  bool on = false, faulty = false;
  const char* why = "";  // they are not, where the CPU has them
};
const AmxUse& amx_use();

}  // namespace ms
