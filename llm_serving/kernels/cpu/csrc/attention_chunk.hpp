// One chunk of 64 positions and a few queries: scores, softmax, weighted sum.  See attention.cpp for the order.
#pragma once

#include <algorithm>
#include <limits>

#include "attention_plan.hpp"
#include "exp2.hpp"
#include "vec.hpp"

namespace llm {
namespace ISA {
namespace {

constexpr int CHUNK = 64;
constexpr int CHUNK_TILES = CHUNK / TILE;
#ifdef __AVX512F__
constexpr int MOST_ROWS = 6, MOST_COLUMNS = 4;  // accumulators that fit the registers: rows x vectors
#else
constexpr int MOST_ROWS = 3, MOST_COLUMNS = 2;
#endif
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.44269504088896341f;

// 32 bits of the cache: two bfloat16 or one float.
template <bool bf16>
LLM_INLINE F32 dot(F32 acc, I32 a, I32 b) {
  if constexpr (bf16)
    return dot_bf16(acc, a, b);
  else
    return fma(as_float(a), as_float(b), acc);
}

constexpr int padded(int d) { return (d + LANES - 1) / LANES * LANES; }

struct Partial {
  float* acc;  // [rows, padded d]
  float* max;  // [rows], in units of log2
  float* sum;  // [rows]
};

Partial partial_at(float* place, int rows, int d) {
  float* max = place + static_cast<size_t>(rows) * padded(d);
  return {place, max, max + rows};
}

// What a thread works with; see scratch_bytes.
struct Scratch {
  uint32_t* query;    // [rows, steps]
  float* lanes;       // [rows, 16] sums of weights
  float* scores;      // [MOST_ROWS, CHUNK]
  uint32_t* weights;  // [MOST_ROWS, CHUNK]
  float* own;         // two partial results
  float* other;
};

size_t lay_out(Scratch& scratch, void* memory, int rows, int d) {
  size_t used = 0;
  const auto take = [&](size_t num_floats) {
    float* place = memory == nullptr ? nullptr : static_cast<float*>(memory) + used;
    used += (num_floats + 15) / 16 * 16;
    return place;
  };
  scratch.query = reinterpret_cast<uint32_t*>(take(static_cast<size_t>(rows) * padded(d)));
  scratch.lanes = take(static_cast<size_t>(rows) * LANES);
  scratch.scores = take(MOST_ROWS * CHUNK);
  scratch.weights = reinterpret_cast<uint32_t*>(take(MOST_ROWS * CHUNK));
  scratch.own = take(partial_floats(rows, d));
  scratch.other = take(partial_floats(rows, d));
  return used * sizeof(float);
}

size_t scratch_bytes(const Cache& cache, int heads) {
  Scratch scratch;
  const int group = heads / cache.kv_heads;
  return lay_out(scratch, nullptr, group * tile_tokens(group), cache.head_dim);
}

// One chunk of one kv head's cache, tile by tile.
struct Chunk {
  const char* keys[CHUNK_TILES];
  const char* values[CHUNK_TILES];
};

// The cache line that is needed some chunks later, into the second level.
LLM_INLINE void fetch(const char* place) { _mm_prefetch(place, _MM_HINT_T1); }

// Scores of `rows` queries and `tiles` tiles of 16 positions; `ahead`: fetch the same of a later chunk.
template <bool bf16, int rows, int tiles, bool ahead>
LLM_INLINE void score_tiles(const uint32_t* query, int steps, const char* const* keys, const char* const* later,
                            float* scores) {
  F32 acc[rows][tiles];
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
    for (int t = 0; t < tiles; t++) acc[m][t] = zero();
  for (int step = 0; step < steps; step++) {
    I32 key[tiles];
#pragma GCC unroll 8
    for (int t = 0; t < tiles; t++) {
      key[t] = load_i32(keys[t] + static_cast<size_t>(step) * 64);
      if constexpr (ahead) fetch(later[t] + static_cast<size_t>(step) * 64);
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
      const I32 q = broadcast(query + static_cast<size_t>(m) * steps + step);
#pragma GCC unroll 8
      for (int t = 0; t < tiles; t++) acc[m][t] = dot<bf16>(acc[m][t], key[t], q);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
    for (int t = 0; t < tiles; t++) store(scores + m * CHUNK + t * TILE, acc[m][t]);
}

template <bool bf16, int rows, bool ahead>
LLM_INLINE void score(const uint32_t* query, int steps, const Chunk& chunk, const Chunk& later, int num_tiles,
                      float* scores) {
  int t = 0;
  const auto some = [&]<int tiles>() {
    score_tiles<bf16, rows, tiles, ahead>(query, steps, chunk.keys + t, later.keys + t, scores + t * TILE);
    t += tiles;
  };
  if constexpr (MOST_COLUMNS >= 4)
    while (t + 4 <= num_tiles) some.template operator()<4>();
  while (t + 2 <= num_tiles) some.template operator()<2>();
  if (t < num_tiles) some.template operator()<1>();
}

// Of each query all but the first `visible` scores of the chunk (perhaps none is visible) become -inf.
template <int rows>
LLM_INLINE void hide(float* scores, const int* visible, int num_tiles) {
  for (int m = 0; m < rows; m++) {
    for (int t = std::max(visible[m], 0) / TILE; t < num_tiles; t++) {
      float* tile = scores + m * CHUNK + t * TILE;
      const F32 seen = load(tile);
      store(tile, set1(-INFINITE));
      store(tile, seen, std::clamp(visible[m] - t * TILE, 0, TILE));
    }
  }
}

// Scores -> weights; how much older weights shrink.
template <bool bf16, int rows>
LLM_INLINE void soften(const float* scores, int num_tiles, float* max, float* lanes, uint32_t* weights, float* shrink) {
  float tops[LANES] = {}, minus[LANES];
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++) {
    F32 most = load(scores + m * CHUNK);
    for (int t = 1; t < num_tiles; t++) most = llm::ISA::max(most, load(scores + m * CHUNK + t * TILE));
    tops[m] = largest(most);
  }
  const F32 old = load(max, rows), now = llm::ISA::max(load(tops), old);
  const F32 base = llm::ISA::max(set1(std::numeric_limits<float>::lowest()), now);  // -inf: nothing is visible yet
  store(max, now, rows);
  store(minus, base);
  store(shrink, exp2<false>(sub(old, base)));
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++) {
    const F32 b = set1(minus[m]);
    F32 total = mul(load(lanes + m * LANES), set1(shrink[m]));
    for (int t = 0; t < num_tiles; t++) {
      const F32 w = exp2<bf16>(sub(load(scores + m * CHUNK + t * TILE), b));
      total = add(total, w);
      if constexpr (bf16)
        round_bf16(reinterpret_cast<uint16_t*>(weights + m * CHUNK) + t * TILE, w);
      else
        store(reinterpret_cast<float*>(weights + m * CHUNK) + t * TILE, w);
    }
    store(lanes + m * LANES, total);
  }
}

// acc [rows][columns vectors] = acc * shrink + weights x values, over the first `visible` positions.
template <bool bf16, int rows, int columns, bool ahead>
LLM_INLINE void weigh_columns(const uint32_t* weights, const char* const* values, const char* const* later, int d,
                              int visible, const float* shrink, float* acc, int stride, int count) {
  constexpr int per_tile = bf16 ? TILE / 2 : TILE;
  const auto value_at = [&](const char* place, int c) {
    const char* p = place + c * 64;
    return count < LANES ? as_bits(load(reinterpret_cast<const float*>(p), count)) : load_i32(p);
  };
  F32 sums[rows][columns];
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++) sums[m][c] = mul(load(acc + m * stride + c * LANES), set1(shrink[m]));
  const int whole = bf16 ? visible / 2 : visible;
  for (int t = 0; t * per_tile < whole; t++) {
    const int end = std::min(per_tile, whole - t * per_tile);
    for (int j = 0; j < end; j++) {
      I32 value[columns];
#pragma GCC unroll 8
      for (int c = 0; c < columns; c++) {
        value[c] = value_at(values[t] + static_cast<size_t>(j) * d * 4, c);
        if constexpr (ahead) fetch(later[t] + static_cast<size_t>(j) * d * 4 + c * 64);
      }
#pragma GCC unroll 8
      for (int m = 0; m < rows; m++) {
        const I32 w = broadcast(weights + m * CHUNK + t * per_tile + j);
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++) sums[m][c] = dot<bf16>(sums[m][c], value[c], w);
      }
    }
  }
  if (bf16 && visible % 2) {  // the pair's other half may be NaN
    const char* place = values[whole / per_tile] + static_cast<size_t>(whole % per_tile) * d * 4;
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++) {
      const I32 value = and_bits(value_at(place, c), set1_i32(0xffff));
#pragma GCC unroll 8
      for (int m = 0; m < rows; m++) sums[m][c] = dot<bf16>(sums[m][c], value, broadcast(weights + m * CHUNK + whole));
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++) store(acc + m * stride + c * LANES, sums[m][c]);
}

template <bool bf16, int rows, bool ahead>
LLM_INLINE void weigh(const uint32_t* weights, const Chunk& chunk, const Chunk& later, int d, int visible,
                      const float* shrink, float* acc) {
  const int stride = padded(d);
  const char *values[CHUNK_TILES], *then[CHUNK_TILES];
  int column = 0;
  const auto some = [&]<int columns>(int count) {
    for (int t = 0; t < CHUNK_TILES; t++) {
      values[t] = chunk.values[t] + static_cast<size_t>(column) * 4;
      then[t] = later.values[t] + static_cast<size_t>(column) * 4;
    }
    weigh_columns<bf16, rows, columns, ahead>(weights, values, then, d, visible, shrink, acc + column, stride, count);
    column += columns * LANES;
  };
  while (d - column >= MOST_COLUMNS * LANES) some.template operator()<MOST_COLUMNS>(LANES);
  if constexpr (MOST_COLUMNS > 2)
    if (d - column >= 2 * LANES) some.template operator()<2>(LANES);
  while (column < d) some.template operator()<1>(std::min(d - column, LANES));
}

// `rows` queries (from row `first` of the tile's) and one chunk; visible[m] positions of it belong to row m.
template <bool bf16, int rows, bool ahead>
void attend_chunk(const Chunk& chunk, const Chunk& later, int d, const int* visible, int first, const Scratch& scratch,
                  const Partial& part) {
  const int steps = bf16 ? d / 2 : d;
  const int most = std::min(*std::max_element(visible, visible + rows), CHUNK);
  const int num_tiles = (most + TILE - 1) / TILE;
  const uint32_t* query = scratch.query + static_cast<size_t>(first) * steps;
  score<bf16, rows, ahead>(query, steps, chunk, later, num_tiles, scratch.scores);
  if (*std::min_element(visible, visible + rows) < num_tiles * TILE) hide<rows>(scratch.scores, visible, num_tiles);
  float shrink[LANES];
  float *max = part.max + first, *lanes = scratch.lanes + first * LANES;
  if (num_tiles == CHUNK_TILES)  // unrolled
    soften<bf16, rows>(scratch.scores, CHUNK_TILES, max, lanes, scratch.weights, shrink);
  else
    soften<bf16, rows>(scratch.scores, num_tiles, max, lanes, scratch.weights, shrink);
  float* acc = part.acc + static_cast<size_t>(first) * padded(d);
  weigh<bf16, rows, ahead>(scratch.weights, chunk, later, d, most, shrink, acc);
}

template <bool bf16, bool ahead>
void attend_rows(int rows, const Chunk& chunk, const Chunk& later, int d, const int* visible, int first,
                 const Scratch& scratch, const Partial& part) {
  const auto of = [&]<int count>() { attend_chunk<bf16, count, ahead>(chunk, later, d, visible, first, scratch, part); };
  switch (rows) {
    case 1: return of.template operator()<1>();
    case 2: return of.template operator()<2>();
    case 3: return of.template operator()<3>();
#ifdef __AVX512F__
    case 4: return of.template operator()<4>();
    case 5: return of.template operator()<5>();
    default: return of.template operator()<6>();
#endif
  }
}

}  // namespace
}  // namespace ISA
}  // namespace llm
