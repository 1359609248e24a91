// Causal attention within each of many short documents, and its gradients, in float32.
//
// Products of so small matrices are mostly overhead for a library that is called for each. Here one thread does all of
// one document and one key head in its own memory, small enough for its cache, and computes nothing above the diagonal
// but what fills a tile. Every document's numbers depend on itself alone, not on its place in a row or on threads.
//
// Compiled by cpu_kernel.py for the machine that it runs on; GCC's vector extensions make it AVX2, AVX-512 or NEON.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12;  // floats of a register; rows of a tile: its sums fill most of the registers
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 6;
#else
constexpr int kLanes = 4, kRows = 6;
#endif
constexpr int kVectors = 2, kColumns = kVectors * kLanes;  // of a tile

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector x) { *reinterpret_cast<Vector*>(to) = x; }
inline int padded(int n) { return (n + kColumns - 1) / kColumns * kColumns; }

// ---- bfloat16 and float, in memory and in registers

struct BFloat16 {
  uint16_t bits;
};

inline float widened(float x) { return x; }
inline float widened(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, BFloat16* to) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// n rows of `width` numbers that lie `stride` apart -> rows of `padded(width)` floats, zeros behind.
template <typename T>
void read(const T* from, int64_t stride, int n, int width, float* to) {
  for (int i = 0; i < n; i++, from += stride, to += padded(width)) {
    for (int j = 0; j < width; j++) to[j] = widened(from[j]);
    std::fill(to + width, to + padded(width), 0.0f);
  }
}

template <typename T>
void write(const float* from, int n, int width, float scale, T* to, int64_t stride) {
  for (int i = 0; i < n; i++, from += padded(width), to += stride)
    for (int j = 0; j < width; j++) narrow(from[j] * scale, to + j);
}

// n rows of `width` floats -> `width` rows of `padded(n)`, zeros behind; width is a multiple of kColumns.
void transpose(const float* from, int n, int width, float* to) {
  Integers low, high;  // the lower, or the upper, halves of two vectors in turns
  for (int lane = 0; lane < kLanes; lane++) {
    low[lane] = lane / 2 + lane % 2 * kLanes;
    high[lane] = low[lane] + kLanes / 2;
  }
  for (int i = 0; i < padded(n); i += kLanes)
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
      for (int lane = 0; lane < kLanes; lane++) store(to + (j + lane) * padded(n) + i, rows[lane]);
    }
}

// ---- products

// A matrix of which element (i, k) is data[i * row + k * column]: also a transposed one.
struct Left {
  const float* data;
  int64_t row, column;
};

// R rows and kColumns columns of C = A B, or C += A B, with all sums in registers; n is A's columns, B's rows.
template <int R, bool kAdd>
inline void tile(Left a, const float* b, int64_t b_row, int n, float* c, int64_t c_row) {
  Vector sums[R][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < R; i++)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) sums[i][v] = kAdd ? load(c + i * c_row + v * kLanes) : Vector{};
  for (int k = 0; k < n; k++) {
    Vector y[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) y[v] = load(b + k * b_row + v * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < R; i++) {
      const float x = a.data[i * a.row + k * a.column];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) sums[i][v] += x * y[v];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < R; i++)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) store(c + i * c_row + v * kLanes, sums[i][v]);
}

template <int R, bool kAdd>
inline void tile_of(int n_rows, Left a, const float* b, int64_t b_row, int n, float* c, int64_t c_row) {
  if (n_rows == R) return tile<R, kAdd>(a, b, b_row, n, c, c_row);
  if constexpr (R > 1) tile_of<R - 1, kAdd>(n_rows, a, b, b_row, n, c, c_row);
}

// Up to kRows rows of C, and columns up to the next multiple of kColumns.
template <bool kAdd>
void multiply(int n_rows, int n_columns, Left a, const float* b, int64_t b_row, int n, float* c, int64_t c_row) {
  for (int j = 0; j < n_columns; j += kColumns) tile_of<kRows, kAdd>(n_rows, a, b + j, b_row, n, c + j, c_row);
}

// ---- softmax

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

inline float sum_of(Vector x) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; lane++) sum += x[lane];
  return sum;
}

