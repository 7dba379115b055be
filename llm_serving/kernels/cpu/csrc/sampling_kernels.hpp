// What every instruction set offers for sampling: rows of logits are summed up while they are computed, and drawn
// from what is known of them then.  See kernels.hpp for what holds of all kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llm {

constexpr int SUMMARY_COLUMNS = 2048;  // columns of a logit row that are summed up as one
constexpr int MAXIMA_COLUMNS = 128;    // columns of it that share sixteen maxima

constexpr int num_ranges(int width) { return (width + SUMMARY_COLUMNS - 1) / SUMMARY_COLUMNS; }
constexpr int num_maxima(int width) { return (width + MAXIMA_COLUMNS - 1) / MAXIMA_COLUMNS * 16; }

// What a range of columns amounts to.  Ranges must be those of SUMMARY_COLUMNS, so that a row's bits do not
// depend on who took which.
struct Summary {
  float max;        // NaN or inf if any logit is not finite
  int32_t arg_max;  // the lowest column of the largest
  float sum;        // of e^(x - max)
  float heated;     // of e^((x - max) / temperature), if there is one
};

// What is known of a row, so that who draws from it need not read all of it.
struct Digest {
  const Summary* ranges;  // [num_ranges(width)]
  Summary row;            // they, merged
  const float* maxima;    // [num_maxima(width)] the largest of each sixteenth column of MAXIMA_COLUMNS
};

// SAMPLING_DTYPE of llm_serving/generation.py, byte for byte.
struct SamplingRecord {
  uint64_t seed;
  float temperature;
  int32_t top_k;
  float top_p, min_p, typical_p;
  float repetition_penalty, presence_penalty, frequency_penalty;
  int32_t num_logprobs, sample_index;
};
static_assert(sizeof(SamplingRecord) == 48);

// At which temperature a draw wants to know a row's sum, or 0: not where top_k or typical_p comes first, nor where
// it is so low that a float hardly tells the quotients of the likeliest from each other.
constexpr float LEAST_SUMMED = 1e-3f;
inline float summed_temperature(const SamplingRecord& record) {
  const bool is_typical = record.typical_p < 1 && !(record.top_p < 1) && !(record.min_p > 0);
  return record.top_k > 0 || is_typical || !(record.temperature >= LEAST_SUMMED) ? 0 : record.temperature;
}

struct SamplingKernels {
  // Columns [begin, end) of a row, `logits` pointing at column begin; end - begin <= SUMMARY_COLUMNS.  Writes
  // `maxima` of these columns unless null; a temperature of 0 means none.
  Summary (*summarise)(const float* logits, int begin, int end, float temperature, float* maxima);
  // All ranges of a row in their order -> the row.
  Summary (*merge)(const Summary* ranges, int count, float temperature);
  // The largest and its lowest column, where -inf is allowed; max is NaN if there is none or any is inf or NaN.
  Summary (*best)(const float* logits, int width);
  // The columns of the `count` largest, in order of (logit down, column up); count <= width.  `maxima` of the row,
  // or null.
  void (*top)(const float* logits, int width, int count, const float* maxima, int32_t* ids, void* scratch);
  // A draw from logits [width], temperature > 0, as llm_serving/agent/drawing.py does it; -inf is allowed, but
  // not for `max`, the largest.  `digest` of the row at the record's summed_temperature, or null.
  int32_t (*draw)(const float* logits, int width, float max, const Digest* digest, const SamplingRecord&,
                  double uniform, void* scratch);
  // Bytes of scratch for `top` and `draw`, aligned to 64.
  size_t (*scratch_bytes)(int width);
};

}  // namespace llm
