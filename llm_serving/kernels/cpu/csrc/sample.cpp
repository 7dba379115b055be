#include "sample.hpp"

#include <algorithm>
#include <cmath>

namespace llm {
namespace {

// Philox4x32-10 (Salmon et al., SC'11).
void philox(uint32_t (&counter)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(a)};
    std::copy(next, next + 4, counter);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

// Every token is as likely.
void blank(float* logits, int width) { std::fill(logits, logits + width, 0.0f); }

}  // namespace

double uniform(uint64_t seed, int32_t position, int32_t sample_index) {
  uint32_t words[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(sample_index), 0, 0};
  philox(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const uint64_t bits = (uint64_t{words[0]} << 32 | words[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

SampledRow sample_row(const SamplingKernels& kernels, float* logits, float* adjusted, int width, const Digest& known,
                      const SamplingRecord& record, int32_t position, int32_t* top_ids, float* top_logprobs,
                      void* scratch) {
  Summary row = known.row;
  bool finite = std::isfinite(row.max);
  const Digest* digest = finite ? &known : nullptr;  // of these logits
  if (!finite) {
    if (logits != nullptr) blank(logits, width);
    if (adjusted != nullptr) blank(adjusted, width);
    row = {0, 0, static_cast<float>(width), 0};
  }
  const float log_sum = std::log(row.sum);
  if (logits == nullptr) return {row.arg_max, 0.0f - log_sum, finite};
  const auto logprob = [&](int32_t id) { return logits[id] - row.max - log_sum; };
  const int num_top = std::min(record.num_logprobs, width);
  kernels.top(logits, width, num_top, digest != nullptr ? known.maxima : nullptr, top_ids, scratch);
  for (int i = 0; i < num_top; i++) top_logprobs[i] = logprob(top_ids[i]);

  Summary chosen = row;
  if (adjusted != nullptr) {
    chosen = kernels.best(adjusted, width);
    if (!std::isfinite(chosen.max)) {
      finite = false;
      blank(adjusted, width);
      chosen = {0, 0, 0, 0};
    }
  }
  int32_t id = chosen.arg_max;
  if (record.temperature > 0) {
    const double random = uniform(record.seed, position, record.sample_index);
    const float* scores = adjusted != nullptr ? adjusted : logits;
    id = kernels.draw(scores, width, chosen.max, adjusted != nullptr ? nullptr : digest, record, random, scratch);
  }
  return {id, logprob(id), finite};
}

}  // namespace llm