// Scores of a query -> their softmax over the first `n`, zeros up to `width`; returns log sum e^score.
float softmax(float* scores, int n, int width) {
  std::fill(scores + n, scores + width, -std::numeric_limits<float>::infinity());
  Vector tops = load(scores), sums{};
  for (int j = kLanes; j < width; j += kLanes) tops = load(scores + j) > tops ? load(scores + j) : tops;
  float top = tops[0];
  for (int lane = 1; lane < kLanes; lane++) top = std::max(top, tops[lane]);
  for (int j = 0; j < width; j += kLanes) {
    const Vector e = exponential(load(scores + j) - top);
    store(scores + j, e);
    sums += e;  // e^-87 of what is masked is lost beside the e^0 of the largest
  }
  const float sum = sum_of(sums);
  for (int j = 0; j < width; j += kLanes) store(scores + j, load(scores + j) / sum);
  std::fill(scores + n, scores + width, 0.0f);
  return top + std::log(sum);
}

}  // namespace

// Where documents are among the tokens, and how wide a token is: (n_tokens, heads, head_dim) in memory.
struct Documents {
  const int64_t* bounds;  // begin and end of each, (n_documents, 2)
  int64_t n_documents, n_tokens, n_heads, n_kv_heads, head_dim, n_threads;
};

namespace {

template <typename Work>
void for_each(const Documents& all, int (*floats)(int n, int width), Work work) {
  const int width = padded(all.head_dim), n_items = all.n_documents * all.n_kv_heads;
  int longest = 0;
  for (int i = 0; i < all.n_documents; i++) longest = std::max(longest, int(all.bounds[2 * i + 1] - all.bounds[2 * i]));
#pragma omp parallel num_threads(all.n_threads)
  {
    const std::unique_ptr<float[]> memory(new float[floats(longest, width)]);
#pragma omp for schedule(dynamic)
    for (int item = 0; item < n_items; item++) {
      const int64_t *bounds = all.bounds + 2 * (item / all.n_kv_heads), begin = bounds[0];
      work(begin, int(bounds[1] - begin), int(item % all.n_kv_heads), width, memory.get());
    }
  }
}

template <typename T>
void attend(const Documents& all, const T* q, const T* k, const T* v, T* answer, float* log_sums) {
  const int64_t dim = all.head_dim, q_row = all.n_heads * dim, k_row = all.n_kv_heads * dim;
  const int group = all.n_heads / all.n_kv_heads;
  const float scale = 1 / std::sqrt(float(dim));
  const auto floats = [](int n, int width) { return (3 * n + padded(n)) * width + kRows * padded(n); };
  for_each(all, floats, [=](int64_t begin, int n, int kv_head, int width, float* memory) {
    const int columns = padded(n);
    float *queries = memory, *values = queries + n * width, *answers = values + n * width;
    float *keys = answers + n * width, *scores = keys + columns * width;  // keys are transposed
    read(k + begin * k_row + kv_head * dim, k_row, n, dim, values);
    transpose(values, n, width, keys);
    read(v + begin * k_row + kv_head * dim, k_row, n, dim, values);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
      read(q + begin * q_row + head * dim, q_row, n, dim, queries);
      for (int i = 0; i < n; i += kRows) {
        const int n_rows = std::min(kRows, n - i), n_seen = i + n_rows;
        multiply<false>(n_rows, n_seen, {queries + i * width, width, 1}, keys, columns, width, scores, columns);
        for (int row = 0; row < n_rows; row++) {
          float* some = scores + row * columns;
          for (int j = 0; j < padded(n_seen); j += kLanes) store(some + j, load(some + j) * scale);
          log_sums[head * all.n_tokens + begin + i + row] = softmax(some, i + row + 1, padded(n_seen));
        }
        multiply<false>(n_rows, width, {scores, columns, 1}, values, width, n_seen, answers + i * width, width);
      }
      write(answers, n, dim, 1.0f, answer + begin * q_row + head * dim, q_row);
    }
  });
}

