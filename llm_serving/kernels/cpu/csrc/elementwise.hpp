// Norms and rotation of one row, in the order of arithmetic that every caller shares.
#pragma once

#include <cmath>

#include "vec.hpp"

namespace llm {
namespace ISA {

// Lane by lane, two vectors at a time, then a fixed tree.
LLM_INLINE float sum_of_squares(const float* x, int n) {
  F32 even = zero(), odd = zero();
  int i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    const F32 a = load(x + i), b = load(x + i + LANES);
    even = fma(a, a, even);
    odd = fma(b, b, odd);
  }
  for (; i < n; i += LANES) {
    const F32 a = n - i < LANES ? load(x + i, n - i) : load(x + i);
    even = fma(a, a, even);
  }
  return sum(add(even, odd));
}

LLM_INLINE void rms_norm_row(const float* x, const float* weight, float eps, int n, float* y) {
  const float mean = sum_of_squares(x, n) / static_cast<float>(n);
  const F32 scale = set1(1.0f / std::sqrt(mean + eps));
  int i = 0;
  for (; i + LANES <= n; i += LANES) store(y + i, mul(mul(load(x + i), scale), load(weight + i)));
  if (i < n) store(y + i, mul(mul(load(x + i, n - i), scale), load(weight + i, n - i)), n - i);
}

// Each half turned into the other: head * cos + halves swapped * sin, rounded like that.
LLM_INLINE void rotate_head(float* head, const float* cos, const float* sin, int d) {
  const int half = d / 2;
  for (int i = 0; i < half; i += LANES) {
    const int count = half - i < LANES ? half - i : LANES;
    const F32 first = load(head + i, count), second = load(head + half + i, count);
    const F32 a = mul(second, load(sin + i, count)), b = mul(first, load(sin + half + i, count));
    store(head + i, fma(first, load(cos + i, count), a), count);
    store(head + half + i, fma(second, load(cos + half + i, count), b), count);
  }
}

}  // namespace ISA
}  // namespace llm
