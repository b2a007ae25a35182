// A pool of helper threads for short parallel loops.
//
// Indices are claimed one by one, so the caller does the work of a helper that
// the kernel has not scheduled, and waits only for indices already claimed.
#pragma once
#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <type_traits>

namespace ms {

// Threads this process may use: its affinity mask and its cgroup's CPU quota
// (v1 and v2), at least 1.
int available_threads();

// CPUs by the smallest quota on the way from a process's cgroup to the root, 1e9 without one.
// membership: /proc/self/cgroup, mount: /sys/fs/cgroup (or a test's).
double cgroup_cpus(const std::string& membership, const std::string& mount);

class Pool {
 public:
  static Pool& get();

  int threads() const { return threads_.load(std::memory_order_relaxed); }
  void set_threads(int n);

  // f(i) for i in [0, n), in any order and on any thread; returns when all are done.
  template <class F>
  void run(int n, F&& f) {
    if (n <= 1 || threads() <= 1 || !begin()) {
      for (int i = 0; i < n; i++) f(i);
      return;
    }
    using G = std::remove_reference_t<F>;
    loop(n, [](void* a, int i) { (*static_cast<G*>(a))(i); }, const_cast<void*>(static_cast<const void*>(&f)));
  }

 private:
  using Body = void (*)(void*, int);
  Pool();
  bool begin();
  void loop(int n, Body body, void* arg);
  int claim(uint64_t generation);
  void helper();

  // generation: 24 bits | n: 20 | next index: 20
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<uint32_t> wake_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<int> threads_;
  Body body_ = nullptr;
  void* arg_ = nullptr;
  std::mutex busy_;
  int helpers_ = 0;
};

constexpr int kMaxTasks = (1 << 20) - 1;

}  // namespace ms