template <typename T>
void differentiate(const Documents& all, const T* d_answer, const T* q, const T* k, const T* v, const T* answer,
                   const float* log_sums, T* d_q, T* d_k, T* d_v) {
  const int64_t dim = all.head_dim, q_row = all.n_heads * dim, k_row = all.n_kv_heads * dim;
  const int group = all.n_heads / all.n_kv_heads;
  const float scale = 1 / std::sqrt(float(dim));
  const auto floats = [](int n, int width) { return (6 * n + kRows + 2 * padded(n)) * width + 2 * n * padded(n); };
  for_each(all, floats, [=](int64_t begin, int n, int kv_head, int width, float* memory) {
    const int columns = padded(n);
    float *keys = memory, *queries = keys + n * width, *given = queries + n * width;  // given: gradients by answers
    float *by_query = given + n * width, *by_key = by_query + n * width, *by_value = by_key + n * width;
    float *answers = by_value + n * width, *keys_t = answers + kRows * width, *values_t = keys_t + columns * width;
    float *probabilities = values_t + columns * width, *by_score = probabilities + n * columns;
    read(v + begin * k_row + kv_head * dim, k_row, n, dim, keys);
    transpose(keys, n, width, values_t);
    read(k + begin * k_row + kv_head * dim, k_row, n, dim, keys);
    transpose(keys, n, width, keys_t);
    std::fill(by_key, by_key + 2 * n * width, 0.0f);  // and by_value
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
      const int64_t place = begin * q_row + head * dim;
      read(q + place, q_row, n, dim, queries);
      read(d_answer + place, q_row, n, dim, given);
      for (int i = 0; i < n; i += kRows) {
        const int n_rows = std::min(kRows, n - i), n_seen = i + n_rows;
        float *p = probabilities + i * columns, *d = by_score + i * columns;
        multiply<false>(n_rows, n_seen, {queries + i * width, width, 1}, keys_t, columns, width, p, columns);
        multiply<false>(n_rows, n_seen, {given + i * width, width, 1}, values_t, columns, width, d, columns);
        read(answer + place + i * q_row, q_row, n_rows, dim, answers);
        for (int row = 0; row < n_rows; row++, p += columns, d += columns) {
          const float* of_row = given + (i + row) * width;
          Vector products{};
          for (int j = 0; j < width; j += kLanes) products += load(of_row + j) * load(answers + row * width + j);
          const float mean = sum_of(products);  // of the gradients by this query's probabilities, weighted by them
          const float log_sum = log_sums[head * all.n_tokens + begin + i + row];
          for (int j = 0; j < padded(n_seen); j += kLanes) {
            const Vector e = exponential(load(p + j) * scale - log_sum);
            store(p + j, e);
            store(d + j, e * (load(d + j) - mean));
          }
          std::fill(p + i + row + 1, p + padded(n_seen), 0.0f);
          std::fill(d + i + row + 1, d + padded(n_seen), 0.0f);
        }
        multiply<false>(n_rows, width, {by_score + i * columns, columns, 1}, keys, width, n_seen, by_query + i * width,
                        width);
      }
      for (int j = 0; j < n; j += kRows) {  // of a key, the queries from itself on
        const int n_rows = std::min(kRows, n - j), from = j * columns + j;
        multiply<true>(n_rows, width, {probabilities + from, 1, columns}, given + j * width, width, n - j,
                       by_value + j * width, width);
        multiply<true>(n_rows, width, {by_score + from, 1, columns}, queries + j * width, width, n - j,
                       by_key + j * width, width);
      }
      write(by_query, n, dim, scale, d_q + place, q_row);
    }
    write(by_key, n, dim, scale, d_k + begin * k_row + kv_head * dim, k_row);
    write(by_value, n, dim, 1.0f, d_v + begin * k_row + kv_head * dim, k_row);
  });
}

}  // namespace

#define FOR_DTYPE(T, name)                                                                                         \
  extern "C" void attend_##name(const Documents* all, const T* q, const T* k, const T* v, T* answer, float* sums) { \
    attend(*all, q, k, v, answer, sums);                                                                           \
  }                                                                                                                \
  extern "C" void differentiate_##name(const Documents* all, const T* d_answer, const T* q, const T* k, const T* v, \
                                       const T* answer, const float* sums, T* d_q, T* d_k, T* d_v) {                \
    differentiate(*all, d_answer, q, k, v, answer, sums, d_q, d_k, d_v);                                           \
  }
FOR_DTYPE(float, float32)
FOR_DTYPE(BFloat16, bfloat16)
