// The part of check.cpp that is AMX's: the emulator against plain C, what it
// refuses, and the kernel against VNNI's; on a CPU with AMX, that CPU instead.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "amx.h"
#include "ops.h"

extern "C" int tiles_left();

namespace ms_amx {
extern const ms::Kernels table;
}
namespace ms_avx512 {
extern const ms::Kernels table;
}

namespace {
using namespace ms;

int failures = 0;
void expect(bool ok, const char* what) {
  if (ok) return;
  failures++;
  std::printf("amx: %s\n", what);
}

uint32_t state = 7;
uint8_t noise() { return uint8_t((state = state * 1664525u + 1013904223u) >> 23); }

// Tile 0: sums, 1 and 2: factors.
struct Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  Config(int m, int k, int n) {
    bytes[0] = bytes[2] = uint16_t(4 * n), bytes[1] = uint16_t(k);
    rows[0] = rows[1] = uint8_t(m), rows[2] = uint8_t(k / 4);
  }
  void load() const { asm volatile("ldtilecfg %0" : : "m"(*this)); }
};
static_assert(sizeof(Config) == 64);

struct Variant {
  bool signed_a, signed_b;
  void (*run)();
};
const Variant variants[] = {
    {true, true, [] { asm volatile("tdpbssd %tmm2, %tmm1, %tmm0"); }},
    {true, false, [] { asm volatile("tdpbsud %tmm2, %tmm1, %tmm0"); }},
    {false, true, [] { asm volatile("tdpbusd %tmm2, %tmm1, %tmm0"); }},
    {false, false, [] { asm volatile("tdpbuud %tmm2, %tmm1, %tmm0"); }},
};

int value(uint8_t byte, bool is_signed) { return is_signed ? int8_t(byte) : byte; }

constexpr int kStride = 80;  // tiles lie in memory with room between their rows
using Memory = std::vector<uint8_t>;
Memory random_memory() {
  Memory x(16 * kStride);
  for (uint8_t& byte : x) byte = noise();
  return x;
}

// The sums [m, n] and twice the product [m, k] x [k / 4, n, 4], in plain C.
Memory plain(const Variant& v, Memory sums, const Memory& a, const Memory& b, int m, int k, int n) {
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      int32_t total;
      memcpy(&total, &sums[i * kStride + 4 * j], 4);
      for (int h = 0; h < k; h++) {
        total = int32_t(uint32_t(total) + 2u * uint32_t(value(a[i * kStride + h], v.signed_a) * value(b[h / 4 * kStride + 4 * j + h % 4], v.signed_b)));
      }
      memcpy(&sums[i * kStride + 4 * j], &total, 4);
    }
  return sums;
}

void check_product(const Variant& v, int m, int k, int n) {
  Memory sums = random_memory(), a = random_memory(), b = random_memory();
  const Memory want = plain(v, sums, a, b, m, k, n);
  const Config config(m, k, n);
  Config stored(1, 4, 1);
  config.load();
  // Addresses with and without a displacement and a scale.
  asm volatile("tileloadd (%0,%1,1), %%tmm0" : : "r"(sums.data()), "r"(int64_t(kStride)) : "memory");
  asm volatile("tileloadd 16(%0,%1,2), %%tmm1" : : "r"(a.data() - 16), "r"(int64_t(kStride / 2)) : "memory");
  asm volatile("tileloaddt1 -4096(%0,%1,8), %%tmm2" : : "r"(b.data() + 4096), "r"(int64_t(kStride / 8)) : "memory");
  v.run(), v.run();
  asm volatile("tilestored %%tmm0, (%0,%1,1)" : : "r"(sums.data()), "r"(int64_t(kStride)) : "memory");
  asm volatile("sttilecfg %0" : "=m"(stored));
  asm volatile("tilezero %tmm1");
  asm volatile("tilestored %%tmm1, (%0,%1,1)" : : "r"(a.data()), "r"(int64_t(kStride)) : "memory");
  asm volatile("tilerelease");
  expect(sums == want, "a product, or what lies beside it");
  expect(memcmp(&stored, &config, sizeof(config)) == 0, "the configuration that is stored");
  for (int i = 0; i < m; i++)
    for (int h = 0; h < k; h++) expect(a[i * kStride + h] == 0, "a tile of zeros");
}

// What the manual makes a fault ends the process.
void check_fault(const char* what, void (*wrong)()) {
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    wrong();
    _exit(0);
  }
  int status = 0;
  expect(child > 0 && waitpid(child, &status, 0) == child && WIFSIGNALED(status), what);
}

