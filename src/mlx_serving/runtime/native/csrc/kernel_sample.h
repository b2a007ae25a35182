// Drawing a token from one row of logits.
//
// The arithmetic is that of runtime/backend/sampler.py on MLX's CPU backend,
// operation by operation: its exponential, sums from left to right, threefry,
// and -log(-log u). So the two choose the same tokens. What is saved is work
// that cannot matter: random numbers of tokens that the filters drop or that
// are too unlikely to win, and passes over tokens below the nucleus.
#pragma once
#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace MS_NS {
using namespace ms;

constexpr float kNucleusRange = 64.f;  // TOP_P_RANGE of the reference
constexpr int kNucleusSteps = 26;      // TOP_P_STEPS

// The first index of the largest value.
static int argmax(const float* x, int n) {
  constexpr int kChunk = 1024;
  if (!(x[0] == x[0])) return 0;
  float best = x[0];
  int from = -1;
  for (int i = 0; i < n; i += kChunk) {
    const int m = n - i < kChunk ? n - i : kChunk;
    vf top = vset(x[i]);
    int j = 0;
    for (; j + 16 <= m; j += 16) top = vmax(vload(x + i + j), top);
    float t = vmaxlane(top);
    for (; j < m; j++) t = x[i + j] > t ? x[i + j] : t;
    if (t > best) best = t, from = i;
  }
  if (from < 0) return 0;
  while (x[from] != best) from++;
  return from;
}

static void edit_logits(const LogitEdit& e) {
  float* x = e.x;
  const int n = e.n;
  if (e.allowed) {
    for (int i = 0; i < n; i++) x[i] = e.allowed[i >> 3] >> (i & 7) & 1 ? x[i] : -INFINITY;
  }
  if (e.bias) {
    for (int i = 0; i < n; i++) x[i] = x[i] + e.bias[i];
  }
  if (e.output) {
    for (int i = 0; i < n; i++) {
      const float repeated = x[i] > 0.f ? x[i] / e.repetition : x[i] * e.repetition;
      const float y = (e.output[i] > 0) | (e.prompt[i] > 0) ? repeated : x[i];
      x[i] = y - e.presence * (e.output[i] > 0 ? 1.f : 0.f) - e.frequency * float(e.output[i]);
    }
  }
  if (e.ban) {
    // Where nothing else is left, the ban gives way.
    bool some = false;
    for (int i = 0; i < n; i++) some |= x[i] + e.ban[i] > -INFINITY;
    for (int i = 0; some && i < n; i++) x[i] = x[i] + e.ban[i];
  }
}

static inline void threefry(uint32_t k0, uint32_t k1, uint32_t& a, uint32_t& b) {
  const uint32_t ks[3] = {k0, k1, k0 ^ k1 ^ 0x1BD11BDAu};
  const int rot[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  a += ks[0];
  b += ks[1];
#pragma GCC unroll 5
  for (int i = 0; i < 5; i++) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      a += b;
      b = b << rot[i % 2][r] | b >> (32 - rot[i % 2][r]);
      b ^= a;
    }
    a += ks[(i + 1) % 3];
    b += ks[(i + 2) % 3] + uint32_t(i) + 1;
  }
}

// MLX's random bits of n words: pairs (i, i + n/2), and the middle one where n is odd.
static inline uint32_t random_word(uint32_t k0, uint32_t k1, int n, int i) {
  const int half = n / 2, second = half + (n & 1);
  uint32_t a = uint32_t(i < second ? i : i - second), b = uint32_t(i < second ? i + second : i);
  if (i == half && (n & 1)) b = 0;
  threefry(k0, k1, a, b);
  return i < second ? a : b;
}

static void random_words(uint32_t k0, uint32_t k1, int n, uint32_t* out) {
  const int half = n / 2, second = half + (n & 1);
  for (int i = 0; i < half; i++) {
    uint32_t a = uint32_t(i), b = uint32_t(i + second);
    threefry(k0, k1, a, b);
    out[i] = a, out[i + second] = b;
  }
  if (n & 1) out[half] = random_word(k0, k1, n, half);
}

static inline float uniform(uint32_t bits) {
  const float u = float(bits) / 4294967296.f;
  return u < 0.99999994f ? u : 0.99999994f;
}

static inline float gumbel(uint32_t bits) { return -logf(-logf(uniform(bits))); }

// MLX's e^x for x <= 0 or NaN.
static inline float exp_mlx(float x) {
  const float y = x * 1.442695f, whole = __builtin_floorf(y + 0.5f), part = y - whole;
  float p = 1.535336188319500e-4f;
  p = __builtin_fmaf(p, part, 1.339887440266574e-3f);
  p = __builtin_fmaf(p, part, 9.618437357674640e-3f);
  p = __builtin_fmaf(p, part, 5.550332471162809e-2f);
  p = __builtin_fmaf(p, part, 2.402264791363012e-1f);
  p = __builtin_fmaf(p, part, 6.931472028550421e-1f);
  p = __builtin_fmaf(p, part, 1.000000000000000f);
  // The shift makes 2^whole; below the range it is replaced.
  const int e = x < -88.f ? 0 : int(whole) + 127;
  const uint32_t word = uint32_t(e) << 23;
  float scale;
  memcpy(&scale, &word, 4);
  const float r = x == x ? scale * p : x;
  return x < -88.f ? 0.f : r;
}

