// What may be drawn: top_k, top_p, min_p and typical_p, as llm_serving/agent/filters.py has them.
//
// What is kept is a list of scores in order of their ids (at first all of them); a filter shortens the
// list.  Weights are the softmax in whole units of 2^-50, exact in any order of summing.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "sampling_kernels.hpp"
#include "selection.hpp"

namespace llm {
namespace ISA {

constexpr float UNITS = 1125899906842624.0f;  // 2^50

struct Kept {
  float* scores;
  float* weights;
  int32_t* ids;
  int count;
  bool is_all;      // ids are 0 .. count - 1 and not written
  float max;        // of the scores
  float sum;        // of e^(score - max), once exponentiated
  // If these are only part of the scores: the sum of all, and that none at or above `complete` is missing.
  float whole_sum, complete;  // else 0 and -inf
};

struct Scratch {
  Kept kept;
  float* values;
  Search search;
};

inline size_t lay_out(Scratch& scratch, void* memory, int width) {
  size_t used = 0;
  const auto take = [&](size_t num_bytes) {
    char* place = memory == nullptr ? nullptr : static_cast<char*>(memory) + used;
    used += (num_bytes + 63) / 64 * 64;
    return place;
  };
  const size_t size = room(width);
  scratch.kept = {};
  scratch.kept.scores = reinterpret_cast<float*>(take(size * 4));
  scratch.kept.weights = reinterpret_cast<float*>(take(size * 4));
  scratch.kept.ids = reinterpret_cast<int32_t*>(take(size * 4));
  scratch.values = reinterpret_cast<float*>(take(size * 4));
  scratch.search.values = reinterpret_cast<float*>(take(size * 4));
  scratch.search.places = reinterpret_cast<int32_t*>(take(size * 4));
  scratch.search.keys = reinterpret_cast<uint64_t*>(take(size * 8));
  scratch.search.histogram = reinterpret_cast<double*>(take(NUM_BUCKETS * 8));
  return used;
}

inline size_t scratch_bytes(int width) {
  Scratch scratch;
  return lay_out(scratch, nullptr, width);
}

// Scores from `count` up to the next whole vector, so that they weigh nothing.
inline void seal(Kept& kept) { std::fill_n(kept.scores + kept.count, LANES, LOWEST); }

// kept.weights: e^(score - max); kept.sum.
inline void exponentiate(Kept& kept) {
  seal(kept);
  const F32 minus = set1(kept.max);
  double total = 0;
  for (int begin = 0; begin < kept.count; begin += SUMMARY_COLUMNS) {
    const int end = std::min(begin + SUMMARY_COLUMNS, kept.count);
    F32 part = zero();
    for (int i = begin; i < end; i += LANES) {
      const F32 e = exp(sub(load(kept.scores + i), minus));
      store(kept.weights + i, e);
      part = add(part, e);
    }
    total += static_cast<double>(sum(part));
  }
  kept.sum = kept.whole_sum > 0 ? kept.whole_sum : static_cast<float>(total);
}

// e^(score - max) -> whole units; their total.
inline double count_units(Kept& kept) {
  const F32 scale = set1(1.0f / kept.sum * UNITS);
  WholeSum total;
  for (int i = 0; i < kept.count; i += LANES) {
    const F32 units = floor(mul(load(kept.weights + i), scale));
    store(kept.weights + i, units);
    WholeSum::add(total, units);
  }
  return total.total();
}

// Keep the entries whose value is at least `least`.
inline void keep_at_least(Kept& kept, const float* values, float least) {
  const F32 edge = set1(least);
  int count = 0;
  for (int i = 0; i < kept.count; i += LANES) {
    const uint32_t mask = at_least(load(values + i), edge) & first_lanes(kept.count - i);
    const F32 scores = load(kept.scores + i);
    const I32 ids = kept.is_all ? counting(i) : load_i32(kept.ids + i);
    if (mask == 0) continue;
    compress(mask, as_bits(scores), kept.scores + count);
    compress(mask, ids, kept.ids + count);
    count += __builtin_popcount(mask);
  }
  kept.count = count;
  kept.is_all = false;
  kept.whole_sum = 0;
  kept.complete = LOWEST;
}

// The decimal that a float32 was written as: 0.1, not 0.10000000149.
inline double decimal(float value) { return std::max(std::nearbyint(static_cast<double>(value) * 1e7) / 1e7, 1e-7); }

inline void keep_top_k(Scratch& scratch, int top_k) {
  Kept& kept = scratch.kept;
  if (top_k < kept.count) keep_at_least(kept, kept.scores, kth_largest(kept.scores, kept.count, top_k, scratch.search));
}

// Of `count` scores, those below this are together no more than the tail, each being less than its count-th part.
inline float tail_cut(float max, float sum, double tail, int count) {
  return static_cast<float>(max + std::log(static_cast<double>(sum) * tail / count));
}

// More than what is lost when scores near `max` are rounded.
inline float margin(float max) { return 0.01f + 1e-6f * std::fabs(max); }

// False: some of what it would keep may be missing.
inline bool keep_top_p(Scratch& scratch, float top_p) {
  Kept& kept = scratch.kept;
  const double tail = decimal(1.0f - top_p);
  exponentiate(kept);
  const bool is_part = kept.whole_sum > 0;
  const double counted = count_units(kept), total = is_part ? double{UNITS} : counted;
  const double limit = std::max(total - std::floor(tail * total) - 1, 0.0);
  const float cut = tail_cut(kept.max, kept.sum, tail, kept.count) - margin(kept.max);
  int last = -1;
  if (!is_part) last = first_beyond(kept.scores, kept.weights, kept.count, limit, kept.max, cut, scratch.search);
  if (last < 0) last = first_beyond(kept.scores, kept.weights, kept.count, limit, kept.max, LOWEST, scratch.search);
  if (last < 0 || !(kept.scores[last] >= kept.complete)) return false;
  const float least = kept.scores[last];
  for (int i = 0; i < last; i++)  // its equals of lower ids come after it
    if (kept.scores[i] == least) kept.scores[i] = std::numeric_limits<float>::quiet_NaN();
  keep_at_least(kept, kept.scores, least);
  return true;
}

inline void keep_min_p(Scratch& scratch, float min_p) {
  Kept& kept = scratch.kept;
  exponentiate(kept);
  const float scale = 1.0f / kept.sum;  // the largest exponential is 1
  const F32 shrink = set1(scale);
  for (int i = 0; i < kept.count; i += LANES) store(scratch.values + i, mul(load(kept.weights + i), shrink));
  keep_at_least(kept, scratch.values, min_p * scale);
}

inline void keep_typical(Scratch& scratch, float typical_p) {
  Kept& kept = scratch.kept;
  exponentiate(kept);
  const double total = count_units(kept), limit = std::ceil(decimal(typical_p) * total) - 1;
  const F32 minus = set1(kept.max), log_sum = set1(std::log(kept.sum));
  const F32 least = set1(-200.0f);
  double units = 0;
  for (int i = 0; i < kept.count; i += LANES) {
    const F32 share = sub(sub(load(kept.scores + i), minus), log_sum);
    store(scratch.values + i, sub(zero(), max(share, least)));
  }
  for (int i = 0; i < kept.count; i++)
    units += std::nearbyint(static_cast<double>(kept.weights[i]) * static_cast<double>(scratch.values[i]) / 16);
  const F32 entropy = set1(static_cast<float>(units * (16.0 / 1125899906842624.0)));
  F32 most = set1(LOWEST);
  std::fill_n(scratch.values + kept.count, LANES, INFINITY);
  for (int i = 0; i < kept.count; i += LANES) {
    const F32 away = sub(load(scratch.values + i), entropy);
    const F32 typicality = min(away, sub(zero(), away));
    store(scratch.values + i, typicality);
    most = max(most, typicality);
  }
  const int last = first_beyond(scratch.values, kept.weights, kept.count, limit, largest(most), LOWEST, scratch.search);
  keep_at_least(kept, scratch.values, scratch.values[last]);
  kept.max = *std::max_element(kept.scores, kept.scores + kept.count);  // the likeliest may be gone
}

// Scores of `count` logits, whose ids are their places.
inline void score(Kept& kept, const float* logits, int count, float max, float temperature) {
  kept.count = count;
  kept.is_all = true;
  kept.max = max / temperature;
  kept.whole_sum = 0;
  kept.complete = LOWEST;
  const F32 by = set1(temperature);
  for (int i = 0; i < count; i += LANES) {
    const F32 v = count - i < LANES ? load(logits + i, count - i) : load(logits + i);
    store(kept.scores + i, div(v, by));
  }
}

// False: some of what the filters would keep may be missing.
inline bool narrow(Scratch& scratch, const SamplingRecord& record) {
  if (record.top_k > 0) keep_top_k(scratch, record.top_k);
  if (record.top_p < 1 && !keep_top_p(scratch, record.top_p)) return false;
  if (record.min_p > 0) keep_min_p(scratch, record.min_p);
  if (record.typical_p < 1) keep_typical(scratch, record.typical_p);
  return true;
}

}  // namespace ISA
}  // namespace llm
