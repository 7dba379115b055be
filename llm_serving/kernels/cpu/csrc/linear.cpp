// Linear layers over packed weights: activations into the form that a format multiplies with, and dispatch.
#include "linear.hpp"

#include "vec.hpp"

namespace llm {
namespace ISA {
namespace {

void round_row(const float* x, int k, uint16_t* to) {
  int i = 0;
  for (; i + LANES <= k; i += LANES) round_bf16(to + i, load(x + i));
  if (i < k) round_bf16(to + i, load(x + i, k - i));
}

// One scale and zero point for the row, so that 0 is met exactly.  A row that is not finite gets the scale NaN.
void quantize_row(const float* x, int k, int8_t* to, RowScale* row) {
  F32 low = zero(), high = zero(), finite = zero();
  const auto look = [&](F32 v) {
    low = min(low, v);
    high = max(high, v);
    finite = fma(v, zero(), finite);  // 0, or NaN
  };
  const int whole = k / LANES * LANES;
  for (int i = 0; i < whole; i += LANES) look(load(x + i));
  if (whole < k) look(load(x + whole, k - whole));
  const float least = smallest(low), range = largest(high) - least;
  const float inverse = range > 0 ? 255.0f / range : 0.0f;
  row->scale = range / 255.0f + sum(finite);
  const bool is_finite = row->scale == row->scale;
  row->zero = is_finite ? -128 - static_cast<int32_t>(__builtin_rintf(least * inverse)) : 0;
  I32 total = zero_i32();
  const I32 shift = set1_i32(row->zero);
  const auto quantized = [&](F32 v) {
    const I32 q = add_i32(to_int(mul(v, set1(inverse))), shift);
    return min_i32(max_i32(q, set1_i32(-128)), set1_i32(127));
  };
  for (int i = 0; i < whole; i += LANES) {
    const I32 q = quantized(load(x + i));
    pack_i8(to + i, q);
    total = add_i32(total, q);
  }
  if (whole < k) {
    const I32 q = quantized(load(x + whole, k - whole));
    pack_i8(to + whole, q);
    std::memset(to + k, 0, whole + LANES - k);
    total = add_i32(total, keep_i32(q, k - whole));
  }
  row->sum = sum_i32(total);
}

// One scale for each block of 32, whose sign makes the largest -128: a finer step than 127 gives, and its
// opposite, where there is one, becomes 127.  Correction: see layout.hpp.
void quantize_blocks(Format format, const float* x, int k, int8_t* to, BlockScale* scales) {
  for (int b = 0; b < k / BLOCK; b++, x += BLOCK, to += BLOCK) {
    const F32 left = load(x), right = load(x + LANES);
    const F32 finite = fma(left, zero(), mul(right, zero()));
    const float size = largest(max(absolute(left), absolute(right)));
    const float most = any_equal(max(left, right), set1(size)) ? size : -size;
    const float inverse = size > 0 ? -128.0f / most : 0.0f;
    const I32 limit = set1_i32(127);
    const I32 p = min_i32(to_int(mul(left, set1(inverse))), limit);
    const I32 q = min_i32(to_int(mul(right, set1(inverse))), limit);
    pack_i8(to, p);
    pack_i8(to + LANES, q);
    const int32_t total = sum_i32(add_i32(p, q));  // of a block that is not finite: anything
    scales[b].scale = most / -128.0f + sum(finite);
    if (format == Format::q4_1)
      scales[b].product = scales[b].scale * static_cast<float>(total);
    else
      scales[b].sum = (format == Format::q8_0 ? -128u : -8u) * total;
  }
}

void multiply(const Packed& weight, const uint8_t* activations, int rows, int panel_begin, int panel_end,
              float* y, size_t ldy, Epilogue epilogue) {
  (in_blocks(weight.format) ? multiply_blocks : multiply_words)(weight, activations, rows, panel_begin,
                                                                panel_end, y, ldy, epilogue);
}

}  // namespace

// An odd number of cache lines: rows that are a power of two apart would share the sets of the cache.
size_t activation_bytes(Format format, int k) {
  size_t bytes = static_cast<size_t>(words(format, k)) * 4;
  if (format == Format::i8) bytes = scale_offset(k) + sizeof(RowScale);
  if (in_blocks(format)) bytes = scale_offset(k) + k / BLOCK * sizeof(BlockScale);
  return round_up(bytes, 64) | 64;
}

void quantize(Format format, const float* x, size_t ldx, int rows, int k, uint8_t* activations) {
  const size_t stride = activation_bytes(format, k);
  for (int r = 0; r < rows; r++, x += ldx, activations += stride) {
    uint8_t* scales = activations + scale_offset(k);
    int8_t* bytes = reinterpret_cast<int8_t*>(activations);
    if (format == Format::f32) std::memcpy(activations, x, sizeof(float) * k);
    else if (format == Format::bf16) round_row(x, k, reinterpret_cast<uint16_t*>(activations));
    else if (format == Format::i8) quantize_row(x, k, bytes, reinterpret_cast<RowScale*>(scales));
    else quantize_blocks(format, x, k, bytes, reinterpret_cast<BlockScale*>(scales));
  }
}

LinearKernels linear_kernels() { return {activation_bytes, quantize, multiply}; }

}  // namespace ISA
}  // namespace llm
