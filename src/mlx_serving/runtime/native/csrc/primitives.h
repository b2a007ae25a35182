// The kernels as MLX operations on the CPU backend.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "decoder.h"
#include "mlx/mlx.h"

namespace ms {
namespace mx = mlx::core;

// What Python may ask of this module; changed with every change of bindings.cpp, as in _load.py.
constexpr int kInterface = 5;

// A weight matrix packed for the kernels; immutable.
class Packed {
 public:
  Packed(Weight meta, mx::array data) : meta_(meta), data_(std::move(data)) {}
  // w: [n, k * bits / 32] uint32; scales, biases: [n, k / group_size], f32, f16 or bf16.
  // Without biases it is mxfp4, nvfp4 or mxfp8, by bits and group, and the scales are uint8.
  static std::shared_ptr<Packed> quantized(const mx::array& w, const mx::array& scales, const std::optional<mx::array>& biases, int group_size, int bits);
  // w: [n, k], f32, f16 or bf16.
  static std::shared_ptr<Packed> dense(const mx::array& w);

  const mx::array& data() const { return data_; }
  Weight weight() const {
    Weight w = meta_;
    w.data = data_.data<uint8_t>() + offset_;
    return w;
  }
  // Outputs [start, stop) over the same memory; start must be a block's first.
  std::shared_ptr<Packed> slice(int start, int stop) const;
  size_t nbytes() const { return meta_.bytes(); }
  int n() const { return meta_.n; }
  int k() const { return meta_.k; }
  int bits() const { return meta_.bits; }
  int group() const { return meta_.group; }

 private:
  Weight meta_;
  mx::array data_;
  size_t offset_ = 0;
};
using PackedPtr = std::shared_ptr<Packed>;
using RopePtr = std::shared_ptr<RopeTable>;

Mode mode_of(const std::string& name);
Act act_of(const std::string& name);

mx::array linear(const mx::array& x, const PackedPtr& w, const std::optional<mx::array>& bias, const std::string& mode);
// Each row of x [..., k] times its expert's weight: expert e has outputs [e * n, (e + 1) * n) of w,
// n a multiple of 16. experts: one for each row, x's shape without its last axis.
mx::array gather_linear(const mx::array& x, const mx::array& experts, const PackedPtr& w, int n, const std::string& mode);
mx::array embed(const mx::array& ids, const PackedPtr& w, mx::Dtype dtype);
mx::array rms_norm(const mx::array& x, const std::optional<mx::array>& weight, float eps);
mx::array rope(const mx::array& x, const mx::array& offsets, const RopePtr& table);
mx::array gated(const mx::array& gate, const mx::array& up, const std::string& act);
// How a slab of uint32 keeps a vector: bits, group, dim and the type of scales and biases. Without it
// a slab holds plain numbers.
using KvCode = std::optional<std::tuple<int, int, int, mx::Dtype>>;
Line line_of(const mx::array& slab, const KvCode& code);
std::vector<mx::array> kv_write(const mx::array& keys, const mx::array& values, const mx::array& k, const mx::array& v, const mx::array& rows, const mx::array& offsets, const KvCode& key_code, const KvCode& value_code);
mx::array attend(const mx::array& q, const mx::array& keys, const mx::array& values, const mx::array& rows, const mx::array& offsets, float scale, int window, const std::optional<mx::array>& sinks, const KvCode& key_code, const KvCode& value_code, bool latent);

// Whether so much address space can be had in so many pieces, beyond the machine's memory if need be.
bool can_reserve(size_t bytes, int pieces);
// Zeros that take memory, a page at a time, as they are written. Throws std::bad_alloc.
mx::array reserve(const mx::Shape& shape, mx::Dtype dtype);
// The slabs, handed over, without the memory behind one row, which is zeros again.
std::vector<mx::array> give_back(const std::vector<mx::array>& slabs, int row);
// Rows of `target` [slots, ...], or their first positions along axis 2, are `value` [rows, ...].
mx::array put(const mx::array& target, const mx::array& value, const std::vector<int>& rows);

// How each line of a batch chooses its token; constant over many steps.
struct SampleLine {
  float temperature = 0.f;  // 0: the likeliest
  int top_k = 0;
  float top_p = 1.f, log_min_p;
  uint32_t key0 = 0, key1 = 0;
  int bias = -1, count = -1, ban = -1;  // rows of the arrays given to sample()
  float repetition = 1.f, presence = 0.f, frequency = 0.f;
  int ban_until = 0;  // a ban holds for positions below this
};
struct SampleArrays {
  std::optional<mx::array> allowed;         // [lines, >= vocabulary / 8] uint8
  std::optional<mx::array> bias, ban;       // [rows, vocabulary] f32
  std::optional<mx::array> output, prompt;  // [rows, vocabulary] int32, both or none
};
// logits [lines, vocabulary] -> [lines] int32. Positions are those that the tokens will have.
mx::array sample(const mx::array& logits, const std::shared_ptr<const std::vector<SampleLine>>& lines, std::vector<uint32_t> positions, const SampleArrays& arrays);

// The arrays behind a DecoderSpec, kept alive together.
class Decoder {
 public:
  struct Layer {
    PackedPtr qkv, o, gate, up, down;
    std::optional<mx::array> qkv_bias, o_bias, in_norm, mlp_norm, q_norm, k_norm, post_attn_norm, post_mlp_norm;
    RopePtr rope;
    int window = 0;
  };
  Decoder(int heads, int kv_heads, int head_dim, float eps, float scale, float embed_scale, const std::string& act, const std::string& mode, PackedPtr embedding, const mx::array& final_norm);
  void add_layer(Layer layer);
  const DecoderSpec& spec() const { return spec_; }
  int layers() const { return int(layers_.size()); }

 private:
  DecoderSpec spec_;
  PackedPtr embedding_;
  mx::array final_norm_;
  std::vector<Layer> layers_;
};
// Returns the hidden states [count, length, hidden] f32, then every layer's keys and values.
std::vector<mx::array> decoder_forward(const std::shared_ptr<Decoder>& d, const mx::array& x, const mx::array& rows, const mx::array& offsets, const std::vector<mx::array>& slabs, const KvCode& key_code, const KvCode& value_code);

}  // namespace ms
