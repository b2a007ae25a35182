#include "amx.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <vector>

namespace ms_amx {
extern const ms::Kernels table;
}
namespace ms_avx512 {
extern const ms::Kernels table;
}

namespace ms {
namespace {
AmxMachine this_machine() {
  AmxMachine m{};
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTileAndInt8 = 3u << 24, kXsaveInUse = 1u << 27;
  m.tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTileAndInt8) == kTileAndInt8;
  if (!m.tiles || !__get_cpuid(1, &a, &b, &c, &d) || !(c & kXsaveInUse)) return m;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  m.enabled = (a >> 17 & 3) == 3;
  // Palette 1: 8 tiles of 16 rows of 64 bytes.
  m.palette = __get_cpuid_count(0x1d, 1, &a, &b, &c, &d) && a >> 16 == 1024 && (b & 0xffff) == 64 && b >> 16 == 8 && (c & 0xffff) == 16;
  return m;
}

// For all threads of the process and those to come.
bool permitted() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

bool agrees() { return same_products(ms_amx::table, ms_avx512::table); }

uint32_t next(uint32_t& state) { return (state = state * 1664525u + 1013904223u) >> 8; }

bool same_of(const Kernels& one, const Kernels& other, Mode mode, Codes codes, int bits, int group, int rows) {
  Weight w;
  w.n = 43, w.k = 3 * group, w.bits = bits, w.group = group, w.codes = codes;
  uint32_t state = 1;
  std::vector<uint8_t> data(w.bytes());
  for (size_t i = 0; i < data.size(); i++) data[i] = uint8_t(next(state));
  for (size_t at = 0; at < data.size(); at += w.group_bytes())
    for (size_t i = 0; i < w.affine_bytes(); i += 4) {
      const float f = float(next(state)) * 0x1p-24f - 0.5f;
      memcpy(&data[at + i], &f, 4);
    }
  w.data = data.data();
  const size_t values = size_t(rows) * w.k, groups = size_t(rows) * w.groups();
  std::vector<float> x(values), scale(groups), sum(groups), out[2];
  std::vector<int8_t> hi(values), lo(values);
  for (float& f : x) f = float(next(state)) * 0x1p-24f - 0.5f;
  const Activations a{x.data(), hi.data(), lo.data(), scale.data(), sum.data(), w.k, group};
  other.quantize(a, mode, 0, rows);
  for (int i = 0; i < 2; i++) {
    out[i].resize(size_t(rows) * w.n);
    (i ? other : one).matmul(w, a, mode, 0, w.blocks(), 0, rows, out[i].data(), w.n);
  }
  return memcmp(out[0].data(), out[1].data(), out[0].size() * 4) == 0;
}
}  // namespace

bool same_products(const Kernels& one, const Kernels& other) {
  for (Mode mode : {Mode::exact, Mode::fast})
    for (int rows : {16, 22, 115}) {
      for (int group : {16, 32}) {
        if (!same_of(one, other, mode, Codes::fp4, 4, group, rows)) return false;
      }
      for (int bits : {4, 8})
        for (int group : {32, 64, 128}) {
          if (!same_of(one, other, mode, Codes::affine, bits, group, rows)) return false;
        }
    }
  return true;
}

AmxUse decide_amx(const char* setting, const AmxMachine& machine, bool (*permitted)(), bool (*agrees)()) {
  if (!machine.tiles) return {};
  if (setting && *setting && strcmp(setting, "1") != 0) return {false, false, "turned off by MLX_SERVING_AMX"};
  if (!machine.enabled) return {false, false, "the operating system has not enabled it"};
  if (!machine.palette) return {false, false, "the CPU's tiles are of another shape"};
  if (!permitted()) return {false, false, "the kernel does not permit it"};
  if (!agrees()) return {false, true, "its products differed from VNNI's in the check at load"};
  return {true, false, ""};
}

AmxUse find_amx() { return decide_amx(getenv("MLX_SERVING_AMX"), this_machine(), permitted, agrees); }
}  // namespace ms
