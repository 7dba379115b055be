// One chunk of 64 positions and a few queries: scores, softmax, weighted sum.  See attention.cpp for the order.
#pragma once

#include <algorithm>
#include <limits>

#include "attention_lanes.hpp"
#include "attention_plan.hpp"
#include "exp2.hpp"

namespace llm {
namespace ISA {
namespace {

#ifdef __AVX512F__
constexpr int MOST_ROWS = 6, MOST_COLUMNS = 4;  // accumulators that fit the registers: rows x vectors
#else
constexpr int MOST_ROWS = 3, MOST_COLUMNS = 2;
#endif
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.44269504088896341f;

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
  uint32_t* query;     // [rows, steps]
  float* query_scale;  // [rows], of int8
  float* lanes;        // [rows, 16] sums of weights
  float* scores;       // [MOST_ROWS, CHUNK]
  uint32_t* weights;   // [MOST_ROWS, CHUNK]
  float* own;          // two partial results
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
  scratch.query_scale = take(rows);
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
template <KvFormat format, int rows, int tiles, bool ahead>
LLM_INLINE void score_tiles(const uint32_t* query, const float* query_scale, int steps, const char* const* keys,
                            const char* const* later, float* scores) {
  using Lane = ISA::Lane<format>;
  typename Lane::Sum acc[rows][tiles];
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
    for (int t = 0; t < tiles; t++) acc[m][t] = no_sum<format>();
#pragma GCC unroll 2
  for (int step = 0; step < steps; step++) {
    I32 key[tiles];
#pragma GCC unroll 8
    for (int t = 0; t < tiles; t++) {
      key[t] = load_lanes<format>(keys[t] + static_cast<size_t>(step) * Lane::BYTES);
      if (ahead && step % (64 / Lane::BYTES) == 0) fetch(later[t] + static_cast<size_t>(step) * Lane::BYTES);
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
      const I32 q = broadcast(query + static_cast<size_t>(m) * steps + step);
#pragma GCC unroll 8
      for (int t = 0; t < tiles; t++) acc[m][t] = dot<format>(acc[m][t], key[t], q);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
    for (int t = 0; t < tiles; t++) {
      if constexpr (Lane::IS_SCALED) {
        const F32 scale = load_scales(keys[t], scales_offset(2 * steps));
        store(scores + m * CHUNK + t * TILE, mul(mul(to_float(acc[m][t]), scale), set1(query_scale[m])));
      } else {
        store(scores + m * CHUNK + t * TILE, acc[m][t]);
      }
    }
  if constexpr (ahead && Lane::IS_SCALED)
#pragma GCC unroll 8
    for (int t = 0; t < tiles; t++) fetch(later[t] + scales_offset(2 * steps));
}

template <KvFormat format, int rows, bool ahead>
LLM_INLINE void score(const uint32_t* query, const float* query_scale, int steps, const Chunk& chunk,
                      const Chunk& later, int num_tiles, float* scores) {
  int t = 0;
  const auto some = [&]<int tiles>() {
    score_tiles<format, rows, tiles, ahead>(query, query_scale, steps, chunk.keys + t, later.keys + t,
                                            scores + t * TILE);
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

// Scores -> weights (int8: in place of the scores, to become words); how much older weights shrink.
template <KvFormat format, int rows>
LLM_INLINE void soften(float* scores, int num_tiles, float* max, float* lanes, uint32_t* weights, float* shrink) {
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
      const F32 w = exp2<format == KvFormat::bf16>(sub(load(scores + m * CHUNK + t * TILE), b));
      total = add(total, w);
      if constexpr (format == KvFormat::bf16)
        round_bf16(reinterpret_cast<uint16_t*>(weights + m * CHUNK) + t * TILE, w);
      else if constexpr (format == KvFormat::i8)
        store(scores + m * CHUNK + t * TILE, w);
      else
        store(reinterpret_cast<float*>(weights + m * CHUNK) + t * TILE, w);
    }
    store(lanes + m * LANES, total);
  }
}

// acc [rows][columns vectors] = acc * shrink + weights x values, over the first `visible` positions.
template <KvFormat format, int rows, int columns, bool ahead>
LLM_INLINE void weigh_columns(const uint32_t* weights, const float* worth, const char* const* values,
                              const char* const* later, int d, int visible, const float* shrink, float* acc,
                              int stride, int count) {
  using Lane = ISA::Lane<format>;
  constexpr int per_tile = TILE / Lane::PER_LANE, per_value = Lane::BYTES / LANES;
  const auto value_at = [&](const char* place, int c) {
    const char* p = place + c * Lane::BYTES;
    if (Lane::IS_SCALED || count == LANES) return load_lanes<format>(p);  // behind a tile's bytes stand its scales
    return as_bits(load(reinterpret_cast<const float*>(p), count));
  };
  typename Lane::Sum sums[rows][columns];
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++) {
      if constexpr (Lane::IS_SCALED)
        sums[m][c] = no_sum<format>();
      else
        sums[m][c] = mul(load(acc + m * stride + c * LANES), set1(shrink[m]));
    }
  // The other half of a last pair may be NaN; int8 has none, and its weight is 0.
  const int whole = Lane::IS_SCALED ? (visible + 1) / 2 : visible / Lane::PER_LANE;
  for (int t = 0; t * per_tile < whole; t++) {
    const int end = std::min(per_tile, whole - t * per_tile);
    for (int j = 0; j < end; j++) {
      I32 value[columns];
#pragma GCC unroll 8
      for (int c = 0; c < columns; c++) {
        value[c] = value_at(values[t] + static_cast<size_t>(j) * d * per_value, c);
        if (ahead && c % (64 / Lane::BYTES) == 0)
          fetch(later[t] + static_cast<size_t>(j) * d * per_value + c * Lane::BYTES);
      }
#pragma GCC unroll 8
      for (int m = 0; m < rows; m++) {
        const I32 w = broadcast(weights + m * CHUNK + t * per_tile + j);
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++) sums[m][c] = dot<format>(sums[m][c], value[c], w);
      }
    }
  }
  if (format == KvFormat::bf16 && visible % 2) {
    const char* place = values[whole / per_tile] + static_cast<size_t>(whole % per_tile) * d * 4;
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++) {
      const I32 value = and_bits(value_at(place, c), set1_i32(0xffff));
#pragma GCC unroll 8
      for (int m = 0; m < rows; m++) sums[m][c] = dot<format>(sums[m][c], value, broadcast(weights + m * CHUNK + whole));
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++) {
      float* place = acc + m * stride + c * LANES;
      if constexpr (Lane::IS_SCALED)
        store(place, fma(to_float(sums[m][c]), set1(worth[m]), mul(load(place), set1(shrink[m]))));
      else
        store(place, sums[m][c]);
    }
}

template <KvFormat format, int rows, bool ahead>
LLM_INLINE void weigh(const uint32_t* weights, const float* worth, const Chunk& chunk, const Chunk& later, int d,
                      int visible, const float* shrink, float* acc) {
  constexpr int per_value = Lane<format>::BYTES / LANES;
  const int stride = padded(d);
  const char *values[CHUNK_TILES], *then[CHUNK_TILES];
  int column = 0;
  const auto some = [&]<int columns>(int count) {
    for (int t = 0; t < CHUNK_TILES; t++) {
      values[t] = chunk.values[t] + static_cast<size_t>(column) * per_value;
      then[t] = later.values[t] + static_cast<size_t>(column) * per_value;
    }
    weigh_columns<format, rows, columns, ahead>(weights, worth, values, then, d, visible, shrink, acc + column, stride,
                                                count);
    column += columns * LANES;
  };
  while (d - column >= MOST_COLUMNS * LANES) some.template operator()<MOST_COLUMNS>(LANES);
  if constexpr (MOST_COLUMNS > 2)
    if (d - column >= 2 * LANES) some.template operator()<2>(LANES);
  while (column < d) some.template operator()<1>(std::min(d - column, LANES));
  if constexpr (ahead && Lane<format>::IS_SCALED)
    for (int t = 0; t < CHUNK_TILES; t++) fetch(later.values[t] + scales_offset(d));
}

// `rows` queries (from row `first` of the tile's) and one chunk; visible[m] positions of it belong to row m.
template <KvFormat format, int rows, bool ahead>
void attend_chunk(const Chunk& chunk, const Chunk& later, int d, const int* visible, int first, const Scratch& scratch,
                  const Partial& part) {
  const int steps = d / Lane<format>::PER_LANE;
  const int most = std::min(*std::max_element(visible, visible + rows), CHUNK);
  const int num_tiles = (most + TILE - 1) / TILE;
  const uint32_t* query = scratch.query + static_cast<size_t>(first) * steps;
  score<format, rows, ahead>(query, scratch.query_scale + first, steps, chunk, later, num_tiles, scratch.scores);
  if (*std::min_element(visible, visible + rows) < num_tiles * TILE) hide<rows>(scratch.scores, visible, num_tiles);
  float shrink[LANES];
  float *max = part.max + first, *lanes = scratch.lanes + first * LANES;
  if (num_tiles == CHUNK_TILES)  // unrolled
    soften<format, rows>(scratch.scores, CHUNK_TILES, max, lanes, scratch.weights, shrink);
  else
    soften<format, rows>(scratch.scores, num_tiles, max, lanes, scratch.weights, shrink);
  float* acc = part.acc + static_cast<size_t>(first) * padded(d);
  float worth[rows];
  if constexpr (Lane<format>::IS_SCALED) {
    for (int m = 0; m < rows; m++) {
      const float* weights = scratch.scores + m * CHUNK;
      int16_t* words = reinterpret_cast<int16_t*>(scratch.weights + m * CHUNK);
      worth[m] = num_tiles == CHUNK_TILES ? to_words(weights, chunk.values, scales_offset(d), CHUNK_TILES, words)
                                          : to_words(weights, chunk.values, scales_offset(d), num_tiles, words);
    }
  }
  weigh<format, rows, ahead>(scratch.weights, worth, chunk, later, d, most, shrink, acc);
}

template <KvFormat format, bool ahead>
void attend_rows(int rows, const Chunk& chunk, const Chunk& later, int d, const int* visible, int first,
                 const Scratch& scratch, const Partial& part) {
  const auto of = [&]<int count>() { attend_chunk<format, count, ahead>(chunk, later, d, visible, first, scratch, part); };
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
