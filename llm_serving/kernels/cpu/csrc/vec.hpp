// Sixteen lanes: the one abstraction over instruction sets that the kernels are written with.
//
// F32 is sixteen floats, I32 sixteen 32-bit integers (or their bytes): one register with AVX-512, two with
// AVX2.  Each function is the plain instruction where there is one.  What a lane computes is the same in both,
// bit for bit, but for dot_bf16, whose AVX-512 instruction rounds in its own way.
//
//   load, load(.., count), store, store(.., count)   unaligned; a tail of count lanes, the others are zero
//   set1, zero, add, sub, mul, div, fma(a, b, c) = a * b + c, max, min
//   absolute; load_i32, store_i32, broadcast(4 bytes), set1_i32, zero_i32, add_i32, sub_i32, mul_i32, max_i32,
//   min_i32, keep_i32 (the first count lanes, else 0), and_bits, shift_right_16<n>; as_float, as_bits (no conversion)
//   to_float, to_int (nearest, ties to even)
//   load_bf16, load_f16 -> F32; round_bf16(16 floats) -> 16 bf16 at an address; pack_i8 -> 16 bytes
//   dot_bf16(acc, a, b)   acc + a[0] * b[0] + a[1] * b[1] in each lane
//   load_i8_pairs(32 bytes) -> 32 words (16 bits), two a lane; pack_i16 -> 16 words
//   dot_i16(acc, a, b)   acc + two products of words in each lane (mod 2^32)
//   dot_u8s8(acc, u, s)   acc + four products of unsigned and signed bytes in each lane, exact (mod 2^32)
//   select_less(a, b, x, y)   a < b ? x : y; any_equal(a, b): in some lane
//   sum, largest, smallest (fixed tree), sum_i32; exp; silu_mul
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef ISA
#error "compile the kernels with -DISA=avx2, avx512, amx or amx_emulated"
#endif
#define LLM_INLINE static inline __attribute__((always_inline))

namespace llm {
namespace ISA {
constexpr int LANES = 16;

// Into the second-level cache; any address will do.
LLM_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
// The compiler must have the address in a register here, and forgets that it was a sum of others.
LLM_INLINE void pin_address(const uint8_t*& p) { asm volatile("" : "+r"(p)); }
}
}  // namespace llm

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include "vec_avx512.hpp"
#else
#include "vec_avx2.hpp"
#endif

namespace llm {
namespace ISA {

// The eight floats become four, two, one.
LLM_INLINE float sum8(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

LLM_INLINE float largest8(__m256 v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

LLM_INLINE float sum(F32 v) { return sum8(_mm256_add_ps(low(v), high(v))); }
LLM_INLINE float largest(F32 v) { return largest8(_mm256_max_ps(low(v), high(v))); }
LLM_INLINE float smallest(F32 v) { return -largest(sub(set1(-0.0f), v)); }

LLM_INLINE int32_t sum_i32(I32 v) {
  const __m256i eight = _mm256_add_epi32(low_i32(v), high_i32(v));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

// e^x within 2 units in the last place: 2^n times a polynomial (Cephes expf) of the rest, which is at
// most ln(2) / 2.  0 below -87.33 (also for -inf), inf above 88.37, NaN for NaN.
LLM_INLINE F32 exp(F32 x) {
  const F32 lowest = set1(-87.33f);
  const F32 y = min(set1(89.0f), max(lowest, x));  // these keep the second operand if it is NaN
  const I32 n = to_int(mul(y, set1(1.44269504088896341f)));
  const F32 f = to_float(n);
  const F32 r = fma(f, set1(2.12194440e-4f), fma(f, set1(-0.693359375f), y));
  F32 p = fma(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return select_less(x, lowest, zero(), mul(p, power_of_two(n)));
}

// silu(gate) * up, silu(g) = g / (1 + e^-g).
LLM_INLINE F32 silu_mul(F32 gate, F32 up) {
  return mul(div(gate, add(set1(1.0f), exp(sub(zero(), gate)))), up);
}

}  // namespace ISA
}  // namespace llm
