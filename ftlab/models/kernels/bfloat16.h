// Causal attention within each of many documents, and its gradients, of bfloat16.
//
// As in float32.h one thread does all of one document and one key head. Products take numbers by twos, as the
// instructions for bfloat16 do: AMX's where the CPU has them, AVX-512's, or else two products in float32. Sums, softmax
// and what is added up over blocks stay in float32; probabilities and gradients by scores are rounded to bfloat16 before
// they are multiplied. Both are there for one block of queries or keys only, so that documents may be long.

#pragma once

#include <utility>

#include "vectors.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bfloat16 {
namespace {

constexpr int kBlock = 32;  // rows and columns of a product; all matrices are padded to a multiple of it

typedef uint16_t BFloat16;
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

inline int padded(int n) { return rounded_up(n, kBlock); }

// The nearest bfloat16, ties to even.
inline Halves rounded(Vector x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(x));
#else
  const Integers bits = reinterpret_cast<Integers>(x), odd = bits >> 16 & 1;
  return __builtin_convertvector(x == x ? (bits + 0x7fff + odd) >> 16 & 0xffff : Integers{} + 0x7fc0, Halves);
#endif
}

inline void store_rounded(BFloat16* to, Vector x) { *reinterpret_cast<Halves*>(to) = rounded(x); }


inline Integers load_bits(const BFloat16* from) {
  return __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Integers);
}

inline Vector load(const BFloat16* from) { return reinterpret_cast<Vector>(load_bits(from) << 16); }

// ---- matrices: a left factor lies in rows; a right factor in rows of pairs, which are 32 bits, the upper half of them
// from the second of two rows, and which are passed as floats

// n rows of `dim` numbers that lie `stride` apart -> `padded(n)` rows of `padded(dim)`, zeros around.
void read(const BFloat16* from, int64_t stride, int n, int dim, BFloat16* to) {
  const int width = padded(dim);
  for (int i = 0; i < n; i++, from += stride, to += width) {
    std::memcpy(to, from, 2 * dim);
    std::fill(to + dim, to + width, 0);
  }
  std::fill(to, to + width * (padded(n) - n), 0);
}

// n rows of `padded(dim)` floats -> rows of `dim` numbers that lie `stride` apart.
void write(const float* from, int n, int dim, float scale, BFloat16* to, int64_t stride) {
  const int n_whole = dim / kLanes * kLanes;
  for (int i = 0; i < n; i++, from += padded(dim), to += stride) {
    for (int j = 0; j < n_whole; j += kLanes) store_rounded(to + j, ::load(from + j) * scale);
    if (n_whole < dim) {
      const Halves last = rounded(::load(from + n_whole) * scale);
      std::memcpy(to + n_whole, &last, 2 * (dim - n_whole));
    }
  }
}

// (n, width) in rows -> the same matrix as a right factor.
void pair(const BFloat16* from, int n, int width, float* to) {
  for (int i = 0; i < n; i += 2, from += 2 * width, to += width)
    for (int j = 0; j < width; j += kLanes)
      store(to + j, reinterpret_cast<Vector>(load_bits(from + j) | load_bits(from + width + j) << 16));
}

// (n, width) in rows -> its transpose as a right factor.
void pair_transposed(const BFloat16* from, int n, int width, float* to) {
  transpose(reinterpret_cast<const float*>(from), n, width / 2, to, n);
}

// ---- products

#if defined(__AMX_BF16__)
struct TileConfig {  // as the CPU wants it
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline bool has_tiles() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM: Linux keeps them for who asks
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

// The tile registers, for as long as it lives; then they are as whoever else uses them in this thread left them.
class Tiles {
 public:
  Tiles() {
    if (!has_tiles()) return;
    _tile_storeconfig(&before_);
    const TileConfig ours;
    _tile_loadconfig(&ours);
  }
  ~Tiles() {
    if (!has_tiles()) return;
    if (before_.palette) _tile_loadconfig(&before_);
    else _tile_release();
  }

