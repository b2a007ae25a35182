// The AMX instructions that kernels_amx.cpp uses, for tests on a CPU without
// them: each is a SIGILL, is decoded, done as Intel's manual says, and skipped.
// So tests run the machine code that a CPU with AMX runs. What the manual makes
// a fault ends the process. Not part of the module.
#include <cpuid.h>
#include <signal.h>
#include <sys/ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {
constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Tile {
  int rows, bytes;  // as configured
  uint8_t row[kRows][kRowBytes];
};
struct State {
  bool configured;
  uint8_t config[64];
  Tile tile[kTiles];
};
thread_local State mine;

[[noreturn]] void fault(const char* what) {
  (void)!write(2, "AMX fault: ", 11);
  (void)!write(2, what, strlen(what));
  (void)!write(2, "\n", 1);
  abort();
}

// A VEX instruction of the map 0F38 with 128 bits and W0.
struct Instruction {
  int prefix;  // none, 66, F3, F2
  int opcode, reg, rm, vvvv, length;
  bool memory, sib;
  uint64_t address, stride;
};

uint64_t general(const greg_t* regs, int number) {
  static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return uint64_t(regs[order[number]]);
}

bool decode(const greg_t* regs, Instruction& i) {
  const uint8_t* const start = reinterpret_cast<const uint8_t*>(regs[REG_RIP]);
  const uint8_t* p = start;
  if (p[0] != 0xc4 || (p[1] & 31) != 2 || (p[2] & 0x84) != 0) return false;
  const int r = p[1] & 0x80 ? 0 : 8, x = p[1] & 0x40 ? 0 : 8, b = p[1] & 0x20 ? 0 : 8;
  i.vvvv = ~(p[2] >> 3) & 15, i.prefix = p[2] & 3, i.opcode = p[3];
  if (i.opcode != 0x49 && i.opcode != 0x4b && i.opcode != 0x5e) return false;
  const int mod = p[4] >> 6, low = p[4] & 7;
  i.reg = (p[4] >> 3 & 7) | r, i.rm = low | b;
  i.memory = mod != 3, i.sib = i.memory && low == 4;
  i.address = i.stride = 0;
  p += 5;
  bool relative = false;
  if (i.memory) {
    int displacement = mod == 1 ? 1 : mod == 2 ? 4 : 0, base = low | b;
    if (i.sib) {
      const int index = (p[0] >> 3 & 7) | x;
      base = (p[0] & 7) | b;
      if (index != 4) i.stride = general(regs, index) << (p[0] >> 6);
      if (mod == 0 && (p[0] & 7) == 5) base = -1, displacement = 4;
      p++;
    } else if (mod == 0 && low == 5) {
      relative = true, base = -1, displacement = 4;
    }
    if (base >= 0) i.address = general(regs, base);
    if (displacement == 1) i.address += uint64_t(int64_t(int8_t(*p)));
    int32_t far = 0;
    if (displacement == 4) memcpy(&far, p, 4);
    i.address += uint64_t(int64_t(far));
    p += displacement;
  }
  i.length = int(p - start);
  if (relative) i.address += uint64_t(reinterpret_cast<uintptr_t>(p));
  return true;
}

void configure(const uint8_t* c) {
  uint8_t config[64];
  memcpy(config, c, 64);
  State next{};
  if (config[0] > 1) fault("no such palette");
  if (config[0] == 1) {
    for (int i = 2; i < 16; i++) {
      if (config[i]) fault("reserved bytes");
    }
    for (int t = 0; t < 16; t++) {
      const int bytes = config[16 + 2 * t] | config[17 + 2 * t] << 8, rows = config[48 + t];
      if (t >= kTiles ? bytes || rows : bytes > kRowBytes || rows > kRows || !bytes != !rows) fault("a tile's shape");
      if (t < kTiles) next.tile[t].bytes = bytes, next.tile[t].rows = rows;
    }
    next.configured = true;
    memcpy(next.config, config, 64);
  }
  mine = next;
}

