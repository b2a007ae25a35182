// What this machine's cores and memory can do at most: f32 fused multiply-adds,
// int8 dot products (VNNI), and reading memory. Prints one line of JSON.
//
//     g++ -O3 -march=native -std=c++20 -pthread peaks.cpp -o peaks && ./peaks [THREADS]
#include <immintrin.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

namespace {
using Clock = std::chrono::steady_clock;
constexpr double kSeconds = 0.4;

// Work per second of all threads together: `step` returns how much it did.
double rate(int threads, const std::function<double(int)>& step) {
  std::vector<double> done(size_t(threads), 0.0);
  std::vector<std::thread> pool;
  const auto until = Clock::now() + std::chrono::duration<double>(kSeconds);
  const auto began = Clock::now();
  for (int t = 0; t < threads; t++)
    pool.emplace_back([&, t] {
      while (Clock::now() < until) done[size_t(t)] += step(t);
    });
  for (auto& t : pool) t.join();
  double total = 0;
  for (double d : done) total += d;
  return total / std::chrono::duration<double>(Clock::now() - began).count();
}

volatile int sink_i;

// Twelve chains of one instruction, in registers that no compiler may spill. The sources are zero:
// no sum overflows or becomes denormal.
#if defined(__AVX512F__)
#define V "zmm"
constexpr int kBytes = 64;
#else
#define V "ymm"
constexpr int kBytes = 32;
#endif
#define ON(op, n) op " %%" V "14, %%" V "15, %%" V #n "\n\t"
#define CHAINS(op)                                                                                  \
  ON(op, 0) ON(op, 1) ON(op, 2) ON(op, 3) ON(op, 4) ON(op, 5) ON(op, 6) ON(op, 7) ON(op, 8) ON(op, 9) \
  ON(op, 10) ON(op, 11)
#define CLOBBERED                                                                                     \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
      "xmm14", "xmm15"
constexpr int kChains = 12, kLoops = 20000;

void clear() { asm volatile("vzeroall" ::: CLOBBERED); }

double fma_flops(int) {
  clear();
  for (int i = 0; i < kLoops; i++) asm volatile(CHAINS("vfmadd231ps")::: CLOBBERED);
  return 2.0 * (kBytes / 4) * kChains * kLoops;
}

double int8_ops(int) {
#if defined(__AVX512VNNI__)
  clear();
  for (int i = 0; i < kLoops; i++) asm volatile(CHAINS("vpdpbusd")::: CLOBBERED);
  return 2.0 * kBytes * kChains * kLoops;
#else
  return 0;
#endif
}
}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? atoi(argv[1]) : int(std::thread::hardware_concurrency());
  const size_t bytes = size_t(256) << 20;
  std::vector<std::vector<char>> memory(size_t(threads), std::vector<char>(bytes, 1));
  auto read = [&](int t) {
    const auto* p = reinterpret_cast<const __m256i*>(memory[size_t(t)].data());
    __m256i s[4] = {};
    for (size_t i = 0; i + 4 <= bytes / 32; i += 4)
      for (int j = 0; j < 4; j++) s[j] = _mm256_add_epi64(s[j], _mm256_loadu_si256(p + i + size_t(j)));
    for (auto& x : s) sink_i = _mm256_extract_epi32(x, 0);
    return double(bytes);
  };
  std::printf("{\"threads\": %d, \"f32_gflops\": %.1f, \"int8_gops\": %.1f, \"dram_gb_s\": %.2f}\n", threads, rate(threads, fma_flops) / 1e9,
              rate(threads, int8_ops) / 1e9, rate(threads, read) / 1e9);
}