// Ascending as unsigned integers where the floats ascend.
static inline uint32_t sortable(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// The k-th largest of n values, 1 <= k <= n; scratch of n words. Twelve, twelve
// and eight bits at a time.
static float kth_largest(const float* x, int n, int k, uint32_t* scratch) {
  int count[4096];
  for (int i = 0; i < n; i++) scratch[i] = sortable(x[i]);
  uint32_t prefix = 0;
  const int shifts[3] = {20, 8, 0}, widths[3] = {12, 12, 8};
  for (int pass = 0; pass < 3; pass++) {
    const int bins = 1 << widths[pass];
    memset(count, 0, sizeof(int) * size_t(bins));
    for (int i = 0; i < n; i++) count[scratch[i] >> shifts[pass] & uint32_t(bins - 1)]++;
    int bin = bins - 1;
    while (count[bin] < k) k -= count[bin--];
    prefix |= uint32_t(bin) << shifts[pass];
    int kept = 0;
    for (int i = 0; i < n; i++) {
      const uint32_t word = scratch[i];
      scratch[kept] = word;
      kept += (word >> shifts[pass] & uint32_t(bins - 1)) == uint32_t(bin);
    }
    n = kept;
  }
  const uint32_t u = prefix & 0x80000000u ? prefix & 0x7fffffffu : ~prefix;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// The least value of the smallest set of likeliest tokens that holds a share p
// of what `threshold` keeps, to 2^-26 of the range.
static float nucleus_edge(const float* x, int n, float top, float threshold, float p, float* below, float* weight) {
  for (int i = 0; i < n; i++) {
    below[i] = top - x[i];
    const float e = exp_mlx(-below[i]);
    weight[i] = x[i] >= threshold ? e : 0.f;
  }
  float total = 0.f, best = 0.f;
  for (int i = 0; i < n; i++) total += weight[i];
  const float wanted = p * total;
  int kept = 0;
  for (int i = 0; i < n; i++) {
    const float b = below[i], w = weight[i];
    best += b <= 0.f ? w : 0.f;
    below[kept] = b, weight[kept] = w;
    kept += b <= kNucleusRange && w > 0.f;
  }
  float low = 0.f, high = kNucleusRange;
  for (int step = 0; step < kNucleusSteps; step++) {
    const float middle = (low + high) / 2.f;
    float sum = 0.f;
    for (int i = 0; i < kept; i++) sum += below[i] <= middle ? weight[i] : 0.f;
    if (sum >= wanted) {
      high = middle;
      int m = 0;
      for (int i = 0; i < kept; i++) {
        const float b = below[i], w = weight[i];
        below[m] = b, weight[m] = w;
        m += b <= middle;
      }
      kept = m;
    } else {
      low = middle;
    }
  }
  const float limit = best >= wanted ? 0.f : high;
  float edge = INFINITY;
  for (int i = 0; i < n; i++) {
    const float v = top - x[i] <= limit ? x[i] : INFINITY;
    edge = v < edge ? v : edge;
  }
  return edge;
}

static float filter_threshold(const DrawTask& t, float top) {
  float threshold = -INFINITY;
  if (t.top_k > 0 && t.top_k < t.n) threshold = kth_largest(t.x, t.n, t.top_k, t.words);
  if (t.top_p < 1.f) {
    const float edge = nucleus_edge(t.x, t.n, top, threshold, t.top_p, reinterpret_cast<float*>(t.words), t.scratch);
    threshold = edge > threshold ? edge : threshold;
  }
  const float floor = top + t.log_min_p;
  return floor > threshold ? floor : threshold;
}

// The token with the largest sum of scaled logit and Gumbel noise among those that the filters leave.
static int draw_token(const DrawTask& t) {
  float* x = t.x;
  const int n = t.n;
  for (int i = 0; i < n; i++) x[i] = x[i] / t.temperature;
  const int likeliest = argmax(x, n);
  const float top = x[likeliest];
  const bool filtered = (t.top_k > 0 && t.top_k < n) || t.top_p < 1.f || t.log_min_p > -INFINITY;
  const float threshold = filtered ? filter_threshold(t, top) : -INFINITY;
  int best = 0, kept = 0;
  float most = -INFINITY;
  if (filtered) {
    for (int i = 0; i < n; i++) kept += x[i] >= threshold;
  }
  if (filtered && kept <= n / 8) {
    for (int i = 0; i < n; i++) {
      if (!(x[i] >= threshold)) continue;
      const float v = x[i] + gumbel(random_word(t.key0, t.key1, n, i));
      if (v > most) most = v, best = i;
    }
    return best;
  }
  // A token wins only with noise of at least `least` - x, and noise is at most
  // -log(1 - u): the others' logarithms need not be taken.
  random_words(t.key0, t.key1, n, t.words);
  const float least = top + gumbel(t.words[likeliest]);
  const float rounding = 4e-7f * __builtin_fabsf(least);  // of the sums compared below
  for (int i = 0; i < n; i++) {
    const float d = x[i] - least + rounding;
    t.scratch[i] = d < 0.f ? 1.01f * exp_mlx(d) : 2.f;
  }
  for (int i = 0; i < n; i++) {
    if (1.f - uniform(t.words[i]) > t.scratch[i] || !(x[i] >= threshold)) continue;
    const float v = x[i] + gumbel(t.words[i]);
    if (v > most) most = v, best = i;
  }
  return best;
}

}  // namespace MS_NS
