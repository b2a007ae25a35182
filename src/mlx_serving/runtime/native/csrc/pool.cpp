#include "pool.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ms {
namespace {
using Clock = std::chrono::steady_clock;
constexpr auto kSpin = std::chrono::microseconds(40);

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::string read_file(const std::string& path) {
  std::ifstream in(path);
  std::stringstream s;
  s << in.rdbuf();
  return s.str();
}

double ratio(const std::string& quota, const std::string& period) {
  try {
    const double q = std::stod(quota), p = std::stod(period);
    return q > 0 && p > 0 ? q / p : 1e9;
  } catch (const std::exception&) {  // "max", or no such file
    return 1e9;
  }
}

}  // namespace

double cgroup_cpus(const std::string& membership, const std::string& mount) {
  double cpus = 1e9;
  std::istringstream lines(read_file(membership));
  std::string line;
  auto each_level = [&](const std::string& root, std::string path, auto&& limit) {
    for (;;) {
      cpus = std::min(cpus, limit(root + path));
      if (path.empty() || path == "/") break;
      const size_t slash = path.find_last_of('/');
      path.resize(slash == std::string::npos ? 0 : slash);
    }
  };
  while (std::getline(lines, line)) {
    const size_t a = line.find(':'), b = line.find(':', a + 1);
    if (a == std::string::npos || b == std::string::npos) continue;
    const std::string controllers = "," + line.substr(a + 1, b - a - 1) + ",", path = line.substr(b + 1);
    if (controllers == ",,") {
      each_level(mount, path, [](const std::string& dir) {
        std::istringstream s(read_file(dir + "/cpu.max"));
        std::string quota, period;
        s >> quota >> period;
        return ratio(quota, period);
      });
    } else if (controllers.find(",cpu,") != std::string::npos) {
      for (const char* root : {"/cpu", "/cpu,cpuacct"}) {
        each_level(mount + root, path, [](const std::string& dir) {
          return ratio(read_file(dir + "/cpu.cfs_quota_us"), read_file(dir + "/cpu.cfs_period_us"));
        });
      }
    }
  }
  return cpus;
}

int available_threads() {
  int n = int(std::max(1u, std::thread::hardware_concurrency()));
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) n = std::max(1, CPU_COUNT(&set));
  n = std::min(n, int(std::min(1e6, std::ceil(cgroup_cpus("/proc/self/cgroup", "/sys/fs/cgroup")))));
#endif
  return std::clamp(n, 1, 256);
}

// Never destroyed: helpers outlive static destruction.
Pool& Pool::get() {
  static Pool* pool = new Pool;
  return *pool;
}

Pool::Pool() : threads_(available_threads()) {}

void Pool::set_threads(int n) { threads_.store(std::clamp(n, 1, 256)); }

bool Pool::begin() {
  // A second caller works alone rather than wait for the first.
  if (!busy_.try_lock()) return false;
  for (const int want = threads() - 1; helpers_ < want; helpers_++) {
    try {
      std::thread([this] { helper(); }).detach();
    } catch (const std::system_error&) {
      break;  // fewer helpers: the callers do their share
    }
  }
  return true;
}

int Pool::claim(uint64_t generation) {
  uint64_t s = state_.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t n = (s >> 20) & 0xfffff, i = s & 0xfffff;
    if (s >> 40 != generation || i >= n) return -1;
    if (state_.compare_exchange_weak(s, s + 1, std::memory_order_acq_rel)) return int(i);
  }
}

void Pool::loop(int n, Body body, void* arg) {
  body_ = body;
  arg_ = arg;
  done_.store(0, std::memory_order_relaxed);
  const uint64_t generation = ((state_.load(std::memory_order_relaxed) >> 40) + 1) & 0xffffff;
  state_.store(generation << 40 | uint64_t(n) << 20, std::memory_order_seq_cst);
  wake_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst)) wake_.notify_all();
  int mine = 0;
  for (int i; (i = claim(generation)) >= 0; mine++) body(arg, i);
  for (int spins = 0; done_.load(std::memory_order_acquire) + mine < n; spins++) {
    if (spins < 4000) relax();
    else std::this_thread::yield();
  }
  busy_.unlock();
}

void Pool::helper() {
  uint64_t seen = 0;
  for (;;) {
    auto idle_since = Clock::now();
    for (int spins = 0; state_.load(std::memory_order_acquire) >> 40 == seen; spins++) {
      relax();
      if (spins % 64 != 63 || Clock::now() - idle_since < kSpin) continue;
      const uint32_t w = wake_.load(std::memory_order_seq_cst);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      if (state_.load(std::memory_order_seq_cst) >> 40 == seen) wake_.wait(w, std::memory_order_seq_cst);
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      idle_since = Clock::now();
    }
    seen = state_.load(std::memory_order_acquire) >> 40;
    for (int i; (i = claim(seen)) >= 0;) {
      body_(arg_, i);
      done_.fetch_add(1, std::memory_order_release);
    }
  }
}
}  // namespace ms
