// What becomes of one panel's sums of one row: bias, then store, add or silu-and-mul.
#pragma once

#include "layout.hpp"
#include "vec.hpp"

namespace llm {
namespace ISA {

LLM_INLINE int columns_left(int n, int column) {
  const int left = n - column;
  return left < 0 ? 0 : left < LANES ? left : LANES;
}

LLM_INLINE void store_half(const Packed& weight, int column, F32 sums, float* y, bool accumulate) {
  const int count = columns_left(weight.n, column);
  if (weight.bias) sums = add(sums, load(weight.bias + column, count));
  if (accumulate) sums = add(load(y + column, count), sums);
  store(y + column, sums, count);
}

// `y` is the row's first column.
LLM_INLINE void store_panel(const Packed& weight, int panel, F32 left, F32 right, float* y,
                            Epilogue epilogue) {
  const int column = panel * PANEL;
  if (epilogue == Epilogue::silu_mul) {
    if (weight.bias) {
      left = add(left, load(weight.bias + column));
      right = add(right, load(weight.bias + column + HALF));
    }
    return store(y + column / 2, silu_mul(left, right));
  }
  if (weight.bias == nullptr && column + PANEL <= weight.n) {  // nearly always
    if (epilogue == Epilogue::add) {
      left = add(load(y + column), left);
      right = add(load(y + column + HALF), right);
    }
    store(y + column, left);
    return store(y + column + HALF, right);
  }
  store_half(weight, column, left, y, epilogue == Epilogue::add);
  if (column + HALF < weight.n) store_half(weight, column + HALF, right, y, epilogue == Epilogue::add);
}

}  // namespace ISA
}  // namespace llm
