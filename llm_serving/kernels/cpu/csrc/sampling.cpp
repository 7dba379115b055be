// Which id a row of logits gets: the sets and draws of llm_serving/agent/filters.py and drawing.py.
//
// What is kept is a list of scores in order of their ids (at first all of them); a filter shortens the
// list.  Weights are the softmax in whole units of 2^-50, exact in any order of summing.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.hpp"
#include "selection.hpp"

namespace llm {
namespace ISA {
namespace {

constexpr float UNITS = 1125899906842624.0f;  // 2^50
constexpr int BLOCK = 256;

struct Kept {
  float* scores;
  float* weights;
  int32_t* ids;
  int count;
  bool is_all;  // ids are 0 .. count - 1 and not written
  float max;  // of the scores
  float sum;  // of e^(score - max), once exponentiated
};

struct Scratch {
  Kept kept;
  float* values;
  Search search;
};

size_t lay_out(Scratch& scratch, void* memory, int width) {
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

size_t scratch_bytes(int width) {
  Scratch scratch;
  return lay_out(scratch, nullptr, width);
}

// ---------------------------------------------------------------- what a row amounts to

// Up to sixteen logits, the rest below all.
LLM_INLINE F32 load_last(const float* logits, int count) {
  float lanes[LANES];
  std::fill(lanes, lanes + LANES, LOWEST);
  std::copy(logits, logits + count, lanes);
  return load(lanes);
}

LLM_INLINE F32 load_some(const float* logits, int count) {
  return count < LANES ? load_last(logits, count) : load(logits);
}

// The lowest column of `value`, which is among n and above -inf.
int place_of(const float* logits, int n, float value) {
  const F32 v = set1(value);
  int i = 0;
  uint32_t mask = 0;
  while ((mask = at_least(load_some(logits + i, n - i), v)) == 0) i += LANES;
  return i + __builtin_ctz(mask);
}

Summary summarise(const float* logits, int begin, int end) {
  const int n = end - begin;
  F32 most = set1(LOWEST), spoilt = zero();
  for (int i = 0; i < n; i += LANES) {
    const F32 v = load_some(logits + i, n - i);
    most = max(most, v);
    if (n - i < LANES) break;
    spoilt = fma(v, zero(), spoilt);  // NaN as soon as one is not finite
  }
  for (int i = n / LANES * LANES; i < n; i++) spoilt = fma(set1(logits[i]), zero(), spoilt);
  if (!(sum(spoilt) == 0)) return {std::numeric_limits<float>::quiet_NaN(), begin, 0};
  const float top = largest(most);
  const F32 minus = set1(top);
  F32 total = zero();
  for (int i = 0; i < n; i += LANES) total = add(total, exp(sub(load_some(logits + i, n - i), minus)));
  return {top, begin + place_of(logits, n, top), sum(total)};
}

Summary merge(const Summary* ranges, int count) {
  Summary row = ranges[0];
  for (int i = 1; i < count; i++) {
    if (ranges[i].max > row.max) {
      row.max = ranges[i].max;
      row.arg_max = ranges[i].arg_max;
    }
  }
  for (int i = 0; i < count; i++)
    if (!(std::fabs(ranges[i].max) < INFINITY)) return {std::numeric_limits<float>::quiet_NaN(), 0, 0};
  float total = 0;
  for (int i = 0; i < count; i++) total += ranges[i].sum * std::exp(ranges[i].max - row.max);
  row.sum = total;
  return row;
}

Summary best(const float* logits, int width) {
  F32 most = set1(LOWEST), spoilt = zero();
  const F32 least = set1(std::numeric_limits<float>::lowest());
  for (int i = 0; i < width; i += LANES) {
    const F32 v = load_some(logits + i, width - i);
    most = max(most, v);
    spoilt = fma(max(least, v), zero(), spoilt);  // NaN as soon as one is inf or NaN
  }
  const float top = largest(most);
  if (!(sum(spoilt) == 0) || top == LOWEST) return {std::numeric_limits<float>::quiet_NaN(), 0, 0};
  return {top, place_of(logits, width, top), 0};
}

void top(const float* logits, int width, int count, int32_t* ids, void* memory) {
  if (count < 1) return;
  Scratch scratch;
  lay_out(scratch, memory, width);
  const Search& search = scratch.search;
  const int found = find_candidates(logits, width, kth_largest(logits, width, count, search), search);
  for (int i = 0; i < found; i++) search.keys[i] = key_of(search.values[i], ~search.places[i]);
  std::partial_sort(search.keys, search.keys + count, search.keys + found, std::greater<uint64_t>());
  for (int i = 0; i < count; i++) ids[i] = ~static_cast<int32_t>(static_cast<uint32_t>(search.keys[i]));
}

// ---------------------------------------------------------------- what is kept

// Scores from `count` up to the next whole vector, so that they weigh nothing.
void seal(Kept& kept) { std::fill_n(kept.scores + kept.count, LANES, LOWEST); }

// kept.weights: e^(score - max); kept.sum.
void exponentiate(Kept& kept) {
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
  kept.sum = static_cast<float>(total);
}

// e^(score - max) -> whole units; their total.
double count_units(Kept& kept) {
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
void keep_at_least(Kept& kept, const float* values, float least) {
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
}

// The decimal that a float32 was written as: 0.1, not 0.10000000149.
double decimal(float value) { return std::max(std::nearbyint(static_cast<double>(value) * 1e7) / 1e7, 1e-7); }

void keep_top_k(Scratch& scratch, int top_k) {
  Kept& kept = scratch.kept;
  if (top_k < kept.count) keep_at_least(kept, kept.scores, kth_largest(kept.scores, kept.count, top_k, scratch.search));
}

void keep_top_p(Scratch& scratch, float top_p) {
  Kept& kept = scratch.kept;
  const double tail = decimal(1.0f - top_p);
  exponentiate(kept);
  const double total = count_units(kept), limit = std::max(total - std::floor(tail * total) - 1, 0.0);
  // What is less likely than tail / count is together no more than the tail, so it is cut off (with a margin).
  const double cut = kept.max + std::log(static_cast<double>(kept.sum) * tail / kept.count) - 0.01;
  int last = first_beyond(kept.scores, kept.weights, kept.count, limit, kept.max, static_cast<float>(cut), scratch.search);
  if (last < 0) last = first_beyond(kept.scores, kept.weights, kept.count, limit, kept.max, LOWEST, scratch.search);
  const float least = kept.scores[last];
  for (int i = 0; i < last; i++)  // its equals of lower ids come after it
    if (kept.scores[i] == least) kept.scores[i] = std::numeric_limits<float>::quiet_NaN();
  keep_at_least(kept, kept.scores, least);
}

void keep_min_p(Scratch& scratch, float min_p) {
  Kept& kept = scratch.kept;
  exponentiate(kept);
  const float scale = 1.0f / kept.sum;  // the largest exponential is 1
  const F32 shrink = set1(scale);
  for (int i = 0; i < kept.count; i += LANES) store(scratch.values + i, mul(load(kept.weights + i), shrink));
  keep_at_least(kept, scratch.values, min_p * scale);
}

void keep_typical(Scratch& scratch, float typical_p) {
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

// The first id at which the cumulative distribution exceeds the uniform.
int32_t draw_kept(Kept& kept, double uniform) {
  exponentiate(kept);
  const double total = count_units(kept), target = std::min(std::floor(uniform * total), total - 1);
  double before = 0;
  int begin = 0;
  for (; begin < kept.count; begin += BLOCK) {
    WholeSum part;
    for (int i = begin; i < std::min(begin + BLOCK, kept.count); i += LANES) WholeSum::add(part, load(kept.weights + i));
    if (before + part.total() > target) break;
    before += part.total();
  }
  int place = begin;
  while (place < kept.count - 1 && (before += static_cast<double>(kept.weights[place])) <= target) place++;
  return kept.is_all ? place : kept.ids[place];
}

int32_t draw(const float* logits, int width, float max, const SamplingRecord& record, double uniform, void* memory) {
  Scratch scratch;
  lay_out(scratch, memory, width);
  Kept& kept = scratch.kept;
  kept.count = width;
  kept.is_all = true;
  // A temperature so low that the quotient overflows is raised.
  const float temperature = std::max(record.temperature, std::fabs(max) / std::numeric_limits<float>::max());
  const F32 by = set1(temperature);
  kept.max = max / temperature;
  for (int i = 0; i < width; i += LANES) {
    const F32 v = width - i < LANES ? load(logits + i, width - i) : load(logits + i);
    store(kept.scores + i, div(v, by));
  }
  if (record.top_k > 0) keep_top_k(scratch, record.top_k);
  if (record.top_p < 1) keep_top_p(scratch, record.top_p);
  if (record.min_p > 0) keep_min_p(scratch, record.min_p);
  if (record.typical_p < 1) keep_typical(scratch, record.typical_p);
  return draw_kept(kept, uniform);
}

}  // namespace

SamplingKernels sampling_kernels() { return {summarise, merge, best, top, draw, scratch_bytes}; }

}  // namespace ISA
}  // namespace llm