 private:
  TileConfig before_;
};

template <bool kAdd>
inline void multiply_tiles(const BFloat16* a, int a_row, const float* b, int b_row, int depth, float* c, int c_row) {
  const BFloat16* a_low = a + 16 * a_row;
  float* c_low = c + 16 * c_row;
  if (kAdd) {
    _tile_loadd(0, c, 4 * c_row);
    _tile_loadd(1, c + 16, 4 * c_row);
    _tile_loadd(2, c_low, 4 * c_row);
    _tile_loadd(3, c_low + 16, 4 * c_row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int k = 0; k < depth; k += 32, b += 16 * b_row) {
    _tile_loadd(4, a + k, 2 * a_row);
    _tile_loadd(6, b, 4 * b_row);
    _tile_loadd(7, b + 16, 4 * b_row);
    _tile_loadd(5, a_low + k, 2 * a_row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 4 * c_row);
  _tile_stored(1, c + 16, 4 * c_row);
  _tile_stored(2, c_low, 4 * c_row);
  _tile_stored(3, c_low + 16, 4 * c_row);
}
#else
struct Tiles {
  Tiles() {}
};
#endif

// sum + the products of x's lower and y's lower halves, and of their upper halves.
inline Vector dot(Vector sum, Integers x, Integers y) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
#else
  const int upper = int(0xffff0000);
  sum += reinterpret_cast<Vector>(x << 16) * reinterpret_cast<Vector>(y << 16);
  return sum + reinterpret_cast<Vector>(x & upper) * reinterpret_cast<Vector>(y & upper);
#endif
}

template <bool kAdd>
inline void multiply_vectors(const BFloat16* a, int a_row, const float* b, int b_row, int depth, float* c, int c_row) {
  constexpr int kRows = kLanes == 16 ? 8 : 4;  // of sums in registers
  for (int i = 0; i < kBlock; i += kRows, a += kRows * a_row, c += kRows * c_row)
    for (int j = 0; j < kBlock; j += kColumns) {
      Vector sums[kRows][kVectors];
#pragma GCC unroll 8
      for (int row = 0; row < kRows; row++)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; v++) sums[row][v] = kAdd ? ::load(c + row * c_row + j + v * kLanes) : Vector{};
      for (int k = 0; k < depth; k += 2) {
        Integers y[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; v++) y[v] = reinterpret_cast<Integers>(::load(b + k / 2 * b_row + j + v * kLanes));
#pragma GCC unroll 8
        for (int row = 0; row < kRows; row++) {
          int32_t x;
          std::memcpy(&x, a + row * a_row + k, 4);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; v++) sums[row][v] = dot(sums[row][v], Integers{} + x, y[v]);
        }
      }
#pragma GCC unroll 8
      for (int row = 0; row < kRows; row++)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; v++) store(c + row * c_row + j + v * kLanes, sums[row][v]);
    }
}

// C (rows, columns) = A (rows, depth) B (depth, columns), or C += A B; `*_row` is from one row to the next.
template <bool kAdd>
void multiply(int rows, int columns, int depth, const BFloat16* a, int a_row, const float* b, int b_row, float* c,
              int c_row) {
  for (int i = 0; i < rows; i += kBlock, a += kBlock * a_row, c += kBlock * c_row)
    for (int j = 0; j < columns; j += kBlock) {
#if defined(__AMX_BF16__)
      if (has_tiles()) {
        multiply_tiles<kAdd>(a, a_row, b + j, b_row, depth, c + j, c_row);
        continue;
      }
#endif
      multiply_vectors<kAdd>(a, a_row, b + j, b_row, depth, c + j, c_row);
    }
}

// ---- attention

// A thread's memory, given out piece by piece.
class Pieces {
 public:
  explicit Pieces(float* memory) : next_(memory) {}
  float* floats(int n) {
    float* piece = next_;
    next_ += n;
    return piece;
  }
  BFloat16* halves(int n) { return reinterpret_cast<BFloat16*>(floats(n / 2)); }

 private:
  float* next_;
};

