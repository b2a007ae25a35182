// Operations over rows: matmul, embedding, norm, rope, gated activation.
#include "mlx_task.h"
#include "primitives.h"

namespace ms {
namespace {
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

}  // namespace ms
