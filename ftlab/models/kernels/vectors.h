// What the kernels for float32 and bfloat16 share: registers, a softmax's exponential, and who does which document.
//
// GCC's vector extensions make it AVX-512, AVX2 or NEON, whatever it is compiled for.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

// Where documents are among the tokens, and how wide a token is: (n_tokens, heads, head_dim) in memory.
struct Documents {
  const int64_t* bounds;  // begin and end of each, (n_documents, 2)
  int64_t n_documents, n_tokens, n_heads, n_kv_heads, head_dim, n_threads;
};

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;  // floats of a register
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVectors = 2, kColumns = kVectors * kLanes;  // of a tile of sums

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector x) { *reinterpret_cast<Vector*>(to) = x; }
inline int rounded_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// n rows of `width` numbers of 32 bits -> `width` rows of `columns`, zeros behind; width and columns fill registers.
void transpose(const float* from, int n, int width, float* to, int columns) {
  Integers low, high;  // the lower, or the upper, halves of two vectors in turns
  for (int lane = 0; lane < kLanes; lane++) {
    low[lane] = lane / 2 + lane % 2 * kLanes;
    high[lane] = low[lane] + kLanes / 2;
  }
  for (int i = 0; i < columns; i += kLanes)
    for (int j = 0; j < width; j += kLanes) {
      Vector rows[kLanes], mixed[kLanes];
      for (int lane = 0; lane < kLanes; lane++)
        rows[lane] = i + lane < n ? load(from + (i + lane) * width + j) : Vector{};
#pragma GCC unroll 4
      for (int n_mixed = 1; n_mixed < kLanes; n_mixed *= 2) {  // the first half of the rows with the second, in turns
#pragma GCC unroll 16
        for (int pair = 0; pair < kLanes / 2; pair++) {
          mixed[2 * pair] = __builtin_shuffle(rows[pair], rows[pair + kLanes / 2], low);
          mixed[2 * pair + 1] = __builtin_shuffle(rows[pair], rows[pair + kLanes / 2], high);
        }
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; lane++) rows[lane] = mixed[lane];
      }
      for (int lane = 0; lane < kLanes; lane++) store(to + (j + lane) * columns + i, rows[lane]);
    }
}

// e^x for x <= 0, to 2 units in the last place; what is below e^-87 is that, NaN stays.
inline Vector exponential(Vector x) {
  const Vector least = Vector{} - 87.0f;
  x = x < least ? least : x;
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
  const Vector shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const Vector r = x - n * 0.693145752f - n * 1.42860677e-6f;  // ln 2 in two parts: x = n ln 2 + r, |r| <= ln 2 / 2
  Vector y = Vector{} + 1.9875691500e-4f;  // Cephes' expf
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const Integers power = (reinterpret_cast<Integers>(shifted) - (0x4b400000 - 127)) << 23;  // the bits of 2^n
  return y * reinterpret_cast<Vector>(power);
}

inline Integers lane_numbers() {
  Integers lanes;
  for (int lane = 0; lane < kLanes; lane++) lanes[lane] = lane;
  return lanes;
}

// The lanes of x, the upper half of those that are left onto the lower, until one is left.
template <typename Join>
inline float joined(Vector x, Join join) {
  const Integers lanes = lane_numbers();
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) x = join(x, __builtin_shuffle(x, lanes ^ half));
  return x[0];
}

inline float sum_of(Vector x) {
  return joined(x, [](Vector a, Vector b) { return a + b; });
}

inline float largest_of(Vector x) {
  return joined(x, [](Vector a, Vector b) { return a > b ? a : b; });
}

// Let threads share out `work(begin, n, kv_head, memory)` for each document of n tokens and each key head; every thread
// has `floats(longest document)` floats of memory, and a `Scope` around all it does.
template <typename Scope, typename Floats, typename Work>
void for_each(const Documents& all, Floats floats, Work work) {
  const int n_items = all.n_documents * all.n_kv_heads;
  int longest = 0;
  for (int i = 0; i < all.n_documents; i++) longest = std::max(longest, int(all.bounds[2 * i + 1] - all.bounds[2 * i]));
#pragma omp parallel num_threads(all.n_threads)
  {
    const Scope scope;
    const std::unique_ptr<float[]> memory(new float[floats(longest) + 16]);
    float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
#pragma omp for schedule(dynamic)
    for (int item = 0; item < n_items; item++) {
      const int64_t *bounds = all.bounds + 2 * (item / all.n_kv_heads), begin = bounds[0];
      work(begin, int(bounds[1] - begin), int(item % all.n_kv_heads), aligned);
    }
  }
}

}  // namespace
