// Choosing a token for each line of logits as one operation.
#include "mlx_task.h"
#include "primitives.h"

namespace ms {
namespace {
using Lines = std::shared_ptr<const std::vector<SampleLine>>;

// Where the rows of an input lie; null if it was not given.
template <class T>
struct Table {
  const T* p = nullptr;
  int64_t width = 0;
  const T* row(int i) const { return i < 0 ? nullptr : p + i * width; }
};

class Sample : public CpuPrimitive {
 public:
  Sample(Lines lines, std::vector<uint32_t> positions, std::array<int, 5> at) : CpuPrimitive("MsSample"), lines_(std::move(lines)), positions_(std::move(positions)), at_(at) {}
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    dispatch([x = View(in[0]), lines = lines_, positions = positions_, allowed = table<uint8_t>(in, 0), bias = table<float>(in, 1), ban = table<float>(in, 2),
              output = table<int32_t>(in, 3), prompt = table<int32_t>(in, 4), o = out[0].data<int32_t>()] {
      const Kernels& k = kernels();
      const bool ready = x.type == Type::f32 && x.stride.back() == 1;
      Pool::get().run(int(x.rows), [&](int i) {
        const SampleLine& line = (*lines)[i];
        const bool banned = line.ban >= 0 && positions[i] < uint32_t(line.ban_until);
        const bool edited = allowed.p || line.bias >= 0 || line.count >= 0 || banned;
        if (ready && !edited && line.temperature <= 0.f) {
          o[i] = k.argmax(reinterpret_cast<const float*>(x.row(i)), x.k);
          return;
        }
        thread_local Buffer buffer;
        float* row = buffer.get(size_t(3) * x.k);
        x.read(i, i + 1, row);
        if (edited) {
          k.edit_logits({row, x.k, allowed.p ? allowed.row(i) : nullptr, bias.row(line.bias), output.row(line.count), prompt.row(line.count),
                         line.repetition, line.presence, line.frequency, banned ? ban.row(line.ban) : nullptr});
        }
        if (line.temperature <= 0.f) {
          o[i] = k.argmax(row, x.k);
          return;
        }
        o[i] = k.draw_token({row, x.k, line.temperature, line.top_k, line.top_p, line.log_min_p, line.key0, line.key1 ^ positions[i],
                             reinterpret_cast<uint32_t*>(row + x.k), row + 2 * size_t(x.k)});
      });
    });
  }

 private:
  template <class T>
  Table<T> table(const std::vector<mx::array>& in, int which) const {
    if (at_[which] < 0) return {};
    return {in[at_[which]].data<T>(), in[at_[which]].shape(1)};
  }
  Lines lines_;
  std::vector<uint32_t> positions_;
  std::array<int, 5> at_;  // inputs of SampleArrays, -1 where there is none
};
}  // namespace

mx::array sample(const mx::array& logits, const Lines& lines, std::vector<uint32_t> positions, const SampleArrays& arrays) {
  require(logits.ndim() == 2 && logits.shape(1) > 0, "sample: logits must be [lines, vocabulary]");
  require(lines->size() == size_t(logits.shape(0)) && positions.size() == lines->size(), "sample: one description and one position for each line");
  type_of(logits.dtype());
  const int vocab = logits.shape(1);
  std::vector<mx::array> in{logits};
  std::array<int, 5> at{-1, -1, -1, -1, -1};
  auto give = [&](int which, const std::optional<mx::array>& a, mx::Dtype type, int width) {
    if (!a) return;
    require(a->ndim() == 2 && a->shape(1) >= width, "sample: tables must be [rows, vocabulary]");
    at[which] = int(in.size());
    in.push_back(flat(*a, type));
  };
  give(0, arrays.allowed, mx::uint8, (vocab + 7) / 8);
  give(1, arrays.bias, mx::float32, vocab);
  give(2, arrays.ban, mx::float32, vocab);
  give(3, arrays.output, mx::int32, vocab);
  give(4, arrays.prompt, mx::int32, vocab);
  require(!arrays.allowed || arrays.allowed->shape(0) == logits.shape(0), "sample: a mask for each line");
  auto rows = [](const std::optional<mx::array>& a) { return a ? a->shape(0) : 0; };
  for (const SampleLine& line : *lines) {
    require(line.bias < rows(arrays.bias) && line.ban < rows(arrays.ban) && line.count < std::min(rows(arrays.output), rows(arrays.prompt)), "sample: a line names a row that is not there");
    require(line.top_k >= 0, "sample: top_k must not be negative");
  }
  return mx::array({logits.shape(0)}, mx::int32, std::make_shared<Sample>(lines, std::move(positions), at), std::move(in));
}
}  // namespace ms
