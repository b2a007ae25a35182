// Whether this process may use AMX. It was written where no CPU has it, so its
// results are compared with VNNI's before it is used.
#pragma once
#include "kernels.h"

namespace ms {

// What the CPU and the operating system say.
struct AmxMachine {
  bool tiles;    // the CPU has tiles and their products of bytes
  bool enabled;  // the operating system keeps their state
  bool palette;  // they have the shapes that kernels_amx.cpp configures
};

// setting: MLX_SERVING_AMX or null. permitted() asks the kernel for this
// process, agrees() compares results; each is called only where all before it holds.
AmxUse decide_amx(const char* setting, const AmxMachine& machine, bool (*permitted)(), bool (*agrees)());

// Both give the same bits for quantised products of many rows: all codes,
// groups and modes, with part of a tile left over and without.
bool same_products(const Kernels& one, const Kernels& other);

// Of this process, on a CPU that runs the kernels for AVX-512.
AmxUse find_amx();

}  // namespace ms
