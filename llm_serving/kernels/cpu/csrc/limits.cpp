// What a thread of this machine can do at most: reading, and dot products with every sum in a register.
#include "kernels.hpp"
#include "vec.hpp"

namespace llm {
namespace ISA {
namespace {

#if defined(__AVX512BF16__)
constexpr int SUMS = 24;
#else
constexpr int SUMS = 6;  // of two registers each
#endif

int32_t read(const uint8_t* data, size_t size) {
  I32 sums[4] = {zero_i32(), zero_i32(), zero_i32(), zero_i32()};
  for (size_t i = 0; i < size; i += 1024)
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) sums[j % 4] = add_i32(sums[j % 4], load_i32(data + i + 64 * j));
  return sum_i32(add_i32(add_i32(sums[0], sums[1]), add_i32(sums[2], sums[3])));
}

template <class V, class Step>
LLM_INLINE double chains(V start, long steps, int operations, Step step) {
  V sums[SUMS];
#pragma GCC unroll 24
  for (int i = 0; i < SUMS; i++) {
    sums[i] = start;
    pin(sums[i]);  // or equal sums would be computed once
  }
  for (long s = 0; s < steps; s++)
#pragma GCC unroll 24
    for (int i = 0; i < SUMS; i++) {
      sums[i] = step(sums[i]);
      pin(sums[i]);
    }
  return static_cast<double>(steps) * SUMS * operations;
}

double multiply(Format format, long steps) {
  I32 bytes = set1_i32(0x01010101), ones = set1_i32(0x3f803f80);
  F32 one = set1(1.0f);
  pin(bytes);
  pin(ones);
  pin(one);
  if (format == Format::f32)
    return chains(zero(), steps, 2 * LANES, [&](F32 sum) { return fma(one, one, sum); });
  if (format == Format::bf16)
    return chains(zero(), steps, 4 * LANES, [&](F32 sum) { return dot_bf16(sum, ones, ones); });
  return chains(zero_i32(), steps, 8 * LANES, [&](I32 sum) {
    I32 weight = bytes;
    pin(weight);  // or AVX2 would multiply once for all steps
    return dot_u8s8(sum, weight, bytes);
  });
}

}  // namespace

LimitKernels limit_kernels() { return {read, multiply}; }

}  // namespace ISA
}  // namespace llm
