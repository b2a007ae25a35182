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

volatile float sink_f;
volatile int sink_i;

#if defined(__AVX512F__)
constexpr int kFloats = 16;
using vf = __m512;
vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
vf one(float x) { return _mm512_set1_ps(x); }
float first(vf a) { return _mm512_cvtss_f32(a); }
#else
constexpr int kFloats = 8;
using vf = __m256;
vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
vf one(float x) { return _mm256_set1_ps(x); }
float first(vf a) { return _mm256_cvtss_f32(a); }
#endif

double fma_flops(int) {
  constexpr int kChains = 16, kLoops = 20000;
  vf acc[kChains], a = one(1.0000001f), b = one(1e-9f);
  for (auto& x : acc) x = one(1.f);
  for (int i = 0; i < kLoops; i++)
    for (auto& x : acc) x = fma(x, a, b);
  for (auto& x : acc) sink_f = first(x);
  return 2.0 * kFloats * kChains * kLoops;
}

double int8_ops(int) {
#if defined(__AVX512VNNI__)
  constexpr int kChains = 16, kLoops = 20000;
  __m512i acc[kChains], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(2);
  for (auto& x : acc) x = _mm512_setzero_si512();
  for (int i = 0; i < kLoops; i++)
    for (auto& x : acc) {
      x = _mm512_dpbusd_epi32(x, a, b);
      asm volatile("" : "+v"(x));
    }
  for (auto& x : acc) sink_i = _mm512_reduce_add_epi32(x);
  return 2.0 * 64 * kChains * kLoops;
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
