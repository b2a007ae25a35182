// Products of many rows in AMX's tiles; everything else is as with AVX-512.
//
// A packed group of 16 columns is a tile as it lies (8 bits) or once its codes
// are bytes (4 bits), and rows of a plane are one where they stand. A tile's
// products are the integers that VNNI gives, and add_group adds them in the
// same order: the same bits. Included are only C headers, see kernels_isa.cpp.
#include "kernel_group.h"

namespace ms_avx512 {
extern const ms::Kernels table;
}

namespace MS_NS {
namespace {
constexpr int kTileRows = 16;  // what a tile holds
constexpr int kTileInputs = 64;
constexpr int kPass = 6;       // tiles of rows at once: their sums stay in the first-level cache
// As many rows more than whole tiles are VNNI's. For more, the last tile begins
// earlier, over rows that the one before it has, too; they get the same bits twice.
constexpr int kFewRows = 4;

// 0 to 3: products, of plane p with block v in 2p + v. 4 and 5: a plane's rows.
// 6 and 7: a block's codes. A thread has tiles only while one of these lives:
// what is configured, the kernel saves and restores with every switch.
class Tiles {
 public:
  // For groups of so many inputs.
  explicit Tiles(int group) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int inputs = group < kTileInputs ? group : kTileInputs;
    for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = kTileRows;
    config.bytes[4] = config.bytes[5] = uint16_t(inputs);
    config.rows[6] = config.rows[7] = uint8_t(inputs / 4);
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
};

// Not the compilers' intrinsics: gcc's leave out which memory is read, and it
// drops the stores before them.
template <int T>
inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* p) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(int64_t(64)), "i"(T) : "memory");
}
template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
// Signed rows times unsigned codes.
template <int SUM, int ROWS, int CODES>
inline void tile_product() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(ROWS), "i"(CODES));
}

// 4-bit codes as bytes, in the places of 8-bit ones.
template <bool FP4>
inline void unpack(const uint8_t* codes, int group, uint8_t* out) {
  for (int i = 0; i < group; i += 8, codes += 64, out += 128) {
    const vi q = iload(codes);
    _mm512_store_si512(out, codes_lo<FP4>(q));
    _mm512_store_si512(out + 64, codes_hi<FP4>(q));
  }
}

// A tile of rows' integer products with each block.
template <int PLANES, int NV>
struct Products {
  alignas(64) int32_t at[PLANES][NV][kTileRows][kLanes];

  // One group's, from input `first` on. loaded: its codes are in their tiles, if it needs but one each.
  void fill(const Activations& a, int row, int first, const uint8_t* const* codes, bool loaded) {
    const int64_t start = int64_t(row) * a.k + first;
    tile_zero<0>();
    if constexpr (NV == 2) tile_zero<1>();
    if constexpr (PLANES == 2) tile_zero<2>();
    if constexpr (PLANES == 2 && NV == 2) tile_zero<3>();
    for (int i = 0; i < a.group; i += kTileInputs) {
      if (!loaded || a.group > kTileInputs) {
        tile_load<6>(codes[0] + i * kLanes, 64);
        if constexpr (NV == 2) tile_load<7>(codes[1] + i * kLanes, 64);
      }
      tile_load<4>(a.hi + start + i, a.k);
      tile_product<0, 4, 6>();
      if constexpr (NV == 2) tile_product<1, 4, 7>();
      if constexpr (PLANES == 2) tile_load<5>(a.lo + start + i, a.k), tile_product<2, 5, 6>();
      if constexpr (PLANES == 2 && NV == 2) tile_product<3, 5, 7>();
    }
    tile_store<0>(at[0][0]);
    if constexpr (NV == 2) tile_store<1>(at[0][1]);
    if constexpr (PLANES == 2) tile_store<2>(at[1][0]);
    if constexpr (PLANES == 2 && NV == 2) tile_store<3>(at[1][1]);
  }
  vi get(int v, int row) const {
    const vi hi = iload(at[0][v][row]);
    return PLANES == 2 ? both_planes(hi, iload(at[PLANES - 1][v][row])) : hi;
  }
};

