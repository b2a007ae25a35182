#include "primitives.h"

#include <cstring>
#include <stdexcept>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"

namespace ms {
namespace {

mx::Stream cpu() { return mx::default_stream(mx::Device(mx::Device::cpu)); }

Type type_of(mx::Dtype d) {
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

Slab slab_of(const mx::array& a) {
  if (a.ndim() != 4 || (a.strides(3) != 1 && a.shape(3) != 1)) throw std::invalid_argument("native: a slab is [rows, heads, capacity, dim]");
  Slab s;
  s.data = const_cast<void*>(a.data<void>());
  s.type = type_of(a.dtype());
  s.rows = a.shape(0), s.heads = a.shape(1), s.capacity = a.shape(2), s.dim = a.shape(3);
  s.row_stride = a.strides(0), s.head_stride = a.strides(1), s.pos_stride = a.strides(2);
  return s;
}

// The output takes the input's memory: a slab is handed over, not shared. MLX's
// own test for that (is_donatable) never holds here, since every output of a
// primitive keeps a reference to its inputs.
void take(const mx::array& in, mx::array& out, bool& copy) {
  copy = !in.flags().row_contiguous || in.data_size() != in.size();
  if (copy) out.set_data(mx::allocator::malloc(out.nbytes()));
  else out.copy_shared_buffer(in);
}

void copy_slab(const Slab& from, const Slab& to) {
  const size_t line = size_t(from.dim) * size_of(from.type);
  for (int r = 0; r < from.rows; r++)
    for (int h = 0; h < from.heads; h++) {
      if (from.pos_stride == from.dim) memcpy(to.at(r, h, 0), from.at(r, h, 0), line * from.capacity);
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

void allocate(mx::array& a) { a.set_data(mx::allocator::malloc(a.nbytes())); }

class Linear : public CpuPrimitive {
 public:
  Linear(PackedPtr w, Mode mode) : CpuPrimitive("MsLinear"), w_(std::move(w)), mode_(mode) {}
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    const float* bias = in.size() > 2 ? in[2].data<float>() : nullptr;
    dispatch([x = View(in[0]), w = w_->weight(), mode = mode_, bias, o = out[0].data<char>(), t = type_of(out[0].dtype())] {
      thread_local Buffer xb, ob;
      thread_local Prepared prep;
      const int rows = int(x.rows);
      prep.reset(x.floats(xb), rows, w, mode);
      prep.all(rows);
      float* y = t == Type::f32 ? reinterpret_cast<float*>(o) : ob.get(size_t(rows) * w.n);
      matmul(w, prep.view(), mode, rows, y, w.n);
      const Kernels& k = kernels();
      if (!bias && t == Type::f32) return;
      parallel_rows(rows, int64_t(rows) * w.n, [&](int r0, int r1) {
        for (int r = r0; r < r1; r++) {
          float* yr = y + int64_t(r) * w.n;
          if (bias) k.add(yr, bias, w.n);
          if (t != Type::f32) k.from_float(t, yr, o + int64_t(r) * w.n * size_of(t), w.n);
        }
      });
    });
  }

 private:
  PackedPtr w_;
  Mode mode_;
};

class Embed : public CpuPrimitive {
 public:
  explicit Embed(PackedPtr w) : CpuPrimitive("MsEmbed"), w_(std::move(w)) {}
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    dispatch([ids = in[0].data<int32_t>(), n = in[0].size(), w = w_->weight(), o = out[0].data<char>(), t = type_of(out[0].dtype())] {
      const Kernels& k = kernels();
      thread_local Buffer row;
      float* x = row.get(w.k);
      for (size_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= w.n) throw std::out_of_range("native: token id outside the vocabulary");
        k.dequantize_row(w, ids[i], x);
        k.from_float(t, x, o + i * w.k * size_of(t), w.k);
      }
    });
  }

 private:
  PackedPtr w_;
};

class RmsNorm : public CpuPrimitive {
 public:
  explicit RmsNorm(float eps) : CpuPrimitive("MsRmsNorm"), eps_(eps) {}
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    dispatch([x = View(in[0]), w = in.size() > 1 ? in[1].data<float>() : nullptr, eps = eps_, o = out[0].data<char>(), t = type_of(out[0].dtype())] {
      const Kernels& k = kernels();
      parallel_rows(int(x.rows), x.rows * x.k, [&](int r0, int r1) {
        thread_local Buffer row;
        float* y = row.get(x.k);
        for (int r = r0; r < r1; r++) {
          k.to_float(x.type, x.row(r), x.stride.back(), y, x.k);
          k.rms_norm(y, nullptr, w, eps, y, x.k);
          k.from_float(t, y, o + int64_t(r) * x.k * size_of(t), x.k);
        }
      });
    });
  }

