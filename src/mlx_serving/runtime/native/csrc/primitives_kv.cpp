// Operations over slabs: writing new positions, and attention.
#include "mlx_task.h"
#include "primitives.h"

namespace ms {
namespace {
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
}  // namespace

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

}  // namespace ms
