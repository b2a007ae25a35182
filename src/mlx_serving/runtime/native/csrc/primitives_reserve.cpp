// Slabs as address space: a page of one takes memory when something is first written there.
#include <sys/mman.h>
#include <unistd.h>

#include <new>

#include "mlx_task.h"
#include "primitives.h"

namespace ms {
namespace {
size_t page() {
  static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
  return bytes;
}

// MLX's CPU allocator gives what malloc gave, an array's size before its data. What its other
// allocators give is no memory of ours to advise on.
bool is_plain_memory() {
  static const bool plain = [] {
    const mx::allocator::Data d = mx::allocator::malloc(64);
    mx::allocator::Buffer b = d.buffer();
    const size_t* head = static_cast<const size_t*>(b.ptr());
    // One from MLX's cache of freed memory may be larger.
    return head && b.raw_ptr() == static_cast<const void*>(head + 1) && *head >= 64 && *head <= 4096;
  }();
  return plain;
}

// Zeros again, and no memory but for what shares a page with something else.
void clear(char* first, size_t bytes) {
  char* last = first + bytes;
  char* a = first + (page() - reinterpret_cast<uintptr_t>(first) % page()) % page();
  char* b = last - reinterpret_cast<uintptr_t>(last) % page();
  if (a >= b) {
    memset(first, 0, bytes);
    return;
  }
  // A huge page would take the memory of many positions for one.
  madvise(a, size_t(b - a), MADV_NOHUGEPAGE);
  if (madvise(a, size_t(b - a), MADV_DONTNEED)) memset(a, 0, size_t(b - a));
  memset(first, 0, size_t(a - first));
  memset(b, 0, size_t(last - b));
}

class GiveBack : public CpuPrimitive {
 public:
  explicit GiveBack(int row) : CpuPrimitive("MsGiveBack"), row_(row) {}
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    std::vector<std::pair<char*, size_t>> parts;
    for (size_t i = 0; i < in.size(); i++) {
      bool copied;
      take(in[i], out[i], copied);
      if (copied) throw std::invalid_argument("native: a slab that is given back must be whole");
      const size_t bytes = out[i].nbytes() / size_t(out[i].shape(0));
      parts.emplace_back(out[i].data<char>() + row_ * bytes, bytes);
    }
    dispatch([parts = std::move(parts)] {
      for (auto [first, bytes] : parts) clear(first, bytes);
    });
  }

 private:
  int row_;
};

// The first positions of rows, or rows whole, written where they lie. MLX's own update of a slice copies
// the array while a step in flight holds it: all of its address space.
class Put : public CpuPrimitive {
 public:
  explicit Put(std::vector<int> rows) : CpuPrimitive("MsPut"), rows_(std::move(rows)) {}
  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    bool copied;
    take(in[0], out[0], copied);
    if (copied) throw std::invalid_argument("native: what is written in place must be whole");
    const mx::array &to = out[0], &from = in[1];
    // Whole rows are one part; else each head's positions are.
    const bool whole = std::equal(from.shape().begin() + 1, from.shape().end(), to.shape().begin() + 1);
    const size_t parts = whole ? 1 : size_t(to.shape(1));
    const size_t bytes = from.nbytes() / (rows_.size() * parts), stride = to.nbytes() / (size_t(to.shape(0)) * parts);
    dispatch([rows = rows_, src = from.data<char>(), dst = out[0].data<char>(), parts, bytes, stride] {
      for (size_t i = 0; i < rows.size(); i++)
        for (size_t j = 0; j < parts; j++) memcpy(dst + (size_t(rows[i]) * parts + j) * stride, src + (i * parts + j) * bytes, bytes);
    });
  }

 private:
  std::vector<int> rows_;
};
}  // namespace

bool can_reserve(size_t bytes, int pieces) {
  if (!is_plain_memory() || pieces < 1) return false;
  const size_t each = bytes / size_t(pieces) + page();
  std::vector<void*> got;
  for (int i = 0; i < pieces; i++) {
    void* p = mmap(nullptr, each, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) break;
    got.push_back(p);
  }
  for (void* p : got) munmap(p, each);
  return int(got.size()) == pieces;
}

mx::array reserve(const mx::Shape& shape, mx::Dtype dtype) {
  require(is_plain_memory(), "reserve: MLX's memory is of another kind");
  size_t bytes = size_of(dtype);
  for (int n : shape)
    if (__builtin_mul_overflow(bytes, size_t(n), &bytes)) throw std::bad_alloc();
  // MLX goes on counting what it could not allocate.
  if (!can_reserve(bytes, 1)) throw std::bad_alloc();
  // By MLX's own allocator: only such an array is ever written in place.
  mx::allocator::Data data = mx::allocator::malloc(bytes);
  mx::allocator::Buffer buffer = data.buffer();
  if (!buffer.ptr()) throw std::bad_alloc();
  clear(static_cast<char*>(buffer.raw_ptr()), bytes);
  return mx::array(std::move(data), shape, dtype);
}

std::vector<mx::array> give_back(const std::vector<mx::array>& slabs, int row) {
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> types;
  for (auto& a : slabs) {
    require(a.ndim() > 0 && row >= 0 && row < a.shape(0), "give_back: slabs [rows, ...] that have the row");
    shapes.push_back(a.shape());
    types.push_back(a.dtype());
  }
  return mx::array::make_arrays(std::move(shapes), types, std::make_shared<GiveBack>(row), slabs);
}

mx::array put(const mx::array& target, const mx::array& value, const std::vector<int>& rows) {
  require(target.ndim() > 0 && value.ndim() == target.ndim() && value.dtype() == target.dtype(), "put: a value of the target's dtype and number of axes");
  require(!rows.empty() && size_t(value.shape(0)) == rows.size() && value.size() > 0, "put: a row for each of the value's");
  for (int row : rows) require(row >= 0 && row < target.shape(0), "put: rows that the target has");
  for (int i = 1; i < int(target.ndim()); i++)
    require(value.shape(i) == target.shape(i) || (i == 2 && value.shape(i) < target.shape(i)), "put: rows whole, or their first positions along axis 2");
  return mx::array(target.shape(), target.dtype(), std::make_shared<Put>(rows), {target, mx::contiguous(value, false, cpu())});
}

}  // namespace ms