// NV blocks of columns and the tiles of rows that begin at rows[0, count). The
// codes of a group are unpacked and loaded once for all of them.
template <int PLANES, int NV>
void blocks_of_tiles(const Weight& w, const Activations& a, int block, const int* rows, int count, float* out, int64_t ld) {
  alignas(64) float sums[kPass][kTileRows][NV][kLanes];
  alignas(64) uint8_t unpacked[NV][128 * kLanes];
  Products<PLANES, NV> products[2];
  memset(sums, 0, sizeof(sums[0]) * count);
  const int groups = w.groups(), sb = kLanes * size_of(w.scale_type);
  const uint8_t* p = w.data + block * w.block_bytes();
  for (int g = 0; g < groups; g++, p += w.group_bytes()) {
    vf s[NV], b[NV];
    const uint8_t* codes[NV];
    for (int v = 0; v < NV; v++) {
      const uint8_t* q = p + v * w.block_bytes();
      s[v] = load_scale(w.scale_type, q), b[v] = load_scale(w.scale_type, q + sb);
      codes[v] = q + 2 * sb;
      if (w.bits == 8) continue;
      if (w.codes == Codes::fp4) unpack<true>(codes[v], w.group, unpacked[v]);
      else unpack<false>(codes[v], w.group, unpacked[v]);
      codes[v] = unpacked[v];
    }
    // One tile ahead, so that products are computed beside the sums of those before.
    for (int t = 0; t <= count; t++) {
      if (t < count) products[t % 2].fill(a, rows[t], g * w.group, codes, t > 0);
      if (t == 0) continue;
      const Products<PLANES, NV>& done = products[(t - 1) % 2];
      for (int m = 0; m < kTileRows; m++) {
        const int64_t i = int64_t(rows[t - 1] + m) * groups + g;
        for (int v = 0; v < NV; v++) {
          float* sum = sums[t - 1][m][v];
          vstore(sum, add_group(vload(sum), done.get(v, m), s[v], b[v], a.scale[i], a.sum[i]));
        }
      }
    }
  }
  for (int t = 0; t < count; t++)
    for (int m = 0; m < kTileRows; m++)
      for (int v = 0; v < NV; v++) {
        const int column = (block + v) * kLanes;
        vstore_n(out + int64_t(rows[t] + m) * ld + column, vload(sums[t][m][v]), w.n - column);
      }
}

// Rows [row0, row1), at least a tile of them.
template <int PLANES>
void tiles(const Weight& w, const Activations& a, int block0, int block1, int row0, int row1, float* out, int64_t ld) {
  const Tiles configured(w.group);
  for (int next = row0; next < row1;) {
    int rows[kPass], count = 0;
    for (; count < kPass && next < row1; count++, next += kTileRows) {
      rows[count] = next + kTileRows <= row1 ? next : row1 - kTileRows;
    }
    int b = block0;
    for (; b + 2 <= block1; b += 2) blocks_of_tiles<PLANES, 2>(w, a, b, rows, count, out, ld);
    if (b < block1) blocks_of_tiles<PLANES, 1>(w, a, b, rows, count, out, ld);
  }
}

void matmul(const Weight& w, const Activations& a, Mode mode, int block0, int block1, int row0, int row1, float* out, int64_t ld) {
  // Fewer rows would leave a tile, which costs as much as a full one, half empty.
  if (row1 - row0 >= kTileRows && w.integers() && mode != Mode::f32) {
    const int left = (row1 - row0) % kTileRows, end = left > kFewRows ? row1 : row1 - left;
    if (mode == Mode::exact) tiles<2>(w, a, block0, block1, row0, end, out, ld);
    else tiles<1>(w, a, block0, block1, row0, end, out, ld);
    row0 = end;
  }
  if (row0 < row1) ms_avx512::table.matmul(w, a, mode, block0, block1, row0, row1, out, ld);
}

Kernels with_tiles() {
  Kernels k = ms_avx512::table;
  k.name = MS_NAME;
  k.matmul = matmul;
  return k;
}
}  // namespace

extern const Kernels table;
const Kernels table = with_tiles();
}  // namespace MS_NS