 private:
  float eps_;
};

class Rope : public CpuPrimitive {
 public:
  explicit Rope(RopePtr table) : CpuPrimitive("MsRope"), table_(std::move(table)) {}
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    dispatch([x = View(in[0]), offsets = Ints(in[1]), table = table_, o = out[0].data<char>()] {
      const Kernels& k = kernels();
      const std::vector<int32_t> off = offsets.read();
      const int64_t length = x.shape[x.shape.size() - 2];
      int64_t last = 0;
      for (int32_t v : off) {
        if (v < 0) throw std::out_of_range("native: negative rope offset");
        last = std::max<int64_t>(last, v);
      }
      table->ensure(last + length);
      const int64_t per_batch = x.rows / x.shape[0];
      parallel_rows(int(x.rows), x.rows * x.k, [&](int r0, int r1) {
        thread_local Buffer row;
        float* y = row.get(x.k);
        for (int64_t r = r0; r < r1; r++) {
          const int64_t b = off.size() == 1 ? 0 : r / per_batch;
          k.to_float(x.type, x.row(r), x.stride.back(), y, x.k);
          k.rope(y, table->row(off[b] + r % length), table->dims(), table->traditional());
          k.from_float(x.type, y, o + r * x.k * size_of(x.type), x.k);
        }
      });
    });
  }

 private:
  RopePtr table_;
};

class Gated : public CpuPrimitive {
 public:
  explicit Gated(Act act) : CpuPrimitive("MsGated"), act_(act) {}
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    dispatch([g = View(in[0]), u = View(in[1]), act = act_, o = out[0].data<char>(), t = type_of(out[0].dtype())] {
      const Kernels& k = kernels();
      parallel_rows(int(g.rows), g.rows * g.k * 2, [&](int r0, int r1) {
        thread_local Buffer rows;
        float* x = rows.get(size_t(g.k) * 2);
        for (int r = r0; r < r1; r++) {
          g.read(r, r + 1, x);
          u.read(r, r + 1, x + g.k);
          k.act_mul(act, x, x + g.k, x, g.k);
          k.from_float(t, x, o + int64_t(r) * g.k * size_of(t), g.k);
        }
      });
    });
  }

 private:
  Act act_;
};

class KvWrite : public CpuPrimitive {
 public:
  KvWrite() : CpuPrimitive("MsKvWrite") {}
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    for (int i : {0, 1}) {
      bool copy;
      take(in[i], out[i], copy);
      dispatch([from = slab_of(in[i]), to = slab_of(out[i]), x = View(in[2 + i], {0, 2, 1, 3}), ri = Ints(in[4]), oi = Ints(in[5]), copy] {
        const std::vector<int32_t> rows = ri.read(), off = oi.read();
        const Kernels& k = kernels();
        const Batch b{rows.data(), off.data(), int(rows.size()), int(x.shape[1])};
        if (copy) copy_slab(from, to);
        check(b, to);
        thread_local Buffer row;
        float* y = row.get(x.k);
        for (int64_t r = 0; r < x.rows; r++) {
          const int64_t h = r % to.heads, l = r / to.heads % b.length, bi = r / to.heads / b.length;
          char* dst = to.at(b.rows[bi], h, b.offsets[bi] + l);
          if (x.type == to.type && x.stride.back() == 1) {
            memcpy(dst, x.row(r), size_t(x.k) * size_of(x.type));
          } else {
            k.to_float(x.type, x.row(r), x.stride.back(), y, x.k);
            k.from_float(to.type, y, dst, x.k);
          }
        }
      });
    }
  }
};