void check_faults() {
  check_fault("another palette", [] { Config c(16, 64, 16); c.palette = 2, c.load(); });
  check_fault("17 rows", [] { Config c(16, 64, 16); c.rows[0] = 17, c.load(); });
  check_fault("rows of 65 bytes", [] { Config c(16, 64, 16); c.bytes[0] = 65, c.load(); });
  check_fault("rows of no bytes", [] { Config c(16, 64, 16); c.bytes[0] = 0, c.load(); });
  check_fault("a ninth tile", [] { Config c(16, 64, 16); c.bytes[8] = 64, c.rows[8] = 16, c.load(); });
  check_fault("reserved bytes", [] { Config c(16, 64, 16); c.reserved[3] = 1, c.load(); });
  check_fault("no configuration", [] { asm volatile("tilezero %tmm0"); });
  check_fault("released tiles", [] { Config(16, 64, 16).load(); asm volatile("tilerelease\n\ttilezero %tmm0"); });
  check_fault("a tile without a shape", [] { Config(16, 64, 16).load(); asm volatile("tilezero %tmm3"); });
  check_fault("a tile twice", [] { Config(16, 64, 16).load(); asm volatile(".byte 0xc4, 0xe2, 0x72, 0x5e, 0xc1"); });  // tdpbsud, which no assembler takes
  check_fault("shapes that do not fit", [] { Config c(16, 64, 16); c.rows[2] = 15, c.load(); asm volatile("tdpbsud %tmm2, %tmm1, %tmm0"); });
}

void check_decisions() {
  const auto yes = [] { return true; };
  const auto no = [] { return false; };
  const auto never = []() -> bool { abort(); };
  const auto why = [](const AmxUse& use) { return std::string(use.on ? "on" : use.faulty ? "faulty" : use.why); };
  expect(why(decide_amx("0", {false, true, true}, never, never)).empty(), "nothing to say without tiles");
  expect(why(decide_amx("0", {true, true, true}, never, never)) == "turned off by MLX_SERVING_AMX", "turned off");
  expect(why(decide_amx(nullptr, {true, false, true}, never, never)) == "the operating system has not enabled it", "not enabled");
  expect(why(decide_amx(nullptr, {true, true, false}, never, never)) == "the CPU's tiles are of another shape", "another palette");
  expect(why(decide_amx("", {true, true, true}, no, never)) == "the kernel does not permit it", "not permitted");
  expect(why(decide_amx("1", {true, true, true}, yes, no)) == "faulty", "other products");
  expect(why(decide_amx(nullptr, {true, true, true}, yes, yes)) == "on", "used");
}

void check_kernel() {
  expect(same_products(ms_amx::table, ms_avx512::table), "its products are VNNI's");
  static Kernels wrong;
  wrong = ms_amx::table;
  wrong.matmul = [](const Weight& w, const Activations& a, Mode mode, int block0, int block1, int row0, int row1, float* out, int64_t ld) {
    ms_amx::table.matmul(w, a, mode, block0, block1, row0, row1, out, ld);
    if (row1 == 22) out[21 * ld + 42] = -out[21 * ld + 42];
  };
  expect(!same_products(wrong, ms_avx512::table), "one number that differs is seen");
  expect(tiles_left() == 0, "tiles are released");
}

// Tasks of other threads have tiles of their own.
void check_threads() {
  Weight w;
  w.n = 400, w.k = 128, w.bits = 4, w.group = 32;
  const int rows = 150;
  std::vector<uint8_t> data(w.bytes(), 0);
  for (size_t i = 0; i < data.size(); i++) data[i] = i % w.group_bytes() < w.affine_bytes() ? (i % 4 == 3 ? 0x3d : noise()) : noise();
  w.data = data.data();
  std::vector<float> x(size_t(rows) * w.k), out[2];
  for (float& f : x) f = float(noise()) - 127.f;
  for (int i = 0; i < 2; i++) {
    force_isa(i ? "amx" : "avx512", true);
    Prepared prepared;
    prepared.reset(x.data(), rows, w, Mode::exact);
    prepared.all(rows);
    out[i].resize(size_t(rows) * w.n);
    matmul(w, prepared.view(), Mode::exact, rows, out[i].data(), w.n);
  }
  expect(out[0] == out[1], "products spread over threads");
}
}  // namespace

int check_amx() {
  check_decisions();
  check_faults();
  for (const Variant& v : variants)
    for (int m : {1, 5, 16})
      for (int k : {4, 32, 64})
        for (int n : {1, 7, 16}) check_product(v, m, k, n);
  check_kernel();
  const int threads = Pool::get().threads();
  Pool::get().set_threads(3);
  check_threads();
  Pool::get().set_threads(threads);
  return failures;
}
