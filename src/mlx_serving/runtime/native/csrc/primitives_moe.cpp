// Matmul of rows that each name an expert.
#include <numeric>

#include "mlx_task.h"
#include "primitives.h"

namespace ms {
namespace {
// Rows in the order of their experts.
struct Routing {
  std::vector<int> rows;   // row of the input at each place
  std::vector<int> begin;  // [experts + 1] first place of each expert
  Routing(const std::vector<int32_t>& experts, int count) : rows(experts.size()), begin(size_t(count) + 1, 0) {
    for (int32_t e : experts) {
      if (e < 0 || e >= count) throw std::out_of_range("native: no such expert");
      begin[size_t(e) + 1]++;
    }
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    std::vector<int> next(begin.begin(), begin.end() - 1);
    for (size_t r = 0; r < experts.size(); r++) rows[next[experts[r]]++] = int(r);
  }
};

class GatherLinear : public CpuPrimitive {
 public:
  GatherLinear(PackedPtr w, int n, Mode mode) : CpuPrimitive("MsGatherLinear"), w_(std::move(w)), n_(n), mode_(mode) {}
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    allocate(out[0]);
    dispatch([x = View(in[0]), experts = Ints(in[1]), w = w_->weight(), n = n_, mode = mode_, o = out[0].data<char>(), t = type_of(out[0].dtype())] {
      run(x, Routing(experts.read(), w.n / n), w, n, mode, o, t);
    });
  }

 private:
  static void run(const View& x, const Routing& routing, const Weight& w, int n, Mode mode, char* o, Type t) {
    thread_local Buffer inputs, outputs;
    thread_local Prepared prepared;
    Prepared& prep = prepared;  // named in a lambda, a thread_local would be the helper's own
    const int rows = int(x.rows);
    float *xs = inputs.get(size_t(rows) * x.k), *ys = outputs.get(size_t(rows) * n);
    prep.reset(xs, rows, w, mode);
    parallel_rows(rows, x.rows * x.k, [&](int r0, int r1) {
      for (int r = r0; r < r1; r++) x.read(routing.rows[r], routing.rows[r] + 1, xs + int64_t(r) * x.k);
      prep.rows(r0, r1);
    });
    gathered_matmul(w, n, prep.view(), mode, routing.begin, ys);
    const Kernels& k = kernels();
    parallel_rows(rows, int64_t(rows) * n, [&](int r0, int r1) {
      for (int r = r0; r < r1; r++) k.from_float(t, ys + int64_t(r) * n, o + int64_t(routing.rows[r]) * n * size_of(t), n);
    });
  }
  PackedPtr w_;
  int n_;
  Mode mode_;
};
}  // namespace

mx::array gather_linear(const mx::array& x, const mx::array& experts, const PackedPtr& w, int n, const std::string& mode) {
  require(x.ndim() >= 1 && x.shape(-1) == w->k(), "gather_linear: the last axis of x must be the weight's inputs");
  require(n > 0 && n % kLanes == 0 && w->n() % n == 0, "gather_linear: each expert's outputs must be a multiple of 16");
  auto shape = x.shape();
  shape.pop_back();
  require(experts.shape() == shape, "gather_linear: an expert for each row of x");
  type_of(x.dtype());
  shape.push_back(n);
  return mx::array(shape, x.dtype(), std::make_shared<GatherLinear>(w, n, mode_of(mode)), {x, mx::reshape(flat(experts, mx::int32), {-1}, cpu()), w->data()});
}
}  // namespace ms