// A tile that an instruction names.
Tile& tile(int number) {
  if (!mine.configured) fault("tiles are not configured");
  if (number >= kTiles || !mine.tile[number].rows) fault("no such tile");
  if (mine.config[1] >= mine.tile[number].rows) fault("first row");
  return mine.tile[number];
}

void move(const Instruction& i) {
  Tile& t = tile(i.reg);
  // Restarted after a fault, the hardware goes on at the row that faulted; nothing here begins there.
  if (mine.config[1]) fault("begins at a later row");
  const bool store = i.prefix == 2;
  if (!store) memset(t.row, 0, sizeof(t.row));
  for (int r = 0; r < t.rows; r++) {
    uint8_t* at = reinterpret_cast<uint8_t*>(i.address + uint64_t(r) * i.stride);
    if (store) memcpy(at, t.row[r], size_t(t.bytes));
    else memcpy(t.row[r], at, size_t(t.bytes));
  }
}

void product(const Instruction& i) {
  Tile &sum = tile(i.reg), &a = tile(i.rm), &b = tile(i.vvvv);
  if (&sum == &a || &sum == &b || &a == &b) fault("a tile twice");
  if (sum.bytes % 4 || a.bytes % 4 || b.bytes % 4) fault("part of a word");
  if (sum.rows != a.rows || sum.bytes != b.bytes || a.bytes / 4 != b.rows) fault("shapes of a product");
  const bool signed_a = i.prefix >= 2, signed_b = i.prefix == 1 || i.prefix == 3;
  const auto value = [](uint8_t byte, bool is_signed) { return is_signed ? int(int8_t(byte)) : int(byte); };
  for (int m = 0; m < sum.rows; m++)
    for (int k = 0; k < a.bytes / 4; k++)
      for (int n = 0; n < sum.bytes / 4; n++) {
        uint32_t total;
        memcpy(&total, &sum.row[m][4 * n], 4);
        for (int j = 0; j < 4; j++) total += uint32_t(value(a.row[m][4 * k + j], signed_a) * value(b.row[k][4 * n + j], signed_b));
        memcpy(&sum.row[m][4 * n], &total, 4);
      }
  for (int m = 0; m < kRows; m++) {
    const int from = m < sum.rows ? sum.bytes : 0;
    memset(sum.row[m] + from, 0, size_t(kRowBytes - from));
  }
}

// False for what is none of them.
bool execute(const Instruction& i) {
  if (i.opcode == 0x5e) {
    if (i.memory) return false;
    product(i);
    return true;
  }
  if (i.vvvv) return false;
  if (i.opcode == 0x4b) {  // tilestored, tileloadd, tileloaddt1
    if (!i.sib || i.prefix == 0) return false;
    move(i);
  } else if (!i.memory && i.prefix == 3 && i.rm == 0) {  // tilezero
    memset(tile(i.reg).row, 0, sizeof(Tile::row));
  } else if (!i.memory && i.prefix == 0 && i.rm == 0 && i.reg == 0) {  // tilerelease
    mine = State{};
  } else if (i.memory && i.prefix == 0 && i.reg == 0) {  // ldtilecfg
    configure(reinterpret_cast<const uint8_t*>(i.address));
  } else if (i.memory && i.prefix == 1 && i.reg == 0) {  // sttilecfg
    memcpy(reinterpret_cast<void*>(i.address), mine.config, 64);
  } else {
    return false;
  }
  return true;
}

struct sigaction before;

void illegal(int signal, siginfo_t* info, void* context) {
  greg_t* regs = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction i;
  if (decode(regs, i) && execute(i)) {
    regs[REG_RIP] += i.length;
  } else {
    sigaction(signal, &before, nullptr);  // it happens again, to whom it belongs
  }
}
}  // namespace

// Whether the instructions run, emulated, from now on in all threads: not
// where the CPU and the operating system have tiles.
extern "C" int emulate_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) && c & 1u << 27) {
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    if (a >> 17 & 3) return 0;
  }
  struct sigaction action {};
  action.sa_sigaction = illegal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &action, &before) == 0;
}

extern "C" void end_amx_emulation() { sigaction(SIGILL, &before, nullptr); }

// Of the calling thread: tiles that it has not released.
extern "C" int tiles_left() { return mine.configured; }
