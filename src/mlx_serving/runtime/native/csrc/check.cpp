// The kernels without MLX or Python, between inaccessible pages: an access past
// either end of any operand is a fault. Also what the sanitizers build
// (tests/unit/runtime/native/test_memory.py). Exits 0, or says what differs.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "decoder.h"

namespace {
using namespace ms;

// n elements that end at an inaccessible page, or begin after one.
template <class T>
class Guarded {
 public:
  Guarded(size_t n, bool at_end) : n_(n) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = n * sizeof(T);
    size_ = (bytes + page - 1) / page * page + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) abort();
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + size_ - page, page, PROT_NONE);
    p_ = reinterpret_cast<T*>(at_end ? base_ + size_ - page - bytes : base_ + page);
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  T* get() { return p_; }
  size_t size() const { return n_; }

 private:
  size_t n_, size_;
  char* base_;
  T* p_;
};

uint32_t state = 1;
float noise() {
  state = state * 1664525u + 1013904223u;
  return float(int32_t(state >> 8) - (1 << 23)) / float(1 << 23);
}
void fill(Guarded<float>& g) {
  for (size_t i = 0; i < g.size(); i++) g.get()[i] = noise();
}

int failures = 0;
void expect(bool ok, const std::string& what) {
  if (!ok) {
    failures++;
    std::printf("%s: %s\n", kernels().name, what.c_str());
  }
}

void check_matmul(bool end, int n, int k, int bits, int group, int rows, Type scale_type, Mode mode, Codes codes = Codes::affine) {
  Weight w;
  w.n = n, w.k = k, w.bits = bits, w.group = group, w.scale_type = scale_type, w.codes = codes;
  Guarded<uint8_t> data(w.bytes(), end);
  memset(data.get(), 0, w.bytes());
  for (size_t i = 0; i < w.bytes(); i++) {
    // Small scales of any type: only bytes of codes are random.
    data.get()[i] = bits <= 8 && i % w.group_bytes() >= w.affine_bytes() ? uint8_t(128 + int(noise() * 127)) : 0;
  }
  if (bits <= 8) {
    const float s = codes == Codes::fp8 ? 0.01f : 0.5f, b = -0.25f;
    for (size_t g = 0; g < w.bytes(); g += w.group_bytes())
      for (int c = 0; c < kLanes; c++) {
        kernels().from_float(scale_type, &s, data.get() + g + c * size_of(scale_type), 1);
        if (codes != Codes::fp8) kernels().from_float(scale_type, &b, data.get() + g + (kLanes + c) * size_of(scale_type), 1);
      }
  } else {
    for (size_t i = 0; i < w.bytes(); i += size_of(scale_type)) {
      const float v = noise();
      kernels().from_float(scale_type, &v, data.get() + i, 1);
    }
  }
  w.data = data.get();
  Guarded<float> x(size_t(rows) * k, end), out(size_t(rows) * n, end), row(k, end);
  fill(x);
  Activations a;
  a.x = x.get(), a.k = k, a.group = group;
  const size_t groups = size_t(rows) * std::max(1, w.groups());
  Guarded<int8_t> hi(size_t(rows) * k, end), lo(size_t(rows) * k, end);
  Guarded<float> scale(groups, end), sum(groups, end);
  a.hi = hi.get(), a.lo = lo.get(), a.scale = scale.get(), a.sum = sum.get();
  if (w.integers()) kernels().quantize(a, mode, 0, rows);
  kernels().matmul(w, a, mode, 0, w.blocks(), 0, rows, out.get(), n);
  const double step = mode == Mode::fast ? 5e-3 : 4e-5;  // of the largest input, 1
  for (int c = 0; c < n; c++) {
    kernels().dequantize_row(w, c, row.get());
    for (int r = 0; r < rows; r++) {
      double want = 0, total = 1;
      for (int i = 0; i < k; i++) total += std::fabs(row.get()[i]);
      for (int i = 0; i < k; i++) want += double(x.get()[size_t(r) * k + i]) * row.get()[i];
      expect(std::fabs(want - out.get()[size_t(r) * n + c]) < step * total, "matmul " + std::to_string(n) + "x" + std::to_string(k));
    }
  }
}

// Rows of several experts together, and each expert's alone.
void check_experts(bool end, int rows) {
  const int experts = 3, n = 32, k = 48;
  Weight w;
  w.n = experts * n, w.k = k, w.bits = 32, w.scale_type = Type::f32;
  Guarded<float> data(w.bytes() / 4, end), x(size_t(rows) * k, end), out(size_t(rows) * n, end), one(size_t(rows) * n, end);
  fill(data), fill(x);
  w.data = reinterpret_cast<uint8_t*>(data.get());
  Activations a;
  a.x = x.get(), a.k = k;
  const std::vector<int> begin{0, rows / 2, rows / 2, rows};  // the second has none
  gathered_matmul(w, n, a, Mode::f32, begin, out.get());
  for (int e = 0; e < experts; e++) {
    Weight expert = w;
    expert.n = n, expert.data = w.data + size_t(e) * n / kLanes * w.block_bytes();
    if (begin[e] < begin[e + 1]) kernels().matmul(expert, a, Mode::f32, 0, expert.blocks(), begin[e], begin[e + 1], one.get(), n);
  }
  expect(memcmp(one.get(), out.get(), size_t(rows) * n * 4) == 0, "experts together and alone differ");
}

