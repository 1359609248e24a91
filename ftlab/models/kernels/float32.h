// Causal attention within each of many short documents, and its gradients, in float32.
//
// Products of so small matrices are mostly overhead for a library that is called for each. Here one thread does all of
// one document and one key head in its own memory, small enough for its cache, and computes nothing above the diagonal
// but what fills a tile. Every document's numbers depend on itself alone, not on its place in a row or on threads.

#pragma once

#include "vectors.h"

namespace float32 {
namespace {

constexpr int kRows = kLanes == 16 ? 12 : 6;  // of a tile: its sums fill most of the registers

struct NoScope {
  NoScope() {}
};

inline int padded(int n) { return rounded_up(n, kColumns); }

// n rows of `width` numbers that lie `stride` apart -> rows of `padded(width)` floats, zeros behind.
void read(const float* from, int64_t stride, int n, int width, float* to) {
  for (int i = 0; i < n; i++, from += stride, to += padded(width)) {
    for (int j = 0; j < width; j++) to[j] = from[j];
    std::fill(to + width, to + padded(width), 0.0f);
  }
}

void write(const float* from, int n, int width, float scale, float* to, int64_t stride) {
  for (int i = 0; i < n; i++, from += padded(width), to += stride)
    for (int j = 0; j < width; j++) to[j] = from[j] * scale;
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

// Scores of a query -> their softmax over the first `n`, zeros up to `width`; returns log sum e^score.
float softmax(float* scores, int n, int width) {
  std::fill(scores + n, scores + width, -std::numeric_limits<float>::infinity());
  Vector tops = load(scores), sums{};
  for (int j = kLanes; j < width; j += kLanes) tops = load(scores + j) > tops ? load(scores + j) : tops;
  const float top = largest_of(tops);
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

void attend(const Documents& all, const float* q, const float* k, const float* v, float* answer, float* log_sums) {
  const int64_t dim = all.head_dim, q_row = all.n_heads * dim, k_row = all.n_kv_heads * dim;
  const int group = all.n_heads / all.n_kv_heads, width = padded(dim);
  const float scale = 1 / std::sqrt(float(dim));
  const auto floats = [width](int n) { return (3 * n + padded(n)) * width + kRows * padded(n); };
  for_each<NoScope>(all, floats, [=](int64_t begin, int n, int kv_head, float* memory) {
    const int columns = padded(n);
    float *queries = memory, *values = queries + n * width, *answers = values + n * width;
    float *keys = answers + n * width, *scores = keys + columns * width;  // keys are transposed
    read(k + begin * k_row + kv_head * dim, k_row, n, dim, values);
    transpose(values, n, width, keys, columns);
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

void differentiate(const Documents& all, const float* d_answer, const float* q, const float* k, const float* v,
                   const float* answer, const float* log_sums, float* d_q, float* d_k, float* d_v) {
  const int64_t dim = all.head_dim, q_row = all.n_heads * dim, k_row = all.n_kv_heads * dim;
  const int group = all.n_heads / all.n_kv_heads, width = padded(dim);
  const float scale = 1 / std::sqrt(float(dim));
  const auto floats = [width](int n) { return (6 * n + kRows + 2 * padded(n)) * width + 2 * n * padded(n); };
  for_each<NoScope>(all, floats, [=](int64_t begin, int n, int kv_head, float* memory) {
    const int columns = padded(n);
    float *keys = memory, *queries = keys + n * width, *given = queries + n * width;  // given: gradients by answers
    float *by_query = given + n * width, *by_key = by_query + n * width, *by_value = by_key + n * width;
    float *answers = by_value + n * width, *keys_t = answers + kRows * width, *values_t = keys_t + columns * width;
    float *probabilities = values_t + columns * width, *by_score = probabilities + n * columns;
    read(v + begin * k_row + kv_head * dim, k_row, n, dim, keys);
    transpose(keys, n, width, values_t, columns);
    read(k + begin * k_row + kv_head * dim, k_row, n, dim, keys);
    transpose(keys, n, width, keys_t, columns);
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
}  // namespace float32
