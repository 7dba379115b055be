// vec.hpp for AVX-512 with BF16 and VNNI.  Included by vec.hpp only.
#pragma once

namespace llm {
namespace ISA {

using F32 = __m512;
using I32 = __m512i;

LLM_INLINE __mmask16 tail(int count) { return static_cast<__mmask16>((1u << count) - 1); }

LLM_INLINE F32 zero() { return _mm512_setzero_ps(); }
LLM_INLINE F32 set1(float x) { return _mm512_set1_ps(x); }
LLM_INLINE F32 load(const float* p) { return _mm512_loadu_ps(p); }
LLM_INLINE F32 load(const float* p, int count) { return _mm512_maskz_loadu_ps(tail(count), p); }
LLM_INLINE void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
LLM_INLINE void store(float* p, F32 v, int count) { _mm512_mask_storeu_ps(p, tail(count), v); }
LLM_INLINE F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
LLM_INLINE F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
LLM_INLINE F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
LLM_INLINE F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
LLM_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
LLM_INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
LLM_INLINE F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
LLM_INLINE F32 select_less(F32 a, F32 b, F32 x, F32 y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
LLM_INLINE F32 absolute(F32 v) { return _mm512_abs_ps(v); }
LLM_INLINE bool any_equal(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) != 0; }
LLM_INLINE __m256 low(F32 v) { return _mm512_castps512_ps256(v); }
LLM_INLINE __m256 high(F32 v) { return _mm512_extractf32x8_ps(v, 1); }

LLM_INLINE I32 zero_i32() { return _mm512_setzero_si512(); }
LLM_INLINE I32 set1_i32(int32_t x) { return _mm512_set1_epi32(x); }
LLM_INLINE I32 load_i32(const void* p) { return _mm512_loadu_si512(p); }
LLM_INLINE void store_i32(void* p, I32 v) { _mm512_storeu_si512(p, v); }
LLM_INLINE I32 broadcast(const void* p) {
  int32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return _mm512_set1_epi32(bits);
}
LLM_INLINE I32 add_i32(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
LLM_INLINE I32 sub_i32(I32 a, I32 b) { return _mm512_sub_epi32(a, b); }
LLM_INLINE I32 mul_i32(I32 a, I32 b) { return _mm512_mullo_epi32(a, b); }
LLM_INLINE I32 max_i32(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
LLM_INLINE I32 min_i32(I32 a, I32 b) { return _mm512_min_epi32(a, b); }
LLM_INLINE I32 keep_i32(I32 v, int count) { return _mm512_maskz_mov_epi32(tail(count), v); }
LLM_INLINE I32 and_bits(I32 a, I32 b) { return _mm512_and_si512(a, b); }
template <int n>
LLM_INLINE I32 shift_right_16(I32 a) { return _mm512_srli_epi16(a, n); }
LLM_INLINE __m256i low_i32(I32 v) { return _mm512_castsi512_si256(v); }
LLM_INLINE __m256i high_i32(I32 v) { return _mm512_extracti64x4_epi64(v, 1); }
LLM_INLINE F32 as_float(I32 bits) { return _mm512_castsi512_ps(bits); }
LLM_INLINE I32 as_bits(F32 v) { return _mm512_castps_si512(v); }
LLM_INLINE F32 to_float(I32 v) { return _mm512_cvtepi32_ps(v); }
LLM_INLINE I32 to_int(F32 v) { return _mm512_cvtps_epi32(v); }
LLM_INLINE F32 power_of_two(I32 n) {  // n in -126 .. 128 (infinity)
  return as_float(_mm512_slli_epi32(add_i32(n, set1_i32(127)), 23));
}

LLM_INLINE F32 load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
LLM_INLINE F32 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LLM_INLINE void round_bf16(uint16_t* p, F32 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
}
LLM_INLINE void pack_i8(int8_t* p, I32 v) {  // saturates
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v));
}
LLM_INLINE F32 dot_bf16(F32 acc, I32 a, I32 b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
LLM_INLINE I32 load_i8_pairs(const void* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
LLM_INLINE void pack_i16(int16_t* p, I32 v) {  // saturates
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(v));
}
LLM_INLINE I32 dot_i16(I32 acc, I32 a, I32 b) {  // GCC 12 moves the accumulators of the intrinsic about
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}
LLM_INLINE I32 dot_u8s8(I32 acc, I32 u, I32 s) { return _mm512_dpbusd_epi32(acc, u, s); }

// The compiler must have the value in a register here, and knows nothing about it after.
template <class V>
LLM_INLINE void pin(V& v) {
  asm volatile("" : "+v"(v));
}

}  // namespace ISA
}  // namespace llm