void check_rows(bool end, int k) {
  Guarded<float> x(k, end), y(k, end), w(k, end), out(k, end), table(2 * size_t(k), end);
  Guarded<uint16_t> half(k, end);
  fill(x), fill(y), fill(w), fill(table);
  kernels().rms_norm(x.get(), y.get(), w.get(), 1e-5f, out.get(), k);
  kernels().act_mul(Act::silu, x.get(), y.get(), out.get(), k);
  kernels().act_mul(Act::gelu_erf, x.get(), y.get(), out.get(), k);
  kernels().add(x.get(), y.get(), k);
  kernels().scale(x.get(), 2.f, out.get(), k);
  for (Type t : {Type::f16, Type::bf16}) {
    kernels().from_float(t, x.get(), half.get(), k);
    kernels().to_float(t, half.get(), 1, out.get(), k);
    for (int i = 0; i < k; i++) expect(std::fabs(out.get()[i] - x.get()[i]) < 0.02f, "conversion");
  }
  if (k % 2 == 0) {
    Guarded<float> traditional(2 * size_t(k), end), halves(k, end);
    fill(traditional), fill(halves);
    kernels().rope(x.get(), traditional.get(), k, true);
    kernels().rope(x.get(), halves.get(), k, false);
  }
}

Line plain(Type type, int dim) {
  Line line;
  line.type = type, line.dim = dim;
  return line;
}
Line coded(Type type, int dim, int bits, int group) {
  Line line = plain(type, dim);
  line.bits = bits, line.group = group;
  return line;
}

void check_line(bool end, const Line& line) {
  Guarded<float> x(line.dim, end), y(line.dim, end);
  Guarded<uint8_t> kept(line.bytes(), end);
  for (float poison : {0.f, INFINITY, NAN}) {
    fill(x);
    x.get()[line.group + 3] += poison;
    kernels().encode_line(line, x.get(), kept.get());
    kernels().decode_line(line, kept.get(), y.get());
    for (int i = 0; i < line.dim; i++) {
      const bool spoiled = poison != 0.f && i / line.group == 1;
      // A step, since the codes may miss one end of the range, and what the type of the scale rounds.
      const float most = 2.2f / float((1 << line.bits) - 1) + (line.type == Type::f32 ? 1e-6f : 1.6e-2f);
      expect(spoiled ? std::isnan(y.get()[i]) : std::fabs(x.get()[i] - y.get()[i]) <= most, "a line of " + std::to_string(line.bits) + " bits");
    }
  }
}

void check_attention(bool end, const Line& kl, const Line& vl, int length, int offset, int window, bool latent = false) {
  const int heads = 6, kv = 2, capacity = offset + length, d = latent ? kl.dim + vl.dim : kl.dim, dv = latent ? kl.dim : vl.dim;
  Guarded<uint8_t> k(size_t(kv) * capacity * kl.bytes(), end), v(size_t(kv) * capacity * vl.bytes(), end);
  Guarded<float> q(size_t(length) * heads * d, end), out(size_t(length) * heads * dv, end), one(size_t(heads) * dv, end);
  fill(q);
  auto slab = [&](Guarded<uint8_t>& p, const Line& line) {
    std::vector<float> x(line.dim);
    for (size_t at = 0; at < p.size(); at += line.bytes()) {
      for (float& f : x) f = noise();
      kernels().encode_line(line, x.data(), p.get() + at);
    }
    Slab s;
    s.data = reinterpret_cast<char*>(p.get()), s.line = line, s.rows = 1, s.heads = kv, s.capacity = capacity;
    s.pos_stride = int64_t(line.bytes()), s.head_stride = capacity * s.pos_stride, s.row_stride = kv * s.head_stride;
    return s;
  };
  const Slab ks = slab(k, kl), vs = slab(v, vl);
  const int32_t row = 0, start = offset;
  attention(q.get(), ks, vs, {&row, &start, 1, length}, {heads, 0.3f, window, nullptr, latent}, out.get());
  for (int i = 0; i < length; i += 5) {
    const int32_t at = offset + i;
    attention(q.get() + size_t(i) * heads * d, ks, vs, {&row, &at, 1, 1}, {heads, 0.3f, window, nullptr, latent}, one.get());
    expect(memcmp(one.get(), out.get() + size_t(i) * heads * dv, size_t(heads) * dv * 4) == 0, "decode and chunk differ");
  }
}
void check_sampling(bool end, int n) {
  Guarded<float> x(n, end), bias(n, end), ban(n, end), scratch(n, end);
  Guarded<int32_t> output(n, end), prompt(n, end);
  Guarded<uint8_t> allowed((n + 7) / 8, end);
  Guarded<uint32_t> words(n, end);
  memset(allowed.get(), 0xff, allowed.size());
  for (int i = 0; i < n; i++) bias.get()[i] = noise(), output.get()[i] = i % 3, prompt.get()[i] = i % 2, ban.get()[i] = i % 7 ? 0.f : -INFINITY;
  for (int top_k : {0, 1, n / 2})
    for (float top_p : {1.f, 0.5f})
      for (float min_p : {-INFINITY, -3.f}) {
        fill(x);
        kernels().edit_logits({x.get(), n, allowed.get(), bias.get(), output.get(), prompt.get(), 1.2f, 0.1f, 0.2f, ban.get()});
        int want = 0;
        for (int i = 0; i < n; i++) want = x.get()[i] > x.get()[want] ? i : want;
        expect(kernels().argmax(x.get(), n) == want, "argmax of " + std::to_string(n));
        const int got = kernels().draw_token({x.get(), n, 0.7f, top_k, top_p, min_p, 5u, uint32_t(n), words.get(), scratch.get()});
        expect(got >= 0 && got < n && (top_k != 1 || got == want), "draw of " + std::to_string(n));
      }
}

