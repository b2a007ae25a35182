// The fused decoder as one operation.
#include "mlx_task.h"
#include "primitives.h"

namespace ms {
namespace {
class DecoderPrimitive : public CpuPrimitive {
 public:
  DecoderPrimitive(std::shared_ptr<Decoder> d, Line keys, Line values) : CpuPrimitive("MsDecoder"), d_(std::move(d)), lines_{keys, values} {}
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    std::vector<std::pair<Slab, Slab>> copies;
    std::vector<Slab> keys, values;
    for (size_t i = 1; i < out.size(); i++) {
      bool copy;
      const bool key = i % 2;
      const Slab from = slab_of(in[2 + i], lines_[!key]);
      take(in[2 + i], out[i], copy);
      const Slab to = slab_of(out[i], lines_[!key]);
      if (copy) copies.emplace_back(from, to);
      (key ? keys : values).push_back(to);
    }
    const bool tokens = in[0].dtype() == mx::int32;
    const int count = in[0].shape(0), length = in[0].shape(1);
    dispatch([d = d_, ri = Ints(in[1]), oi = Ints(in[2]), copies = std::move(copies), keys = std::move(keys), values = std::move(values), count, length,
              ids = tokens ? in[0].data<int32_t>() : nullptr, xf = tokens ? nullptr : in[0].data<float>(), o = out[0].data<float>()] {
      const Kernels& k = kernels();
      const DecoderSpec& s = d->spec();
      const std::vector<int32_t> rows = ri.read(), off = oi.read();
      for (auto& c : copies) copy_slab(c.first, c.second);
      thread_local Buffer xb;
      float* x = xb.get(size_t(count) * length * s.hidden);
      for (int i = 0; i < count * length; i++) {
        float* xi = x + int64_t(i) * s.hidden;
        if (ids) {
          if (ids[i] < 0 || ids[i] >= s.embedding.n) throw std::out_of_range("native: token id outside the vocabulary");
          k.dequantize_row(s.embedding, ids[i], xi);
        } else {
          memcpy(xi, xf + int64_t(i) * s.hidden, size_t(s.hidden) * 4);
        }
        if (s.embed_scale != 1.f) k.scale(xi, s.embed_scale, xi, s.hidden);
      }
      decode(s, x, keys, values, {rows.data(), off.data(), count, length}, o);
    });
  }

 private:
  std::shared_ptr<Decoder> d_;
  std::array<Line, 2> lines_;
};

const float* pointer(std::optional<mx::array>& a) {
  if (!a) return nullptr;
  a = flat(*a, mx::float32);
  a->eval();
  return a->data<float>();
}
}  // namespace

Decoder::Decoder(int heads, int kv_heads, int head_dim, float eps, float scale, float embed_scale, const std::string& act, const std::string& mode, PackedPtr embedding, const mx::array& final_norm)
    : embedding_(std::move(embedding)), final_norm_(flat(final_norm, mx::float32)) {
  require(kv_heads > 0 && heads % kv_heads == 0 && head_dim % 16 == 0, "decoder: head dim a multiple of 16, heads of the KV heads");
  final_norm_.eval();
  spec_.heads = heads, spec_.kv_heads = kv_heads, spec_.head_dim = head_dim;
  spec_.eps = eps, spec_.scale = scale, spec_.embed_scale = embed_scale;
  spec_.act = act_of(act), spec_.mode = mode_of(mode);
  spec_.embedding = embedding_->weight();
  spec_.hidden = embedding_->k();
  spec_.final_norm = final_norm_.data<float>();
  require(final_norm_.size() == size_t(spec_.hidden), "decoder: the final norm must be [hidden]");
}

void Decoder::add_layer(Layer l) {
  require(l.qkv->n() == (spec_.heads + 2 * spec_.kv_heads) * spec_.head_dim && l.qkv->k() == spec_.hidden, "decoder: shape of qkv");
  require(l.o->k() == spec_.heads * spec_.head_dim && l.o->n() == spec_.hidden, "decoder: shape of o");
  require(l.gate->k() == spec_.hidden && l.up->k() == spec_.hidden && l.gate->n() == l.up->n(), "decoder: shape of gate and up");
  require(l.gate->bits() == l.up->bits() && l.gate->group() == l.up->group(), "decoder: gate and up must share a quantisation");
  require(l.down->k() == l.gate->n() && l.down->n() == spec_.hidden, "decoder: shape of down");
  require(layers_.empty() || l.gate->n() == spec_.intermediate, "decoder: layers of one width");
  require(l.in_norm && l.mlp_norm && l.rope && l.rope->dims() <= spec_.head_dim, "decoder: norms and rope");
  spec_.intermediate = l.gate->n();
  layers_.push_back(std::move(l));
  Layer& y = layers_.back();
  LayerSpec s;
  s.qkv = y.qkv->weight(), s.o = y.o->weight(), s.gate = y.gate->weight(), s.up = y.up->weight(), s.down = y.down->weight();
  s.qkv_bias = pointer(y.qkv_bias), s.o_bias = pointer(y.o_bias);
  s.in_norm = pointer(y.in_norm), s.mlp_norm = pointer(y.mlp_norm);
  s.q_norm = pointer(y.q_norm), s.k_norm = pointer(y.k_norm);
  s.post_attn_norm = pointer(y.post_attn_norm), s.post_mlp_norm = pointer(y.post_mlp_norm);
  s.rope = y.rope.get();
  s.window = y.window;
  spec_.layers.push_back(s);
}

std::vector<mx::array> decoder_forward(const std::shared_ptr<Decoder>& d, const mx::array& x, const mx::array& rows, const mx::array& offsets, const std::vector<mx::array>& slabs, const KvCode& key_code, const KvCode& value_code) {
  const DecoderSpec& s = d->spec();
  const bool tokens = mx::issubdtype(x.dtype(), mx::integer);
  require(tokens ? x.ndim() == 2 : x.ndim() == 3 && x.shape(2) == s.hidden, "decoder: x must be [batch, length] ids or [batch, length, hidden]");
  require(!slabs.empty() && slabs.size() == size_t(2 * d->layers()), "decoder: keys and values for every layer");
  require(rows.size() == size_t(x.shape(0)) && offsets.size() == rows.size(), "decoder: one row and one offset for each batch row");
  std::vector<mx::array> in{flat(x, tokens ? mx::int32 : mx::float32), as(rows, mx::int32), as(offsets, mx::int32)};
  std::vector<mx::Shape> shapes{{x.shape(0), x.shape(1), s.hidden}};
  std::vector<mx::Dtype> types{mx::float32};
  for (size_t i = 0; i < slabs.size(); i++) {
    const mx::array& a = slabs[i];
    const Line line = line_of(a, i % 2 ? value_code : key_code);
    require(a.shape(1) == s.kv_heads && line.dim == s.head_dim && a.dtype() == slabs[i % 2].dtype(), "decoder: shape of a slab");
    shapes.push_back(a.shape());
    types.push_back(a.dtype());
    in.push_back(a);
  }
  return mx::array::make_arrays(std::move(shapes), types, std::make_shared<DecoderPrimitive>(d, line_of(slabs[0], key_code), line_of(slabs[1], value_code)), in);
}

}  // namespace ms