// Scores of a query -> e^(score * scale - the largest), rounded, zeros from n up to `width`.
// Returns the sum before rounding and the logarithm of the sum of e^(score * scale).
std::pair<float, float> exponentials(float* scores, int n, int width, float scale, BFloat16* to) {
  std::fill(scores + n, scores + width, -std::numeric_limits<float>::infinity());
  Vector tops = ::load(scores), sums{};
  for (int j = kLanes; j < width; j += kLanes) tops = ::load(scores + j) > tops ? ::load(scores + j) : tops;
  const float top = largest_of(tops) * scale;
  for (int j = 0; j < width; j += kLanes) {
    const Vector e = exponential(::load(scores + j) * scale - top);
    store_rounded(to + j, e);
    sums += e;  // e^-87 of what is masked is lost beside the e^0 of the largest
  }
  std::fill(to + n, to + width, 0);
  const float sum = sum_of(sums);
  return {sum, top + std::log(sum)};
}

void attend(const Documents& all, const BFloat16* q, const BFloat16* k, const BFloat16* v, BFloat16* answer,
            float* log_sums) {
  const int64_t dim = all.head_dim, q_row = all.n_heads * dim, k_row = all.n_kv_heads * dim;
  const int group = all.n_heads / all.n_kv_heads, width = padded(dim);
  const float scale = 1 / std::sqrt(float(dim));
  const auto floats = [width](int n) { return 2 * padded(n) * width + kBlock * (2 * padded(n) + 2 * width); };
  for_each<Tiles>(all, floats, [=](int64_t begin, int n, int kv_head, float* memory) {
    const int columns = padded(n);
    Pieces pieces(memory);
    BFloat16 *rows = pieces.halves(columns * width), *queries = pieces.halves(kBlock * width);
    float *keys_t = pieces.floats(columns * width / 2), *values = pieces.floats(columns * width / 2);
    float *scores = pieces.floats(kBlock * columns), *answers = pieces.floats(kBlock * width);
    BFloat16* probabilities = pieces.halves(kBlock * columns);
    read(k + begin * k_row + kv_head * dim, k_row, n, dim, rows);
    pair_transposed(rows, columns, width, keys_t);
    read(v + begin * k_row + kv_head * dim, k_row, n, dim, rows);
    pair(rows, columns, width, values);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
      for (int i = 0; i < n; i += kBlock) {
        const int n_rows = std::min(kBlock, n - i), seen = i + kBlock;
        const int64_t place = (begin + i) * q_row + head * dim;
        read(q + place, q_row, n_rows, dim, queries);
        multiply<false>(kBlock, seen, width, queries, width, keys_t, columns, scores, columns);
        float sums[kBlock];
        for (int row = 0; row < n_rows; row++) {
          const auto [sum, log_sum] =
              exponentials(scores + row * columns, i + row + 1, seen, scale, probabilities + row * columns);
          sums[row] = sum;
          log_sums[head * all.n_tokens + begin + i + row] = log_sum;
        }
        std::fill(probabilities + n_rows * columns, probabilities + kBlock * columns, 0);
        multiply<false>(kBlock, width, seen, probabilities, columns, values, width, answers, width);
        for (int row = 0; row < n_rows; row++)
          write(answers + row * width, 1, dim, 1 / sums[row], answer + place + row * q_row, q_row);
      }
    }
  });
}

