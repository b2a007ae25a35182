// Operations over slabs: writing new positions, and attention.
#include "mlx_task.h"
#include "primitives.h"

namespace ms {
namespace {
class KvWrite : public CpuPrimitive {
 public:
  explicit KvWrite(std::array<Line, 2> lines) : CpuPrimitive("MsKvWrite"), lines_(lines) {}
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    for (int i : {0, 1}) {
      bool copy;
      take(in[i], out[i], copy);
      dispatch([from = slab_of(in[i], lines_[i]), to = slab_of(out[i], lines_[i]), x = View(in[2 + i], {0, 2, 1, 3}), ri = Ints(in[4]), oi = Ints(in[5]), copy] {
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
          if (!to.line.bits && x.type == to.line.type && x.stride.back() == 1) {
            memcpy(dst, x.row(r), size_t(x.k) * size_of(x.type));
          } else {
            k.to_float(x.type, x.row(r), x.stride.back(), y, x.k);
            k.encode_line(to.line, y, dst);
          }
        }
      });
    }
  }

 private:
  std::array<Line, 2> lines_;
};

class Attend : public CpuPrimitive {
 public:
  Attend(float scale, int window, std::array<Line, 2> lines, bool latent) : CpuPrimitive("MsAttention"), scale_(scale), window_(window), lines_(lines), latent_(latent) {}
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    // [B, H, L, D] over memory [B, L, H, D]: the caller's transpose and reshape move nothing.
    mx::array& o = out[0];
    const int64_t h = o.shape(1), l = o.shape(2), d = o.shape(3);
    auto flags = o.flags();
    flags.contiguous = true;
    flags.row_contiguous = l == 1 || h == 1;
    flags.col_contiguous = o.size() <= 1;
    o.set_data(mx::allocator::malloc(o.nbytes()), o.size(), {l * h * d, d, h * d, 1}, flags);
    dispatch([q = View(in[0], {0, 2, 1, 3}), k = slab_of(in[1], lines_[0]), v = slab_of(in[2], lines_[1]), ri = Ints(in[3]), oi = Ints(in[4]),
              sinks = in.size() > 5 ? in[5].data<float>() : nullptr, scale = scale_, window = window_, latent = latent_, dv = d, p = o.data<char>(), t = type_of(o.dtype())] {
      thread_local Buffer qb, ob;
      const std::vector<int32_t> rows = ri.read(), off = oi.read();
      const Batch b{rows.data(), off.data(), int(rows.size()), int(q.shape[1])};
      check(b, k);
      check(b, v);
      const int64_t n = q.rows * dv;
      float* y = t == Type::f32 ? reinterpret_cast<float*>(p) : ob.get(size_t(n));
      attention(q.floats(qb), k, v, b, {int(q.shape[2]), scale, window, sinks, latent}, y);
      if (t != Type::f32) kernels().from_float(t, y, p, n);
    });
  }

 private:
  float scale_;
  int window_;
  std::array<Line, 2> lines_;
  bool latent_;
};
}  // namespace

Line line_of(const mx::array& slab, const KvCode& code) {
  require(slab.ndim() == 4, "a slab is [rows, heads, capacity, dim]");
  Line line;
  if (!code) {
    line.type = type_of(slab.dtype()), line.dim = slab.shape(3);
    return line;
  }
  const auto& [bits, group, dim, type] = *code;
  require((bits == 8 || bits == 4) && (group == 32 || group == 64) && dim > 0 && dim % group == 0, "a quantised slab has 8 or 4 bits and whole groups of 32 or 64");
  line.type = type_of(type), line.dim = dim, line.bits = bits, line.group = group;
  require(slab.dtype() == mx::uint32 && size_t(slab.shape(3)) * 4 == line.bytes(), "a quantised slab's lines are its codes, scales and biases as uint32");
  return line;
}

std::vector<mx::array> kv_write(const mx::array& keys, const mx::array& values, const mx::array& k, const mx::array& v, const mx::array& rows, const mx::array& offsets, const KvCode& key_code, const KvCode& value_code) {
  const std::array<Line, 2> lines{line_of(keys, key_code), line_of(values, value_code)};
  for (auto [slab, x, line] : {std::tuple{&keys, &k, &lines[0]}, std::tuple{&values, &v, &lines[1]}}) {
    require(x->ndim() == 4, "kv_write: k and v are [batch, heads, length, dim]");
    require(x->shape(1) == slab->shape(1) && x->shape(3) == line->dim, "kv_write: heads and dim must match the slab");
    require(rows.size() == size_t(x->shape(0)) && offsets.size() == rows.size(), "kv_write: one row and one offset for each batch row");
    type_of(x->dtype());
  }
  return mx::array::make_arrays({keys.shape(), values.shape()}, {keys.dtype(), values.dtype()}, std::make_shared<KvWrite>(lines),
                                {keys, values, k, v, as(rows, mx::int32), as(offsets, mx::int32)});
}

mx::array attend(const mx::array& q, const mx::array& keys, const mx::array& values, const mx::array& rows, const mx::array& offsets, float scale, int window, const std::optional<mx::array>& sinks, const KvCode& key_code, const KvCode& value_code, bool latent) {
  const std::array<Line, 2> lines{line_of(keys, key_code), line_of(values, value_code)};
  require(q.ndim() == 4, "attention: q is [batch, heads, length, dim]");
  require(lines[0].dim % 16 == 0 && lines[1].dim % 16 == 0, "attention: head dims must be multiples of 16");
  require(q.shape(3) == lines[0].dim + (latent ? lines[1].dim : 0), "attention: queries must have their keys' dim");
  require(keys.shape(1) == values.shape(1) && q.shape(1) % keys.shape(1) == 0, "attention: heads must be a multiple of the KV heads");
  require(rows.size() == size_t(q.shape(0)) && offsets.size() == rows.size(), "attention: one row and one offset for each batch row");
  require(window >= 0, "attention: window must not be negative");
  type_of(q.dtype());
  std::vector<mx::array> in{q, keys, values, as(rows, mx::int32), as(offsets, mx::int32)};
  if (sinks) {
    require(sinks->size() == size_t(q.shape(1)), "attention: one sink for each head");
    in.push_back(flat(*sinks, mx::float32));
  }
  mx::Shape shape{q.shape(0), q.shape(1), q.shape(2), lines[latent ? 0 : 1].dim};
  return mx::array(shape, q.dtype(), std::make_shared<Attend>(scale, window, lines, latent), std::move(in));
}

}  // namespace ms
