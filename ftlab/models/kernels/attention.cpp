// Attention within each of many documents, as cpu_kernel.py calls it; heads are (n_tokens, heads, head_dim) in memory.

#include "bfloat16.h"
#include "float32.h"

#define FOR_DTYPE(name, T)                                                                                            \
  extern "C" void attend_##name(const Documents* all, const T* q, const T* k, const T* v, T* answer, float* sums) {   \
    name::attend(*all, q, k, v, answer, sums);                                                                        \
  }                                                                                                                   \
  extern "C" void differentiate_##name(const Documents* all, const T* d_answer, const T* q, const T* k, const T* v,   \
                                       const T* answer, const float* sums, T* d_q, T* d_k, T* d_v) {                  \
    name::differentiate(*all, d_answer, q, k, v, answer, sums, d_q, d_k, d_v);                                        \
  }
FOR_DTYPE(float32, float)
FOR_DTYPE(bfloat16, uint16_t)