void differentiate(const Documents& all, const BFloat16* d_answer, const BFloat16* q, const BFloat16* k,
                   const BFloat16* v, const BFloat16* answer, const float* log_sums, BFloat16* d_q, BFloat16* d_k,
                   BFloat16* d_v) {
  const int64_t dim = all.head_dim, q_row = all.n_heads * dim, k_row = all.n_kv_heads * dim;
  const int group = all.n_heads / all.n_kv_heads, width = padded(dim);
  const float scale = 1 / std::sqrt(float(dim));
  const auto floats = [width](int n) { return padded(n) * (17 * width / 2 + 2) + kBlock * padded(n) * 7 / 2; };
  for_each<Tiles>(all, floats, [=](int64_t begin, int n, int kv_head, float* memory) {
    const int columns = padded(n), size = columns * width;
    Pieces pieces(memory);
    BFloat16 *keys = pieces.halves(size), *keys_t = pieces.halves(size), *values = pieces.halves(size);
    BFloat16 *rows = pieces.halves(size), *answers = pieces.halves(size);
    float *queries = pieces.floats(size / 2), *queries_t = pieces.floats(size / 2);
    float *given = pieces.floats(size / 2), *given_t = pieces.floats(size / 2);  // gradients by answers
    float *by_query_t = pieces.floats(size), *by_key = pieces.floats(size), *by_value = pieces.floats(size);
    float *scratch = pieces.floats(size), *sums = pieces.floats(columns), *means = pieces.floats(columns);
    // Of a block of keys, by all queries that see any of them: so these are transposed.
    float *scores = pieces.floats(kBlock * columns), *by_probability = pieces.floats(kBlock * columns);
    BFloat16 *probabilities = pieces.halves(kBlock * columns), *by_score = pieces.halves(kBlock * columns);
    float* by_score_pairs = pieces.floats(kBlock / 2 * columns);
    const Integers lanes = lane_numbers();

    read(k + begin * k_row + kv_head * dim, k_row, n, dim, keys);
    read(v + begin * k_row + kv_head * dim, k_row, n, dim, values);
    pair(keys, columns, width, scratch);
    transpose(scratch, columns / 2, width, reinterpret_cast<float*>(keys_t), columns / 2);
    std::fill(by_key, by_key + size, 0.0f);
    std::fill(by_value, by_value + size, 0.0f);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
      const int64_t place = begin * q_row + head * dim;
      read(q + place, q_row, n, dim, rows);
      pair(rows, columns, width, queries);
      pair_transposed(rows, columns, width, queries_t);
      read(d_answer + place, q_row, n, dim, rows);
      pair(rows, columns, width, given);
      pair_transposed(rows, columns, width, given_t);
      read(answer + place, q_row, n, dim, answers);
      for (int i = 0; i < columns; i++) {
        Vector products{};
        for (int c = i * width; c < (i + 1) * width; c += kLanes) products += load(rows + c) * load(answers + c);
        means[i] = sum_of(products);  // of the gradients by this query's probabilities, weighted by them
        sums[i] = i < n ? log_sums[head * all.n_tokens + begin + i] : std::numeric_limits<float>::infinity();
      }
      std::fill(by_query_t, by_query_t + size, 0.0f);
      for (int j = 0; j < n; j += kBlock) {
        const int n_keys = std::min(kBlock, n - j), n_seeing = columns - j;
        multiply<false>(kBlock, n_seeing, width, keys + j * width, width, queries_t + j, columns, scores, columns);
        multiply<false>(kBlock, n_seeing, width, values + j * width, width, given_t + j, columns, by_probability,
                        columns);
        for (int key = 0; key < kBlock; key++)
          for (int i = 0; i < n_seeing; i += kLanes) {
            const int place_of = key * columns + i;
            Vector e{}, d{};
            if (key < n_keys) {
              e = exponential(::load(scores + place_of) * scale - ::load(sums + j + i));
              d = e * (::load(by_probability + place_of) - ::load(means + j + i));
            }
            if (i < kBlock) {
              const Integers sees = lanes + i >= key;
              e = sees ? e : Vector{};
              d = sees ? d : Vector{};
            }
            store_rounded(probabilities + place_of, e);
            store_rounded(by_score + place_of, d);
          }
        pair(by_score, kBlock, columns, by_score_pairs);
        multiply<true>(kBlock, width, n_seeing, probabilities, columns, given + j / 2 * width, width,
                       by_value + j * width, width);
        multiply<true>(kBlock, width, n_seeing, by_score, columns, queries + j / 2 * width, width, by_key + j * width,
                       width);
        multiply<true>(width, n_seeing, kBlock, keys_t + j, columns, by_score_pairs, columns, by_query_t + j, columns);
      }
      transpose(by_query_t, width, columns, scratch, width);
      write(scratch, n, dim, scale, d_q + place, q_row);
    }
    write(by_key, n, dim, scale, d_k + begin * k_row + kv_head * dim, k_row);
    write(by_value, n, dim, 1.0f, d_v + begin * k_row + kv_head * dim, k_row);
  });
}

}  // namespace
}  // namespace bfloat16
