// Picks the kernels for the CPU that the process runs on.
#include <atomic>
#include <string>

#include "kernels.h"

namespace ms_generic {
extern const ms::Kernels table;
}
#if defined(MS_X86)
namespace ms_avx2 {
extern const ms::Kernels table;
}
namespace ms_avxvnni {
extern const ms::Kernels table;
}
namespace ms_avx512 {
extern const ms::Kernels table;
}
namespace ms_amx {
extern const ms::Kernels table;
}
#include <cpuid.h>

#include "amx.h"
#elif defined(MS_ARM)
namespace ms_neondot {
extern const ms::Kernels table;
}
#include <sys/auxv.h>
#endif

namespace ms {
namespace {
struct Choice {
  const Kernels* table;
  bool runs;
};

#if defined(MS_X86)
// Bits of CPUID that the compiler's __builtin_cpu_supports of gcc 12 lacks a
// name for; XCR0 is covered by its checks of avx2 and avx512f.
bool cpu_has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}
bool cpu_has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
}
bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c(); }
bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
#endif

// Best first.
const Choice* choices(int& n) {
#if defined(MS_X86)
  static const bool avx2 = cpu_has_avx2();
  static const Choice all[] = {
      {&ms_amx::table, amx_use().on},
      {&ms_avx512::table, cpu_has_avx512()},
      {&ms_avxvnni::table, avx2 && cpu_has_avxvnni()},
      {&ms_avx2::table, avx2},
      {&ms_generic::table, true},
  };
#elif defined(MS_ARM)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  static const Choice all[] = {{&ms_neondot::table, (getauxval(AT_HWCAP) & kDotProduct) != 0}, {&ms_generic::table, true}};
#else
  static const Choice all[] = {{&ms_generic::table, true}};
#endif
  n = int(sizeof(all) / sizeof(all[0]));
  return all;
}

std::atomic<const Kernels*> forced{nullptr};
}  // namespace

const AmxUse& amx_use() {
#if defined(MS_X86)
  static const AmxUse use = cpu_has_avx512() ? find_amx() : AmxUse{};
#else
  static const AmxUse use{};
#endif
  return use;
}

const Kernels& kernels() {
  const Kernels* f = forced.load(std::memory_order_relaxed);
  if (f) return *f;
  static const Kernels* best = [] {
    int n;
    const Choice* c = choices(n);
    while (!c->runs) c++;
    return c->table;
  }();
  return *best;
}

const char* isa_names() {
  static const std::string names = [] {
    int n;
    const Choice* c = choices(n);
    std::string s;
    for (int i = 0; i < n; i++) {
      if (c[i].runs) s += (s.empty() ? "" : ",") + std::string(c[i].table->name);
    }
    return s;
  }();
  return names.c_str();
}

bool force_isa(const char* name, bool emulated) {
  if (!*name) {
    forced.store(nullptr);
    return true;
  }
  int n;
  const Choice* c = choices(n);
  for (int i = 0; i < n; i++) {
    if ((c[i].runs || emulated) && std::string(name) == c[i].table->name) {
      forced.store(c[i].table);
      return true;
    }
  }
  return false;
}
}  // namespace ms
