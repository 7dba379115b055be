// How much one is worth where floats are rounded to whole numbers: the largest of them becomes the largest number.
#pragma once

#include <algorithm>

#include "vec.hpp"

namespace llm {
namespace ISA {
namespace {

constexpr float VANISHING = 1e-30f;  // what is not larger counts as 0

// Of x [d] * scale in numbers up to `most`; NaN if some x is not finite.
inline float unit_of(const float* x, F32 scale, int d, float most) {
  F32 largest_x = zero(), finite = zero();
  for (int i = 0; i < d; i += LANES) {
    const F32 scaled = mul(load(x + i, std::min(d - i, LANES)), scale);
    largest_x = max(largest_x, absolute(scaled));
    finite = fma(scaled, zero(), finite);
  }
  const float top = largest(largest_x);
  return (top > VANISHING ? top / most : 0.0f) + sum(finite);
}

}  // namespace
}  // namespace ISA
}  // namespace llm
