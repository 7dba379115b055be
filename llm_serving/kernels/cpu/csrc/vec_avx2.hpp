// vec.hpp for AVX2 with FMA and F16C: sixteen lanes in two registers.  Included by vec.hpp only.
#pragma once

namespace llm {
namespace ISA {

struct F32 {
  __m256 lo, hi;
};
struct I32 {
  __m256i lo, hi;
};

LLM_INLINE __m256i tail8(int count) {  // all bits of the first `count` of eight lanes
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

LLM_INLINE F32 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
LLM_INLINE F32 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LLM_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LLM_INLINE F32 load(const float* p, int count) {
  return {_mm256_maskload_ps(p, tail8(count)), _mm256_maskload_ps(p + 8, tail8(count - 8))};
}
LLM_INLINE void store(float* p, F32 v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
LLM_INLINE void store(float* p, F32 v, int count) {
  _mm256_maskstore_ps(p, tail8(count), v.lo);
  _mm256_maskstore_ps(p + 8, tail8(count - 8), v.hi);
}
LLM_INLINE F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
LLM_INLINE F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
LLM_INLINE F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
LLM_INLINE F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
LLM_INLINE F32 fma(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
LLM_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
LLM_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
LLM_INLINE F32 select_less(F32 a, F32 b, F32 x, F32 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
LLM_INLINE F32 absolute(F32 v) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, v.lo), _mm256_andnot_ps(sign, v.hi)};
}
LLM_INLINE bool any_equal(F32 a, F32 b) {
  const __m256 low = _mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), high = _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ);
  return _mm256_movemask_ps(_mm256_or_ps(low, high)) != 0;
}
LLM_INLINE __m256 low(F32 v) { return v.lo; }
LLM_INLINE __m256 high(F32 v) { return v.hi; }

LLM_INLINE I32 zero_i32() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
LLM_INLINE I32 set1_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
LLM_INLINE I32 load_i32(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
LLM_INLINE void store_i32(void* p, I32 v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), v.lo);
  _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, v.hi);
}
LLM_INLINE I32 broadcast(const void* p) {
  int32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return set1_i32(bits);
}
LLM_INLINE I32 add_i32(I32 a, I32 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
LLM_INLINE I32 sub_i32(I32 a, I32 b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
LLM_INLINE I32 mul_i32(I32 a, I32 b) {
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
LLM_INLINE I32 max_i32(I32 a, I32 b) {
  return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}
LLM_INLINE I32 min_i32(I32 a, I32 b) {
  return {_mm256_min_epi32(a.lo, b.lo), _mm256_min_epi32(a.hi, b.hi)};
}
LLM_INLINE I32 keep_i32(I32 v, int count) {
  return {_mm256_and_si256(v.lo, tail8(count)), _mm256_and_si256(v.hi, tail8(count - 8))};
}
LLM_INLINE I32 and_bits(I32 a, I32 b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
template <int n>
LLM_INLINE I32 shift_right_16(I32 a) {
  return {_mm256_srli_epi16(a.lo, n), _mm256_srli_epi16(a.hi, n)};
}
LLM_INLINE __m256i low_i32(I32 v) { return v.lo; }
LLM_INLINE __m256i high_i32(I32 v) { return v.hi; }
LLM_INLINE F32 as_float(I32 bits) {
  return {_mm256_castsi256_ps(bits.lo), _mm256_castsi256_ps(bits.hi)};
}
LLM_INLINE I32 as_bits(F32 v) { return {_mm256_castps_si256(v.lo), _mm256_castps_si256(v.hi)}; }
LLM_INLINE F32 to_float(I32 v) { return {_mm256_cvtepi32_ps(v.lo), _mm256_cvtepi32_ps(v.hi)}; }
LLM_INLINE I32 to_int(F32 v) { return {_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi)}; }
LLM_INLINE F32 power_of_two(I32 n) {  // n in -126 .. 128 (infinity)
  const I32 biased = add_i32(n, set1_i32(127));
  return as_float({_mm256_slli_epi32(biased.lo, 23), _mm256_slli_epi32(biased.hi, 23)});
}

LLM_INLINE __m128i load_16_bytes(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
LLM_INLINE F32 load_bf16(const uint16_t* p) {
  return as_float({_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16_bytes(p)), 16),
                   _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16_bytes(p + 8)), 16)});
}
LLM_INLINE F32 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_16_bytes(p)), _mm256_cvtph_ps(load_16_bytes(p + 8))};
}
LLM_INLINE __m256i round_bf16_8(__m256 v) {  // to nearest even, in the lower half of each lane
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
}
LLM_INLINE void round_bf16(uint16_t* p, F32 v) {
  const __m256i mixed = _mm256_packus_epi32(round_bf16_8(v.lo), round_bf16_8(v.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
}
LLM_INLINE void pack_i8(int8_t* p, I32 v) {  // saturates
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.lo, v.hi), 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

LLM_INLINE I32 load_i8_pairs(const void* p) {
  return {_mm256_cvtepi8_epi16(load_16_bytes(p)), _mm256_cvtepi8_epi16(load_16_bytes(static_cast<const char*>(p) + 16))};
}
LLM_INLINE void pack_i16(int16_t* p, I32 v) {  // saturates
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(_mm256_packs_epi32(v.lo, v.hi), 0xd8));
}
LLM_INLINE I32 dot_i16(I32 acc, I32 a, I32 b) {
  return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(a.lo, b.lo)),
          _mm256_add_epi32(acc.hi, _mm256_madd_epi16(a.hi, b.hi))};
}

LLM_INLINE __m256 even_bf16(__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
LLM_INLINE __m256 odd_bf16(__m256i v) {
  return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
LLM_INLINE __m256 dot_bf16_8(__m256 acc, __m256i a, __m256i b) {
  acc = _mm256_fmadd_ps(even_bf16(a), even_bf16(b), acc);
  return _mm256_fmadd_ps(odd_bf16(a), odd_bf16(b), acc);
}
LLM_INLINE F32 dot_bf16(F32 acc, I32 a, I32 b) {
  return {dot_bf16_8(acc.lo, a.lo, b.lo), dot_bf16_8(acc.hi, a.hi, b.hi)};
}

// By words: maddubs would saturate.
LLM_INLINE __m256i dot_u8s8_8(__m256i acc, __m256i u, __m256i s) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(0xff)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
LLM_INLINE I32 dot_u8s8(I32 acc, I32 u, I32 s) {
  return {dot_u8s8_8(acc.lo, u.lo, s.lo), dot_u8s8_8(acc.hi, u.hi, s.hi)};
}

// The compiler must have the value in a register here, and knows nothing about it after.
template <class V>
LLM_INLINE void pin(V& v) {
  asm volatile("" : "+x"(v.lo), "+x"(v.hi));
}

}  // namespace ISA
}  // namespace llm
