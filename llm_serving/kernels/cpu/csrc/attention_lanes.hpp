// What attention's inner loops multiply, by format of the cache.
//
// float32 and bfloat16 are multiplied as they are.  int8 keys and values become words (16 bits) when they are
// read, once for all queries that share them; a query is rounded to words with a scale of its own, and so are
// a chunk's weights, each times the scale of its value.  Products of words add up in integers, exactly.
#pragma once

#include <algorithm>

#include "kernels.hpp"
#include "unit.hpp"
#include "vec.hpp"

namespace llm {
namespace ISA {
namespace {

constexpr int CHUNK = 64;
constexpr int CHUNK_TILES = CHUNK / TILE;

// A query's words times MAX_HEAD_DIM bytes, and a weight's times CHUNK bytes, add up to less than 2^31.
constexpr float MOST_QUERY_WORD = 16383.0f, MOST_WEIGHT_WORD = 32767.0f;

// A lane's 32 bits of the cache: PER_LANE numbers; and what their products add up in.
template <KvFormat format>
struct Lane {
  static constexpr bool IS_SCALED = false;
  static constexpr int PER_LANE = format == KvFormat::f32 ? 1 : 2;
  static constexpr int BYTES = 64;  // of the cache, for 16 lanes
  using Sum = F32;
};
template <>
struct Lane<KvFormat::i8> {
  static constexpr bool IS_SCALED = true;
  static constexpr int PER_LANE = 2;
  static constexpr int BYTES = 32;
  using Sum = I32;
};

template <KvFormat format>
LLM_INLINE I32 load_lanes(const char* p) {
  if constexpr (Lane<format>::IS_SCALED)
    return load_i8_pairs(p);
  else
    return load_i32(p);
}

template <KvFormat format>
LLM_INLINE typename Lane<format>::Sum no_sum() {
  if constexpr (Lane<format>::IS_SCALED)
    return zero_i32();
  else
    return zero();
}

template <KvFormat format>
LLM_INLINE typename Lane<format>::Sum dot(typename Lane<format>::Sum sum, I32 a, I32 b) {
  if constexpr (format == KvFormat::i8)
    return dot_i16(sum, a, b);
  else if constexpr (format == KvFormat::bf16)
    return dot_bf16(sum, a, b);
  else
    return fma(as_float(a), as_float(b), sum);
}

// The scales of a tile's positions.
LLM_INLINE F32 load_scales(const char* tile, size_t offset) {
  return load(reinterpret_cast<const float*>(tile + offset));
}

// A chunk's weights, each times the scale of its value -> words; what a word is worth.  Where a weight is 0
// the scale may be NaN.
LLM_INLINE float to_words(const float* weights, const char* const* values, size_t scales, int num_tiles,
                          int16_t* words) {
  F32 scaled[CHUNK_TILES], most = zero();
  for (int t = 0; t < num_tiles; t++) {
    const F32 weight = load(weights + t * TILE);
    scaled[t] = select_less(zero(), weight, mul(weight, load_scales(values[t], scales)), zero());
    most = max(most, scaled[t]);
  }
  const float top = largest(most);
  const F32 by = set1(top > VANISHING ? MOST_WEIGHT_WORD / top : 0.0f);
  for (int t = 0; t < num_tiles; t++) pack_i16(words + t * TILE, to_int(mul(scaled[t], by)));
  return top > VANISHING ? top / MOST_WEIGHT_WORD : 0.0f;
}

}  // namespace
}  // namespace ISA
}  // namespace llm
