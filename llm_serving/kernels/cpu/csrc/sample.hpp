// One row of logits -> its token, log-probability and alternatives; the twin of llm_serving/agent/sampler.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sampling_kernels.hpp"

namespace llm {

// The random number of a draw, in [0, 1); see llm_serving/agent/philox.py.
double uniform(uint64_t seed, int32_t position, int32_t sample_index);

struct SampledRow {
  int32_t id;
  float logprob;  // natural log, of the model
  bool finite;    // false: some valid id, nothing else counts
};

// `logits` [width] are the model's and are zeroed if they are not finite; null: `known` is all that is asked for.
// `adjusted` [width] are they after biases and penalties, or null if the row asks for none (zeroed too if nothing is
// left to choose from).  `known` is what `logits` amount to at the record's summed_temperature.  `position` is that
// of the drawn token.  Writes record.num_logprobs alternatives (at most `width`), likeliest first.
SampledRow sample_row(const SamplingKernels&, float* logits, float* adjusted, int width, const Digest& known,
                      const SamplingRecord&, int32_t position, int32_t* top_ids, float* top_logprobs,
                      void* scratch);

}  // namespace llm
