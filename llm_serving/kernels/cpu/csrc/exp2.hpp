// Powers of two, for softmax.
#pragma once

#include "vec.hpp"

namespace llm {
namespace ISA {

// 2^x for x <= 0, within 2 units in the last place, or 3e-6 of it if `coarse` (enough for weights that are
// rounded to bfloat16).  2^0 is 1; -inf and what is smaller than any normal number give 0 or nearly; NaN stays.
template <bool coarse>
LLM_INLINE F32 exp2(F32 x) {
#ifdef __AVX512F__
  const F32 y = max(set1(-200.0f), x);
  const F32 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const F32 y = max(set1(-126.0f), x);
  const I32 n = to_int(y);
  const F32 whole = to_float(n);
#endif
  const F32 r = sub(y, whole);
  F32 p;
  if constexpr (coarse) {
    p = fma(set1(9.582852944731712e-3f), r, set1(5.5906426161527634e-2f));
    p = fma(p, r, set1(0.24024099111557007f));
    p = fma(p, r, set1(0.6931241750717163f));
  } else {
    p = fma(set1(1.5353361959569156e-4f), r, set1(1.3398875016719103e-3f));
    p = fma(p, r, set1(9.61843691766262e-3f));
    p = fma(p, r, set1(5.5503323674201965e-2f));
    p = fma(p, r, set1(0.24022647738456726f));
    p = fma(p, r, set1(0.6931471824645996f));
  }
  p = fma(p, r, set1(1.0f));
#ifdef __AVX512F__
  return _mm512_scalef_ps(p, whole);
#else
  return select_less(x, set1(-126.0f), zero(), mul(p, power_of_two(n)));
#endif
}

inline float exp2(float x) { return _mm256_cvtss_f32(low(exp2<false>(set1(x)))); }

}  // namespace ISA
}  // namespace llm
