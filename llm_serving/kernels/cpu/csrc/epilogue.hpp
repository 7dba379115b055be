// What becomes of one panel's sums of one row: int8's scales; then bias, and store, add or silu-and-mul.
#pragma once

#include "layout.hpp"
#include "vec.hpp"

namespace llm {
namespace ISA {

// Of a panel of int8 by channel: what makes its exact sums values.
struct ChannelScales {
  I32 weight_sums[2];
  F32 scales[2];

  explicit ChannelScales(const Packed& weight, int panel) {
    const uint8_t* end = weight.data + (panel + 1) * panel_bytes(Format::i8, weight.k) - 8 * PANEL;
    for (int h = 0; h < 2; h++) {
      scales[h] = load(reinterpret_cast<const float*>(end) + h * HALF);
      weight_sums[h] = load_i32(end + (PANEL + h * HALF) * 4);
    }
  }
  // Weights are stored as w + 128: what takes that out of a row's sums.
  LLM_INLINE I32 correction(const RowScale& row) { return set1_i32(static_cast<int32_t>(-128u * row.sum)); }
  // `sum` has the correction.
  [[gnu::always_inline]] F32 finish(I32 sum, int half, const RowScale& row) const {
    const I32 exact = sub_i32(sum, mul_i32(weight_sums[half], set1_i32(row.zero)));
    return mul(to_float(exact), mul(scales[half], set1(row.scale)));
  }
};

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
