// The k-th largest of many values, and where their running weight exceeds a limit, without sorting them.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>

#include "sampling_kernels.hpp"
#include "vec.hpp"

namespace llm {
namespace ISA {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();
constexpr int NUM_BUCKETS = 1024;

#ifdef __AVX512F__
LLM_INLINE F32 floor(F32 v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
// Which lanes of a are at least b.
LLM_INLINE uint32_t at_least(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
// The lanes of the mask, one after the other; writes 16 lanes.
LLM_INLINE void compress(uint32_t mask, I32 v, void* to) {
  store_i32(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), v));
}
// Exact sums of floats that are whole numbers below 2^50, 16 at a time.
struct WholeSum {
  __m512d a = _mm512_setzero_pd(), b = _mm512_setzero_pd();
  LLM_INLINE void add(WholeSum& s, F32 v) {
    s.a = _mm512_add_pd(s.a, _mm512_cvtps_pd(low(v)));
    s.b = _mm512_add_pd(s.b, _mm512_cvtps_pd(high(v)));
  }
  double total() const {
    double lanes[8];
    _mm512_storeu_pd(lanes, _mm512_add_pd(a, b));
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  }
};
#else
LLM_INLINE F32 floor(F32 v) { return {_mm256_floor_ps(v.lo), _mm256_floor_ps(v.hi)}; }
LLM_INLINE uint32_t at_least(F32 a, F32 b) {
  const int first = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ));
  return static_cast<uint32_t>(first | _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ)) << 8);
}
LLM_INLINE void compress(uint32_t mask, I32 v, void* to) {
  int32_t lanes[LANES], *out = static_cast<int32_t*>(to);
  store_i32(lanes, v);
  for (; mask != 0; mask &= mask - 1) *out++ = lanes[__builtin_ctz(mask)];
}
struct WholeSum {
  __m256d a = _mm256_setzero_pd(), b = _mm256_setzero_pd();
  LLM_INLINE void add(WholeSum& s, F32 v) {
    s.a = _mm256_add_pd(s.a, _mm256_cvtps_pd(_mm256_castps256_ps128(v.lo)));
    s.b = _mm256_add_pd(s.b, _mm256_cvtps_pd(_mm256_extractf128_ps(v.lo, 1)));
    s.a = _mm256_add_pd(s.a, _mm256_cvtps_pd(_mm256_castps256_ps128(v.hi)));
    s.b = _mm256_add_pd(s.b, _mm256_cvtps_pd(_mm256_extractf128_ps(v.hi, 1)));
  }
  double total() const {
    double lanes[4];
    _mm256_storeu_pd(lanes, _mm256_add_pd(a, b));
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
};
#endif

LLM_INLINE I32 counting(int first) {
  alignas(64) static constexpr int32_t lanes[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return add_i32(load_i32(lanes), set1_i32(first));
}

LLM_INLINE uint32_t first_lanes(int count) { return count >= LANES ? 0xffffu : (1u << count) - 1; }

// Arrays of this many entries (of 4 bytes, keys of 8) may be written up to a whole vector.
constexpr size_t room(int width) { return (static_cast<size_t>(width) + 2 * LANES - 1) / LANES * LANES; }

// Memory of a search over `width` values.
struct Search {
  float* values;       // of the candidates
  int32_t* places;     // where they stand
  uint64_t* keys;      // value above place, in an order that integers have
  double* histogram;   // [NUM_BUCKETS]
};

// Greater for the greater value and, of equals, the higher place; -0 equals 0.
LLM_INLINE uint64_t key_of(float value, int32_t place) {
  const float plain = value + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &plain, sizeof bits);
  bits ^= bits >> 31 != 0 ? 0xffffffffu : 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(place);
}

// Adds the values of places [begin, end) that are at least `edge` to the `count` found; how many they are then.
LLM_INLINE int add_candidates(const float* values, int begin, int end, F32 edge, int count, const Search& search) {
  for (int i = begin; i < end; i += LANES) {
    const F32 v = end - i < LANES ? load(values + i, end - i) : load(values + i);
    const uint32_t mask = at_least(v, edge) & first_lanes(end - i);
    if (mask == 0) continue;
    compress(mask, as_bits(v), search.values + count);
    compress(mask, counting(i), search.places + count);
    count += __builtin_popcount(mask);
  }
  return count;
}

// The values that are at least `cut`, in order of their places; how many.
inline int find_candidates(const float* values, int n, float cut, const Search& search) {
  return add_candidates(values, 0, n, set1(cut), 0, search);
}

// The same, of a row whose maxima (see Digest) say where to look; cut > -inf.
inline int find_candidates(const float* values, int n, const float* maxima, float cut, const Search& search) {
  const F32 edge = set1(cut);
  int count = 0;
  constexpr int AHEAD = 4;
  const float* const last_maxima = maxima + (n - 1) / MAXIMA_COLUMNS * LANES;
  for (int begin = 0; begin < n; begin += MAXIMA_COLUMNS, maxima += LANES) {
    const float* ahead = maxima + AHEAD * LANES;
    if (ahead <= last_maxima && at_least(load(ahead), edge) != 0)
      for (int i = 0; i < MAXIMA_COLUMNS; i += LANES) prefetch(values + begin + AHEAD * MAXIMA_COLUMNS + i);
    if (at_least(load(maxima), edge) == 0) continue;
    count = add_candidates(values, begin, std::min(begin + MAXIMA_COLUMNS, n), edge, count, search);
  }
  return count;
}

// Not above the k-th largest of n values, but close: the k-th largest of the maxima of parts, of which there are
// some times k; -inf if there are fewer.
inline float below_kth_largest(const float* values, int n, int k, const Search& search) {
  const int vectors = std::clamp(n / 8 / k, 1, 64);  // each lane of so many is a part
  const int step = vectors * LANES, num_parts = n / step * LANES;
  if (k > num_parts) return LOWEST;
  for (int part = 0; part < n / step; part++) {
    const float* from = values + static_cast<size_t>(part) * step;
    F32 most = load(from);
    for (int i = LANES; i < step; i += LANES) most = max(most, load(from + i));
    store(search.values + part * LANES, most);
  }
  std::nth_element(search.values, search.values + k - 1, search.values + num_parts, std::greater<float>());
  return search.values[k - 1];
}

// The k-th largest of n values, 1 <= k <= n.
inline float kth_largest(const float* values, int n, int k, const Search& search) {
  const int count = find_candidates(values, n, below_kth_largest(values, n, k, search), search);
  std::nth_element(search.values, search.values + k - 1, search.values + count, std::greater<float>());
  return search.values[k - 1];
}

// Buckets of equal width below the largest value; a greater value is never in a later bucket.
struct Buckets {
  F32 most, scale;
  LLM_INLINE F32 of(const Buckets& b, const float* values) {
    const F32 distance = mul(sub(b.most, load(values)), b.scale);
    const F32 last = set1(NUM_BUCKETS - 1);
    return floor(select_less(distance, last, distance, last));
  }
};

// The place of the entry at which the running weight first exceeds `limit`, in order of (value, place) down;
// -1 if the values that are at least `cut` do not weigh so much.  Weights are whole numbers.
inline int first_beyond(const float* values, const float* weights, int n, double limit, float most, float cut,
                        const Search& search) {
  const int count = find_candidates(values, n, cut, search);
  const float reach = most - cut;
  const Buckets buckets = {set1(most), set1(reach > 0 && reach < 64 ? NUM_BUCKETS / reach : NUM_BUCKETS / 64.0f)};
  std::fill(search.histogram, search.histogram + NUM_BUCKETS, 0.0);
  int32_t numbers[LANES];
  for (int i = 0; i < count; i += LANES) {
    store_i32(numbers, to_int(Buckets::of(buckets, search.values + i)));
    for (int j = 0; j < std::min(LANES, count - i); j++)
      search.histogram[numbers[j]] += static_cast<double>(weights[search.places[i + j]]);
  }
  double before = 0;
  int bucket = 0;
  while (bucket < NUM_BUCKETS && before + search.histogram[bucket] <= limit) before += search.histogram[bucket++];
  if (bucket == NUM_BUCKETS) return -1;

  int num_keys = 0;
  const F32 wanted = set1(static_cast<float>(bucket));
  for (int i = 0; i < count; i += LANES) {
    const F32 number = Buckets::of(buckets, search.values + i);
    uint32_t mask = at_least(number, wanted) & at_least(wanted, number) & first_lanes(count - i);
    for (; mask != 0; mask &= mask - 1) {
      const int at = i + __builtin_ctz(mask);
      search.keys[num_keys++] = key_of(search.values[at], search.places[at]);
    }
  }
  uint64_t* keys = search.keys;
  while (num_keys > 1) {
    const int half = num_keys / 2;
    std::nth_element(keys, keys + half, keys + num_keys, std::greater<uint64_t>());
    double upper = 0;
    for (int i = 0; i < half; i++) upper += static_cast<double>(weights[static_cast<uint32_t>(keys[i])]);
    if (before + upper > limit) {
      num_keys = half;
    } else {
      before += upper;
      keys += half;
      num_keys -= half;
    }
  }
  return static_cast<int>(static_cast<uint32_t>(keys[0]));
}

}  // namespace ISA
}  // namespace llm