class Attend : public CpuPrimitive {
 public:
  Attend(float scale, int window) : CpuPrimitive("MsAttention"), scale_(scale), window_(window) {}
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    // [B, H, L, D] over memory [B, L, H, D]: the caller's transpose and reshape move nothing.
    mx::array& o = out[0];
    const int64_t h = o.shape(1), l = o.shape(2), d = o.shape(3);
    auto flags = o.flags();
    flags.contiguous = true;
    flags.row_contiguous = l == 1 || h == 1;
    flags.col_contiguous = o.size() <= 1;
    o.set_data(mx::allocator::malloc(o.nbytes()), o.size(), {l * h * d, d, h * d, 1}, flags);
    dispatch([q = View(in[0], {0, 2, 1, 3}), k = slab_of(in[1]), v = slab_of(in[2]), ri = Ints(in[3]), oi = Ints(in[4]),
              sinks = in.size() > 5 ? in[5].data<float>() : nullptr, scale = scale_, window = window_, p = o.data<char>(), t = type_of(o.dtype())] {
      thread_local Buffer qb, ob;
      const std::vector<int32_t> rows = ri.read(), off = oi.read();
      const Batch b{rows.data(), off.data(), int(rows.size()), int(q.shape[1])};
      check(b, k);
      check(b, v);
      const int64_t n = q.rows * v.dim;
      float* y = t == Type::f32 ? reinterpret_cast<float*>(p) : ob.get(size_t(n));
      attention(q.floats(qb), k, v, b, {int(q.shape[2]), scale, window, sinks}, y);
      if (t != Type::f32) kernels().from_float(t, y, p, n);
    });
  }

 private:
  float scale_;
  int window_;
};

class DecoderPrimitive : public CpuPrimitive {
 public:
  explicit DecoderPrimitive(std::shared_ptr<Decoder> d) : CpuPrimitive("MsDecoder"), d_(std::move(d)) {}
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    std::vector<std::pair<Slab, Slab>> copies;
    std::vector<Slab> keys, values;
    for (size_t i = 1; i < out.size(); i++) {
      bool copy;
      const Slab from = slab_of(in[2 + i]);
      take(in[2 + i], out[i], copy);
      const Slab to = slab_of(out[i]);
      if (copy) copies.emplace_back(from, to);
      (i % 2 ? keys : values).push_back(to);
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
};

mx::array as(const mx::array& a, mx::Dtype d) { return a.dtype() == d ? a : mx::astype(a, d, cpu()); }
mx::array flat(const mx::array& a, mx::Dtype d) { return mx::contiguous(as(a, d), false, cpu()); }

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("native: ") + what);
}
}  // namespace

Mode mode_of(const std::string& name) {
  if (name == "exact") return Mode::exact;
  if (name == "fast") return Mode::fast;
  if (name == "f32") return Mode::f32;
  throw std::invalid_argument("native: mode must be exact, fast or f32");
}

Act act_of(const std::string& name) {
  if (name == "silu") return Act::silu;
  if (name == "gelu_tanh") return Act::gelu_tanh;
  if (name == "gelu_erf") return Act::gelu_erf;
  throw std::invalid_argument("native: activation must be silu, gelu_tanh or gelu_erf");
}

mx::array linear(const mx::array& x, const PackedPtr& w, const std::optional<mx::array>& bias, const std::string& mode) {
  require(x.ndim() >= 1 && x.shape(-1) == w->k(), "linear: the last axis of x must be the weight's inputs");
  type_of(x.dtype());
  auto shape = x.shape();
  shape.back() = w->n();
  std::vector<mx::array> in{x, w->data()};
  if (bias) {
    require(bias->size() == size_t(w->n()), "linear: bias must be [n]");
    in.push_back(flat(*bias, mx::float32));
  }
  return mx::array(shape, x.dtype(), std::make_shared<Linear>(w, mode_of(mode)), std::move(in));
}

mx::array embed(const mx::array& ids, const PackedPtr& w, mx::Dtype dtype) {
  type_of(dtype);
  auto shape = ids.shape();
  shape.push_back(w->k());
  return mx::array(shape, dtype, std::make_shared<Embed>(w), {flat(ids, mx::int32), w->data()});
}

mx::array rms_norm(const mx::array& x, const std::optional<mx::array>& weight, float eps) {
  type_of(x.dtype());
  std::vector<mx::array> in{x};
  if (weight) {
    require(weight->size() == size_t(x.shape(-1)), "rms_norm: weight must be [k]");
    in.push_back(flat(*weight, mx::float32));
  }
  return mx::array(x.shape(), x.dtype(), std::make_shared<RmsNorm>(eps), std::move(in));
}

mx::array rope(const mx::array& x, const mx::array& offsets, const RopePtr& table) {
  type_of(x.dtype());
  require(x.ndim() >= 3, "rope: x must be [batch, ..., length, dim]");
  require(table->dims() <= x.shape(-1), "rope: more frequencies than half the last axis");
  require(offsets.size() == 1 || offsets.size() == size_t(x.shape(0)), "rope: one offset, or one for each batch row");
  return mx::array(x.shape(), x.dtype(), std::make_shared<Rope>(table), {x, as(offsets, mx::int32)});
}