// Everything, with the instruction set in use.
void check_matmuls(bool end, const std::vector<int>& rows_of_each) {
  for (int rows : rows_of_each)
    for (Type t : {Type::f32, Type::f16, Type::bf16}) {
      for (int bits : {4, 8})
        for (int group : {32, 64, 128})
          for (Mode m : {Mode::exact, Mode::fast, Mode::f32}) check_matmul(end, 37, 2 * group, bits, group, rows, t, m);
      for (Mode m : {Mode::exact, Mode::fast, Mode::f32}) {
        check_matmul(end, 37, 64, 4, 32, rows, t, m, Codes::fp4);
        check_matmul(end, 37, 48, 4, 16, rows, t, m, Codes::fp4);
      }
      check_matmul(end, 83, 96, 8, 32, rows, t, Mode::f32, Codes::fp8);
      check_matmul(end, 83, 19, t == Type::f32 ? 32 : 16, 0, rows, t, Mode::exact);
    }
}

void check_others(bool end) {
  for (int rows : {1, 5, 40}) check_experts(end, rows);
  for (int k : {1, 2, 15, 16, 17, 31, 32, 46, 64, 100}) check_rows(end, k);
  for (int n : {1, 2, 15, 16, 17, 100, 1024, 1025, 2050}) check_sampling(end, n);
  for (Type t : {Type::f32, Type::f16, Type::bf16})
    for (int window : {0, 3, 70})
      for (int length : {1, 7, 37}) {
        check_attention(end, plain(t, 32), plain(t, 16), length, 0, window);
        check_attention(end, plain(t, 16), plain(t, 48), length, 61, window);
        check_attention(end, plain(t, 64), plain(t, 64), length, 300, window);
        check_attention(end, coded(t, 64, 8, 64), coded(t, 96, 4, 32), length, 61, window);
        check_attention(end, coded(t, 32, 4, 32), plain(t, 16), length, 0, window);
        check_attention(end, plain(t, 32), plain(t, 16), length, 61, window, true);
        check_attention(end, coded(t, 64, 8, 64), coded(t, 32, 4, 32), length, 300, window, true);
      }
  for (Type t : {Type::f32, Type::f16, Type::bf16})
    for (int bits : {4, 8})
      for (int group : {32, 64}) check_line(end, coded(t, 3 * group, bits, group));
}
}  // namespace

#if defined(MS_X86)
extern "C" int emulate_amx();
int check_amx();
#endif

int main() {
  const std::string names = isa_names();
  std::printf("%s\n", names.c_str());
  for (size_t at = 0; at < names.size();) {
    const size_t comma = std::min(names.find(',', at), names.size());
    if (!force_isa(names.substr(at, comma - at).c_str())) return 2;
    at = comma + 1;
    for (bool end : {true, false}) check_matmuls(end, {1, 3, 8, 15}), check_others(end);
  }
#if defined(MS_X86)
  const bool emulated = names.find("avx512") != std::string::npos && emulate_amx();
  if (emulated || amx_use().on) {
    std::printf("amx%s\n", emulated ? ", emulated" : "");
    failures += check_amx();
    if (!force_isa("amx", emulated)) return 2;
    for (bool end : {true, false}) check_matmuls(end, {16, 19, 23});
  }
#endif
  std::printf(failures ? "%d checks failed\n" : "ok\n", failures);
  return failures ? 1 : 0;
}
