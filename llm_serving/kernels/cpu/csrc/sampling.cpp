// What a row of logits amounts to, and which id it gets: the draws of llm_serving/agent/drawing.py.
#include <algorithm>
#include <cmath>
#include <limits>

#include "filters.hpp"
#include "kernels.hpp"
#include "selection.hpp"

namespace llm {
namespace ISA {
namespace {

constexpr int BLOCK = 256;
constexpr int TAIL_TOKENS = 1024;  // mostly more than the tail of top_p weighs, counted in the last token that is kept

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

Summary summarise(const float* logits, int begin, int end, float temperature, float* maxima) {
  const int n = end - begin;
  F32 most = set1(LOWEST), spoilt = zero();
  for (int first = 0; first < n; first += MAXIMA_COLUMNS) {
    F32 part = set1(LOWEST);
    for (int i = first; i < std::min(first + MAXIMA_COLUMNS, n); i += LANES) {
      const F32 v = load_some(logits + i, n - i);
      part = max(part, v);
      if (n - i < LANES) break;
      spoilt = fma(v, zero(), spoilt);  // NaN as soon as one is not finite
    }
    if (maxima != nullptr) store(maxima + first / MAXIMA_COLUMNS * LANES, part);
    most = max(most, part);
  }
  for (int i = n / LANES * LANES; i < n; i++) spoilt = fma(set1(logits[i]), zero(), spoilt);
  if (!(sum(spoilt) == 0)) return {std::numeric_limits<float>::quiet_NaN(), begin, 0, 0};
  const float top = largest(most);
  const F32 minus = set1(top);
  F32 total = zero(), heated = zero();
  if (temperature > 0 && temperature != 1) {
    const F32 by = set1(1.0f / temperature);
    for (int i = 0; i < n; i += LANES) {
      const F32 away = sub(load_some(logits + i, n - i), minus);
      total = add(total, exp(away));
      heated = add(heated, exp(mul(away, by)));
    }
  } else {
    for (int i = 0; i < n; i += LANES) total = add(total, exp(sub(load_some(logits + i, n - i), minus)));
    heated = temperature > 0 ? total : zero();
  }
  return {top, begin + place_of(logits, n, top), sum(total), sum(heated)};
}

// How many times less likely than the row's largest a range's largest is.
float share(const Summary& range, const Summary& row, float temperature) {
  return std::exp((range.max - row.max) / temperature);
}

Summary merge(const Summary* ranges, int count, float temperature) {
  Summary row = ranges[0];
  for (int i = 1; i < count; i++) {
    if (ranges[i].max > row.max) {
      row.max = ranges[i].max;
      row.arg_max = ranges[i].arg_max;
    }
  }
  for (int i = 0; i < count; i++)
    if (!(std::fabs(ranges[i].max) < INFINITY)) return {std::numeric_limits<float>::quiet_NaN(), 0, 0, 0};
  float total = 0, heated = 0;
  for (int i = 0; i < count; i++) {
    total += ranges[i].sum * share(ranges[i], row, 1);
    if (temperature > 0) heated += ranges[i].heated * share(ranges[i], row, temperature);
  }
  row.sum = total;
  row.heated = heated;
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
  if (!(sum(spoilt) == 0) || top == LOWEST) return {std::numeric_limits<float>::quiet_NaN(), 0, 0, 0};
  return {top, place_of(logits, width, top), 0, 0};
}

void top(const float* logits, int width, int count, const float* maxima, int32_t* ids, void* memory) {
  if (count < 1) return;
  Scratch scratch;
  lay_out(scratch, memory, width);
  const Search& search = scratch.search;
  const float cut = maxima == nullptr ? LOWEST : below_kth_largest(maxima, num_maxima(width), count, search);
  const int found = cut > LOWEST
                        ? find_candidates(logits, width, maxima, cut, search)
                        : find_candidates(logits, width, kth_largest(logits, width, count, search), search);
  for (int i = 0; i < found; i++) search.keys[i] = key_of(search.values[i], ~search.places[i]);
  std::partial_sort(search.keys, search.keys + count, search.keys + found, std::greater<uint64_t>());
  for (int i = 0; i < count; i++) ids[i] = ~static_cast<int32_t>(static_cast<uint32_t>(search.keys[i]));
}

// ---------------------------------------------------------------- draws

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

// The range that the uniform falls into, then the id within it.
int32_t draw_in_range(Kept& kept, const float* logits, int width, const Digest& known, float temperature,
                      double uniform) {
  const auto units = [&](int range) {
    const double weight = double{known.ranges[range].heated} * double{share(known.ranges[range], known.row, temperature)};
    return std::floor(weight / double{known.row.heated} * double{UNITS});
  };
  const int count = num_ranges(width);
  double total = 0;
  for (int i = 0; i < count; i++) total += units(i);
  double target = std::min(std::floor(uniform * total), total - 1);
  int range = 0;
  for (double weight; range < count - 1 && target >= (weight = units(range)); range++) target -= weight;
  const int begin = range * SUMMARY_COLUMNS;
  score(kept, logits + begin, std::min(SUMMARY_COLUMNS, width - begin), known.ranges[range].max, temperature);
  return begin + draw_kept(kept, (target + 0.5) / units(range));
}

// What the first filter is likely to keep, found by the maxima; false: it has to be looked for among all.  That of
// top_p is likely if what it leaves weighs as much as `tail_tokens` of the last one that it keeps.
bool gather(Scratch& scratch, const float* logits, int width, const Digest& known, const SamplingRecord& record,
            int tail_tokens) {
  Kept& kept = scratch.kept;
  const float temperature = record.temperature, max = known.row.max / temperature;
  float complete = LOWEST;
  if (record.top_k > 0) {
    complete = below_kth_largest(known.maxima, num_maxima(width), record.top_k, scratch.search) / temperature;
  } else if (record.top_p < 1) {
    const double tail = decimal(1.0f - record.top_p);
    if (tail < 1e-4) return false;  // so little is lost in the rounding of the sum
    complete = tail_cut(max, known.row.heated, tail, std::min(width, tail_tokens));
  } else if (record.min_p > 0) {
    complete = max + std::log(record.min_p);
  }
  const float cut = (complete - margin(max)) * temperature;
  if (!(cut > LOWEST)) return false;
  const int count = find_candidates(logits, width, known.maxima, cut, scratch.search);
  score(kept, scratch.search.values, count, known.row.max, temperature);
  std::swap(kept.ids, scratch.search.places);
  kept.is_all = false;
  kept.whole_sum = record.top_k > 0 ? 0 : known.row.heated;
  kept.complete = complete;
  return true;
}

int32_t draw(const float* logits, int width, float max, const Digest* digest, const SamplingRecord& record,
             double uniform, void* memory) {
  Scratch scratch;
  lay_out(scratch, memory, width);
  // A temperature so low that the quotient overflows is raised.
  const float temperature = std::max(record.temperature, std::fabs(max) / std::numeric_limits<float>::max());
  if (digest != nullptr && temperature == record.temperature && temperature >= LEAST_SUMMED) {
    const bool is_filtered = record.top_k > 0 || record.top_p < 1 || record.min_p > 0 || record.typical_p < 1;
    if (!is_filtered) return draw_in_range(scratch.kept, logits, width, *digest, temperature, uniform);
    for (int tokens = TAIL_TOKENS; gather(scratch, logits, width, *digest, record, tokens); tokens *= 8) {
      if (narrow(scratch, record)) return draw_kept(scratch.kept, uniform);
      if (tokens >= width) break;
    }
  }
  score(scratch.kept, logits, width, max, temperature);
  narrow(scratch, record);
  return draw_kept(scratch.kept, uniform);
}

}  // namespace

SamplingKernels sampling_kernels() { return {summarise, merge, best, top, draw, scratch_bytes}; }

}  // namespace ISA
}  // namespace llm