mx::array gated(const mx::array& gate, const mx::array& up, const std::string& act) {
  require(gate.shape() == up.shape() && gate.dtype() == up.dtype(), "gated: gate and up must match");
  type_of(gate.dtype());
  return mx::array(gate.shape(), gate.dtype(), std::make_shared<Gated>(act_of(act)), {gate, up});
}

std::vector<mx::array> kv_write(const mx::array& keys, const mx::array& values, const mx::array& k, const mx::array& v, const mx::array& rows, const mx::array& offsets) {
  for (auto [slab, x] : {std::pair{&keys, &k}, std::pair{&values, &v}}) {
    require(slab->ndim() == 4 && x->ndim() == 4, "kv_write: slabs [rows, heads, capacity, dim], k and v [batch, heads, length, dim]");
    require(x->shape(1) == slab->shape(1) && x->shape(3) == slab->shape(3), "kv_write: heads and dim must match the slab");
    require(rows.size() == size_t(x->shape(0)) && offsets.size() == rows.size(), "kv_write: one row and one offset for each batch row");
    type_of(x->dtype());
    type_of(slab->dtype());
  }
  return mx::array::make_arrays({keys.shape(), values.shape()}, {keys.dtype(), values.dtype()}, std::make_shared<KvWrite>(),
                                {keys, values, k, v, as(rows, mx::int32), as(offsets, mx::int32)});
}

mx::array attend(const mx::array& q, const mx::array& keys, const mx::array& values, const mx::array& rows, const mx::array& offsets, float scale, int window, const std::optional<mx::array>& sinks) {
  require(q.ndim() == 4 && keys.ndim() == 4 && values.ndim() == 4, "attention: q [batch, heads, length, dim], slabs [rows, kv_heads, capacity, dim]");
  require(q.shape(3) == keys.shape(3) && q.shape(3) % 16 == 0 && values.shape(3) % 16 == 0, "attention: head dims must be multiples of 16");
  require(keys.shape(1) == values.shape(1) && q.shape(1) % keys.shape(1) == 0, "attention: heads must be a multiple of the KV heads");
  require(keys.dtype() == values.dtype(), "attention: keys and values of one dtype");
  require(rows.size() == size_t(q.shape(0)) && offsets.size() == rows.size(), "attention: one row and one offset for each batch row");
  require(window >= 0, "attention: window must not be negative");
  type_of(q.dtype());
  type_of(keys.dtype());
  std::vector<mx::array> in{q, keys, values, as(rows, mx::int32), as(offsets, mx::int32)};
  if (sinks) {
    require(sinks->size() == size_t(q.shape(1)), "attention: one sink for each head");
    in.push_back(flat(*sinks, mx::float32));
  }
  mx::Shape shape{q.shape(0), q.shape(1), q.shape(2), values.shape(3)};
  return mx::array(shape, q.dtype(), std::make_shared<Attend>(scale, window), std::move(in));
}

namespace {
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

std::vector<mx::array> decoder_forward(const std::shared_ptr<Decoder>& d, const mx::array& x, const mx::array& rows, const mx::array& offsets, const std::vector<mx::array>& slabs) {
  const DecoderSpec& s = d->spec();
  const bool tokens = mx::issubdtype(x.dtype(), mx::integer);
  require(tokens ? x.ndim() == 2 : x.ndim() == 3 && x.shape(2) == s.hidden, "decoder: x must be [batch, length] ids or [batch, length, hidden]");
  require(slabs.size() == size_t(2 * d->layers()), "decoder: keys and values for every layer");
  require(rows.size() == size_t(x.shape(0)) && offsets.size() == rows.size(), "decoder: one row and one offset for each batch row");
  std::vector<mx::array> in{flat(x, tokens ? mx::int32 : mx::float32), as(rows, mx::int32), as(offsets, mx::int32)};
  std::vector<mx::Shape> shapes{{x.shape(0), x.shape(1), s.hidden}};
  std::vector<mx::Dtype> types{mx::float32};
  for (auto& a : slabs) {
    require(a.ndim() == 4 && a.shape(1) == s.kv_heads && a.shape(3) == s.head_dim && a.dtype() == slabs[0].dtype(), "decoder: shape of a slab");
    type_of(a.dtype());
    shapes.push_back(a.shape());
    types.push_back(a.dtype());
    in.push_back(a);
  }
  return mx::array::make_arrays(std::move(shapes), types, std::make_shared<DecoderPrimitive>(d), in);
}

}  // namespace ms
